"""What a proxy between clients and prefill and decode engines decides; it sends nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from kvstore.errors import ConfigError
from kvstore.limits import HOST_NAME_MAX_CHARS, PROXY_REST_SECONDS, PROXY_SILENT_REST_SECONDS

log = logging.getLogger("kvstore.pd_proxy")

# Of these, prefill needs none: it answers with one token, at once.
_DROPPED: Final = ("stream_options", "min_tokens")


class EngineError(Exception):
    """An engine, or all of them, did not answer as it should."""


class EngineURL(NamedTuple):
    """Where an engine serves. *peer* is what decode's daemon calls its daemon, if it is another."""

    url: str
    peer: str = ""


def parse_engine(text: str) -> EngineURL:
    """Return the engine that *text* names, as in `http://host:8100#peer`; raises `ConfigError`."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query:
        raise ConfigError(f"{text!r} is no http:// or https:// address of an engine")
    if len(parts.fragment) > HOST_NAME_MAX_CHARS:
        raise ConfigError(f"the peer of {text!r} has more than {HOST_NAME_MAX_CHARS} characters")
    return EngineURL(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", parts.fragment)


class Pool:
    """Engines that take turns. One that has failed is asked last, for a while.

    One that has kept a request waiting is not asked at all meanwhile: the next would wait, too.
    """

    def __init__(
        self, engines: Sequence[EngineURL], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.engines = tuple(dict.fromkeys(engines))
        self._clock = clock
        self._next = 0
        self._resting: dict[EngineURL, float] = {}
        self._silent: dict[EngineURL, float] = {}

    def in_order(self) -> list[EngineURL]:
        """Return the engines that the next request tries, in this order."""
        start, self._next = self._next, (self._next + 1) % len(self.engines)
        now = self._clock()
        turn = [
            engine
            for engine in (*self.engines[start:], *self.engines[:start])
            if self._silent.get(engine, now) <= now
        ]
        return sorted(turn, key=lambda engine: self._resting.get(engine, now) > now)

    def rest(self, engine: EngineURL, reason: Exception, *, is_silent: bool = False) -> None:
        """Ask *engine* last for a while, because of *reason*; not at all if it *is_silent*."""
        log.warning("%s rests: %s", engine.url, reason)
        now = self._clock()
        self._resting[engine] = now + PROXY_REST_SECONDS
        if is_silent:
            self._silent[engine] = now + PROXY_SILENT_REST_SECONDS


def prefill_body(body: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Return what a prefill engine is asked: one token, and a hand-off, called *name* if given."""
    asked = {key: value for key, value in body.items() if key not in _DROPPED}
    params: dict[str, Any] = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    if name is not None:
        params["transfer_id"] = name
    asked |= {"stream": False, "max_tokens": 1, "kv_transfer_params": params}
    if "max_completion_tokens" in asked:
        asked["max_completion_tokens"] = 1
    return asked


def decode_body(body: Mapping[str, Any], params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a decode engine is asked: all that the client does, and where KV comes from."""
    asked = {key: value for key, value in body.items() if key != "kv_transfer_params"}
    return asked if params is None else asked | {"kv_transfer_params": dict(params)}
