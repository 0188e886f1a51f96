"""A proxy between clients and engines that say what the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from kvstore.connectors.pd_pools import EngineURL
from kvstore.connectors.pd_proxy import Proxy

CHAT = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "x"}]}
COMPLETIONS = "/v1/completions"
# Whatever else bears on one token as on the next may be asked for, too.
PROMPT = {"model": "tiny", "stream": True, "prompt": "x y", "max_tokens": 5, "temperature": 0.5}
# What an engine makes of the prompt, when it is asked for one token, and what stands for it.
NAMES = {"object": "text_completion", "model": "tiny"}
FIRST = {"index": 0, "text": "one", "finish_reason": "length", "stop_reason": None}
SEEN = FIRST | {"logprobs": None, "finish_reason": None}
EVENTS = [b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"]


class FakeEngine:
    """An engine that notes what it is asked. *answer* may be replaced."""

    def __init__(self, *, is_prefill: bool) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.begun = asyncio.Event()
        self.loaded = asyncio.Event()
        self.cancelled: asyncio.Queue[None] = asyncio.Queue()
        self.status = 200
        self.differs: dict[str, object] = {}
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] = (
            self.prefill if is_prefill else self.stream
        )

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        self.headers.append(request.headers)
        self.begun.set()
        if self.status != 200:
            return web.json_response({"error": {"message": "its own words"}}, status=self.status)
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            self.cancelled.put_nowait(None)
            raise

    async def prefill(self, _: web.Request) -> web.StreamResponse:
        given = {"transfer_id": f"n{len(self.asked)}", "do_remote_prefill": True, "more": [1]}
        return web.json_response({"kv_transfer_params": given, "choices": []})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        answer.content_type = "text/event-stream"
        await answer.prepare(request)
        for event in EVENTS:
            await answer.write(event)
        return answer

    async def prefill_text(self, request: web.Request) -> web.StreamResponse:
        """Answer with one token, as an engine of completions does that is asked for ids."""
        assert self.asked[-1]["return_token_ids"] is True
        name = f"cmpl-{request.headers['X-Request-Id']}"
        choice = {"prompt_token_ids": [7, 8], "token_ids": [9]} | FIRST | self.differs
        return web.json_response(
            NAMES
            | {"id": name, "created": 1, "choices": [choice]}
            | {"kv_transfer_params": {"transfer_id": "n"}, "usage": {"completion_tokens": 1}}
        )

    async def stream_text(self, request: web.Request) -> web.StreamResponse:
        """Answer with three tokens, cut as a network may."""
        name = f"cmpl-{request.headers['X-Request-Id']}"
        prompt = self.asked[-1]["prompt"]
        names = NAMES | {"id": name, "created": 2}
        choices = [SEEN | {"text": text} for text in (" two", " thr\u00e9e", " four")]
        contents = [names | {"choices": [choice]} for choice in choices]
        contents[-1]["choices"][0]["finish_reason"] = "stop"
        given = len(prompt) if isinstance(prompt, list) else 2
        usage = {"prompt_tokens": given, "completion_tokens": 3, "total_tokens": given + 3}
        contents.append(names | {"choices": [], "usage": usage})
        answer = web.StreamResponse()
        answer.content_type = "text/event-stream"
        await answer.prepare(request)
        all_of_it = b"".join(
            b"data: %s\n\n" % json.dumps(content, ensure_ascii=False).encode()
            for content in contents
        )
        for start in range(0, len(all_of_it), 100):
            await answer.write(all_of_it[start : start + 100])
        await answer.write(EVENTS[-1])
        return answer

    async def hang(self, _: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError("nothing sets it")

    async def load(self, request: web.Request) -> web.StreamResponse:
        """Answer with what is of no use to anybody, once all is loaded, and go on until told."""
        answer = web.StreamResponse()
        await answer.prepare(request)
        await self.loaded.wait()
        await answer.write(EVENTS[0])
        return await self.hang(request)

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.status)

    async def models(self, request: web.Request) -> web.Response:
        allowed = request.headers.get("Authorization") == "Bearer x"
        status = self.status if allowed else 401
        return web.json_response({"url": str(request.url)}, status=status)


@asynccontextmanager
async def engine(*, is_prefill: bool) -> AsyncIterator[tuple[FakeEngine, EngineURL]]:
    fake = FakeEngine(is_prefill=is_prefill)
    app = web.Application()
    for path in ("/v1/chat/completions", COMPLETIONS):
        app.router.add_post(path, fake.handle)
    app.router.add_get("/health", fake.health)
    app.router.add_get("/v1/models", fake.models)
    async with TestServer(app, handler_cancellation=True) as server:
        yield fake, EngineURL(f"http://127.0.0.1:{server.port}")


class Site:
    """A proxy before some engines."""

    def __init__(self) -> None:
        self.prefill: list[FakeEngine] = []
        self.decode: list[FakeEngine] = []
        self.client: TestClient[Any, Any]

    async def ask(self, body: object = CHAT, **headers: str) -> tuple[int, bytes]:
        async with self.client.post("/v1/chat/completions", json=body, headers=headers) as answer:
            return answer.status, await answer.read()

    async def complete(self, **changes: object) -> tuple[int, list[dict[str, Any]]]:
        """Return the events of a completion, which must end as it should."""
        async with self.client.post(COMPLETIONS, json=PROMPT | changes) as answer:
            if answer.status != 200:
                return answer.status, [await answer.json()]
            text = await answer.content.readuntil(b"\n\n")
            for fake in self.decode:
                fake.loaded.set()
            text += await answer.read()
        *events, last, nothing = text.split(b"\n\n")
        assert (last, nothing) == (b"data: [DONE]", b"")
        return 200, [json.loads(event.removeprefix(b"data: ")) for event in events]


@asynccontextmanager
async def site(
    prefill: int = 1, decode: int = 1, *, peers: tuple[str, ...] = (), **chosen: Any
) -> AsyncIterator[Site]:
    made = Site()
    async with AsyncExitStack() as stack:
        urls: tuple[list[EngineURL], list[EngineURL]] = ([], [])
        for kind, count in enumerate((prefill, decode)):
            for _ in range(count):
                fake, url = await stack.enter_async_context(engine(is_prefill=not kind))
                (made.decode if kind else made.prefill).append(fake)
                urls[kind].append(url)
        named = [url._replace(peer=peer) for url, peer in zip(urls[0], peers, strict=False)]
        proxy = Proxy(named or urls[0], urls[1], **chosen)
        made.client = await stack.enter_async_context(TestClient(TestServer(proxy.app())))
        yield made
