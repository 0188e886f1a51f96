"""Answers of engines on their way through the proxy to a client."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
from aiohttp import web

from kvstore.connectors.pd_first import Events, FirstToken
from kvstore.connectors.pd_pools import EngineError, EngineURL


class PrefillError(EngineError):
    """A prefill engine did not take a request; another one may."""

    def __init__(self, message: str, *, is_silent: bool = False) -> None:
        super().__init__(message)
        self.is_silent = is_silent


class RefusedRequest(Exception):  # noqa: N818  # the client's error, not ours
    """An engine refuses what the client asks; the client is told in the engine's words."""

    def __init__(self, status: int, body: bytes, content_type: str) -> None:
        super().__init__(f"an engine answered {status}")
        self.status = status
        self.body = body
        self.content_type = content_type


@dataclass(frozen=True, slots=True)
class Begun:
    """An answer of *engine*, of which *first* has come."""

    engine: EngineURL
    response: aiohttp.ClientResponse
    first: bytes

    async def relay(self, request: web.Request) -> web.StreamResponse:
        """Pass the answer on, piece by piece as it comes."""
        answer = web.StreamResponse(status=self.response.status)
        answer.content_type = self.response.content_type
        await answer.prepare(request)
        await answer.write(self.first)
        # An engine that breaks off now ends the client's connection, too: half an answer is none.
        async for piece in self.response.content.iter_any():
            await answer.write(piece)
        await answer.write_eof()
        return answer

    async def end(self) -> None:
        """Let the engine know that nobody reads any more; idempotent."""
        self.response.close()


@dataclass(frozen=True, slots=True)
class Ahead:
    """An answer to *body* whose first token has come from prefill. Decode gives the *rest*."""

    body: Mapping[str, Any]
    token: FirstToken
    rest: asyncio.Future[Begun]

    async def relay(self, request: web.Request) -> web.StreamResponse:
        """Pass the token on at once, and the rest event by event as it comes."""
        answer = web.StreamResponse()
        answer.content_type = "text/event-stream"
        await answer.prepare(request)
        await answer.write(self.token.event())
        try:
            begun = await self.rest
        except RefusedRequest as error:
            if error.status != HTTPStatus.BAD_REQUEST:
                # Half of the answer is with the client: nothing else can be said any more.
                raise EngineError(f"the rest of an answer: {error}") from error
            # The prompt alone it has accepted: with this token, the model's context is full.
            await answer.write(self.token.end(self.body))
            await answer.write_eof()
            return answer
        events = Events()
        await answer.write(self._rewritten(events, begun.first))
        async for piece in begun.response.content.iter_any():
            await answer.write(self._rewritten(events, piece))
        await answer.write_eof()
        return answer

    def _rewritten(self, events: Events, piece: bytes) -> bytes:
        return b"".join(self.token.rewritten(event) for event in events.of(piece))

    async def end(self) -> None:
        """Let the engine know that nobody reads any more; idempotent."""
        await give_up(self.rest)


async def give_up(begins: asyncio.Future[Begun]) -> None:
    """Ask for an answer no more, whether it has begun or not."""
    begins.cancel()
    await asyncio.gather(begins, return_exceptions=True)
    if not begins.cancelled() and begins.exception() is None:
        await begins.result().end()
