"""The first token of an answer comes from prefill, the others from decode: when, and in what shape.

Prefill has sampled it anyway. Decode is then asked for what comes behind the prompt and this
token, as token ids, and the client reads one answer. That must not differ from what one engine
says: a request that asks for anything of which this is not known goes the plain way, where decode
samples every token.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvstore.connectors.pd_pools import EngineError
from kvstore.limits import PROXY_EVENT_MAX_BYTES

PATH: Final = "/v1/completions"
# What bears on every token alike, whichever engine samples it and whether or not the first token
# counts as prompt. Anything else must have one of the values that ask for nothing.
_ALIKE: Final = frozenset(
    (
        "add_special_tokens",
        "allowed_token_ids",
        "cache_salt",
        "ignore_eos",
        "kv_transfer_params",
        "logit_bias",
        "max_tokens",
        "min_p",
        "model",
        "priority",
        "prompt",
        "repetition_penalty",
        "skip_special_tokens",
        "stop_token_ids",
        "stream",
        "stream_options",
        "temperature",
        "top_k",
        "top_p",
        "user",
    )
)
_NEUTRAL: Final[Mapping[str, int]] = {
    "best_of": 1,
    "frequency_penalty": 0,
    "min_tokens": 0,
    "n": 1,
    "presence_penalty": 0,
}
# What an engine takes for a completion that does not say.
_TOKENS: Final = 16
_HALF_A_CHARACTER: Final = "\N{REPLACEMENT CHARACTER}"


def may_split(path: str, body: Mapping[str, Any]) -> bool:
    """Whether one engine may sample the first token of an answer and another one the rest.

    Only of a streamed answer: of any other, the client sees nothing before it sees all.
    """
    if path != PATH or body.get("stream") is not True or not _is_one_prompt(body.get("prompt")):
        return False
    options = body.get("stream_options") or {}
    tokens = body.get("max_tokens")
    return (
        isinstance(options, dict)
        and options.keys() <= {"include_usage"}
        and (tokens is None or (type(tokens) is int and tokens > 1))
        and all(_asks_for_nothing(name, value) for name, value in body.items())
    )


def with_seed(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return *body* with a seed, so that decode can draw the token that prefill has drawn.

    It has to where that token cannot be shown by itself. Drawn anew, such tokens would be rarer
    than they should.
    """
    return dict(body) | {"seed": secrets.randbits(63)}


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A token that prefill has sampled, and the text of it. *answer* is how prefill put it."""

    answer: Mapping[str, Any]
    text: str
    prompt: list[int]
    token: int

    def event(self) -> bytes:
        """Return what the client reads of it."""
        return self._event(self.text, None)

    def end(self, body: Mapping[str, Any]) -> bytes:
        """Return the end of an answer to *body* that has room for this token alone."""
        ended = self._event("", "length")
        if (body.get("stream_options") or {}).get("include_usage"):
            count = len(self.prompt)
            usage = {"prompt_tokens": count, "total_tokens": count + 1, "completion_tokens": 1}
            ended += _event(dict(self.answer) | {"choices": [], "usage": usage})
        return ended + b"data: [DONE]\n\n"

    def _event(self, text: str, finish_reason: str | None) -> bytes:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
        }
        return _event(dict(self.answer) | {"choices": [choice]})

    def rest_of(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return what decode is asked instead of *body*: all that comes behind this token."""
        # Named, but null, is as many as the context holds.
        tokens = body.get("max_tokens", _TOKENS)
        left = None if tokens is None else tokens - 1
        asked = {name: value for name, value in body.items() if name != "seed"}
        return asked | {"prompt": [*self.prompt, self.token], "max_tokens": left}

    def rewritten(self, event: bytes) -> bytes:
        """Return an event of the rest as one of the whole answer."""
        if not event.startswith(b"data: {"):
            return event
        content = json.loads(event.removeprefix(b"data: "))
        if "choices" not in content:
            return event  # an error, in the engine's words
        content |= {name: self.answer[name] for name in ("id", "created")}
        if usage := content.get("usage"):
            usage["prompt_tokens"] -= 1
            usage["completion_tokens"] += 1
        return _event(content)


def first_token(answer: Mapping[str, Any]) -> FirstToken | None:
    """Return the token in the *answer* of prefill, if others follow it and it has a text.

    Half a character has none yet, and a special token has none at all.
    """
    try:
        (choice,) = answer["choices"]
        text, prompt, (token,) = choice["text"], choice["prompt_token_ids"], choice["token_ids"]
        if choice["finish_reason"] != "length" or not text or _HALF_A_CHARACTER in text:
            return None
        named = {name: answer[name] for name in ("id", "object", "created", "model")}
        return FirstToken(named, str(text), list(prompt), int(token))
    except (KeyError, TypeError, ValueError):
        # An engine that does not return token ids.
        return None


class Events:
    """Takes a stream of server-sent events apart, however it is cut into pieces."""

    def __init__(self) -> None:
        self._begun = b""

    def of(self, piece: bytes) -> Iterator[bytes]:
        """Yield the events that *piece* ends; raises `EngineError` for one that never does."""
        *events, self._begun = (self._begun + piece).split(b"\n\n")
        if len(self._begun) > PROXY_EVENT_MAX_BYTES:
            raise EngineError(f"an event has more than {PROXY_EVENT_MAX_BYTES} bytes")
        for event in events:
            yield event + b"\n\n"


def _event(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


def _is_one_prompt(prompt: object) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(type(token) is int for token in prompt)
    return isinstance(prompt, str) and bool(prompt)


def _asks_for_nothing(name: str, value: object) -> bool:
    if name in _ALIKE or value is None or value is False or value in ("", [], {}):
        return True
    return name in _NEUTRAL and value == _NEUTRAL[name]
