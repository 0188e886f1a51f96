"""A proxy that spreads requests over prefill and decode engines: `python -m ...pd_proxy`.

    python -m kvstore.connectors.pd_proxy --prefill http://127.0.0.1:8100 \
        --decode http://127.0.0.1:8200 --listen 127.0.0.1:8000

Each request is given to one prefill engine, for its KV and one token that is thrown away, and to
one decode engine, which answers. Both begin at once: the proxy chooses the name of the hand-off,
and the decode engine loads what the prefill engine has stored so far. With `--in-turn` decode
begins when prefill has answered, as with vLLM's own proxies. Engines that fail are left out for
a while; a request that no prefill engine takes is computed by decode alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import secrets
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from kvstore.connectors.pd_pools import (
    EngineError,
    EngineURL,
    Pool,
    decode_body,
    parse_engine,
    prefill_body,
)
from kvstore.errors import ConfigError
from kvstore.limits import (
    PROXY_BODY_MAX_BYTES,
    PROXY_CONNECT_SECONDS,
    PROXY_PROBE_SECONDS,
    PROXY_QUIET_MAX_SECONDS,
)

log = logging.getLogger("kvstore.pd_proxy")

_GENERATING: Final = ("/v1/completions", "/v1/chat/completions")
_PASSED_ON: Final = ("Authorization", "X-Request-Id")
_REFUSED: Final = range(400, 500)


@dataclass(frozen=True, slots=True)
class Begun:
    """An answer of an engine, of which *first* has come."""

    response: aiohttp.ClientResponse
    first: bytes


class RefusedRequest(Exception):  # noqa: N818  # the client's error, not ours
    """An engine refuses what the client asks; the client is told in the engine's words."""

    def __init__(self, status: int, body: bytes, content_type: str) -> None:
        super().__init__(f"an engine answered {status}")
        self.status = status
        self.body = body
        self.content_type = content_type


class Proxy:
    """Serves the OpenAI endpoints that generate. One event loop, any number of requests."""

    def __init__(
        self, prefill: Sequence[EngineURL], decode: Sequence[EngineURL], *, in_turn: bool = False
    ) -> None:
        self._prefill = Pool(prefill)
        self._decode = Pool(decode)
        self._in_turn = in_turn
        self._session: aiohttp.ClientSession | None = None

    def app(self) -> web.Application:
        """Return the application that serves."""
        app = web.Application(client_max_size=PROXY_BODY_MAX_BYTES)
        app.cleanup_ctx.append(self._connected)
        for path in _GENERATING:
            app.router.add_post(path, self._generate)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        return app

    async def _connected(self, _: web.Application) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=PROXY_CONNECT_SECONDS, sock_read=PROXY_QUIET_MAX_SECONDS
        )
        # As many as clients ask for: they are the ones who are limited, by the engines.
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            self._session = session
            yield
        self._session = None

    # --- what clients ask ------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        headers = _passed_on(request)
        headers.setdefault("X-Request-Id", secrets.token_hex(16))
        try:
            body = _parsed(await request.read())
            begun, prefilling = await self._begin(request.path, body, headers)
        except RefusedRequest as refused:
            return web.Response(
                status=refused.status, body=refused.body, content_type=refused.content_type
            )
        except EngineError as error:
            return _error(503, str(error), "no_engine")
        try:
            return await _relay(request, begun)
        finally:
            begun.response.close()
            if prefilling is not None:
                # Its answer is of no use to anybody any more.
                prefilling.cancel()
                await asyncio.gather(prefilling, return_exceptions=True)

    async def _models(self, request: web.Request) -> web.Response:
        headers = _passed_on(request)
        for engine in self._decode.in_order():
            try:
                async with self._http.get(f"{engine.url}/v1/models", headers=headers) as response:
                    content = await response.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                self._decode.rest(engine, error)
                continue
            if response.status == 200 or response.status in _REFUSED:
                return web.Response(
                    status=response.status, body=content, content_type=response.content_type
                )
            self._decode.rest(engine, EngineError(f"it answered {response.status}"))
        return _error(503, "no decode engine answers", "no_engine")

    async def _health(self, _: web.Request) -> web.Response:
        pools = {"prefill": self._prefill.engines, "decode": self._decode.engines}
        found = {
            name: dict(
                zip(
                    (engine.url for engine in engines),
                    await asyncio.gather(*(self._answers(engine) for engine in engines)),
                    strict=True,
                )
            )
            for name, engines in pools.items()
        }
        # Without prefill engines decode engines do all of the work, slower.
        is_able = any(found["decode"].values())
        return web.json_response(
            {"ready": is_able, "engines": found}, status=200 if is_able else 503
        )

    async def _answers(self, engine: EngineURL) -> bool:
        timeout = aiohttp.ClientTimeout(total=PROXY_PROBE_SECONDS)
        try:
            async with self._http.get(f"{engine.url}/health", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    # --- how -------------------------------------------------------------------------------

    async def _begin(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> tuple[Begun, asyncio.Task[Any] | None]:
        """Return the answer of a decode engine, and the prefill that may still be under way."""
        for engine in self._prefill.in_order():
            try:
                if self._in_turn:
                    params = await self._ask_prefill(engine, path, body, headers, None)
                    return await self._ask_decode(path, decode_body(body, params), headers), None
                return await self._begin_both(engine, path, body, headers)
            except PrefillError as error:
                self._prefill.rest(engine, error)
        log.warning("no prefill engine answers, a decode engine computes all")
        return await self._ask_decode(path, decode_body(body, None), headers), None

    async def _begin_both(
        self, engine: EngineURL, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> tuple[Begun, asyncio.Task[Any]]:
        name = f"pd-{secrets.token_hex(16)}"
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": name,
            "remote_host": engine.peer,
            "early": True,
        }
        prefilling = asyncio.ensure_future(self._ask_prefill(engine, path, body, headers, name))
        decoding = asyncio.ensure_future(self._ask_decode(path, decode_body(body, params), headers))
        try:
            await asyncio.wait((prefilling, decoding), return_when=asyncio.FIRST_COMPLETED)
            # Raises if prefill has failed: then decode waits for what never comes. Nor does it
            # if prefill hands nothing over.
            if not decoding.done() and prefilling.result() is None:
                await _give_up(decoding)
                alone = self._ask_decode(path, decode_body(body, None), headers)
                decoding = asyncio.ensure_future(alone)
            return await decoding, prefilling
        except BaseException:
            prefilling.cancel()
            await _give_up(decoding)
            await asyncio.gather(prefilling, return_exceptions=True)
            raise

    async def _ask_prefill(
        self,
        engine: EngineURL,
        path: str,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
        name: str | None,
    ) -> dict[str, Any] | None:
        """Have *engine* compute the prompt; return what decode is to be given."""
        try:
            async with self._http.post(
                engine.url + path, json=prefill_body(body, name), headers=headers
            ) as response:
                content = await response.read()
                if response.status in _REFUSED:
                    raise RefusedRequest(response.status, content, response.content_type)
                if response.status != 200:
                    raise PrefillError(f"{engine.url} answered {response.status}")
                found = json.loads(content).get("kv_transfer_params")
                return found if isinstance(found, dict) else None
        except (aiohttp.ClientError, TimeoutError, ValueError, AttributeError) as error:
            raise PrefillError(f"{engine.url}: {error!r}") from error

    async def _ask_decode(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> Begun:
        """Return the answer of the first decode engine that begins one."""
        failures = []
        for engine in self._decode.in_order():
            try:
                return await self._begin_answer(engine, path, body, headers)
            except (aiohttp.ClientError, TimeoutError, EngineError) as error:
                self._decode.rest(engine, error)
                failures.append(f"{engine.url}: {error!r}")
        raise EngineError(f"no decode engine answers: {'; '.join(failures)}")

    async def _begin_answer(
        self, engine: EngineURL, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> Begun:
        response = await self._http.post(engine.url + path, json=body, headers=headers)
        try:
            if response.status in _REFUSED:
                content = await response.read()
                raise RefusedRequest(response.status, content, response.content_type)
            if response.status != 200:
                raise EngineError(f"{engine.url} answered {response.status}")
            # Headers come at once, and say nothing yet of whether tokens will.
            first = await response.content.readany()
        except BaseException:
            response.close()
            raise
        return Begun(response, first)

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None, "requests come while the application runs"
        return self._session


class PrefillError(EngineError):
    """A prefill engine did not take a request; another one may."""


async def _relay(request: web.Request, begun: Begun) -> web.StreamResponse:
    """Pass an answer on, piece by piece as it comes."""
    answer = web.StreamResponse(status=begun.response.status)
    answer.content_type = begun.response.content_type
    await answer.prepare(request)
    await answer.write(begun.first)
    # An engine that breaks off now ends the client's connection, too: half an answer is none.
    async for piece in begun.response.content.iter_any():
        await answer.write(piece)
    await answer.write_eof()
    return answer


def _passed_on(request: web.Request) -> dict[str, str]:
    return {name: request.headers[name] for name in _PASSED_ON if name in request.headers}


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        content = json.dumps(_words("the body is no JSON object", "invalid_request_error"))
        raise RefusedRequest(400, content.encode(), "application/json")
    return body


async def _give_up(decoding: asyncio.Future[Begun]) -> None:
    decoding.cancel()
    await asyncio.gather(decoding, return_exceptions=True)
    if not decoding.cancelled() and decoding.exception() is None:
        decoding.result().response.close()


def _words(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind}}


def _error(status: int, message: str, kind: str) -> web.Response:
    return web.json_response(_words(message, kind), status=status)


def _address(text: str) -> tuple[str, int]:
    """Return host and port of *text*, as in `127.0.0.1:8000`."""
    parts = urlsplit(f"//{text}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT")
    return parts.hostname, port


def _engine(text: str) -> EngineURL:
    try:
        return parse_engine(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(words: Sequence[str] | None = None) -> int:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(
        prog="python -m kvstore.connectors.pd_proxy",
        description="Spread requests over prefill and decode engines.",
    )
    text = "a prefill engine; URL#NAME where its daemon is the peer NAME of the decode side's"
    parser.add_argument(
        "--prefill", type=_engine, nargs="+", required=True, metavar="URL", help=text
    )
    parser.add_argument(
        "--decode", type=_engine, nargs="+", required=True, metavar="URL", help="a decode engine"
    )
    parser.add_argument("--listen", type=_address, default=("127.0.0.1", 8000), metavar="HOST:PORT")
    parser.add_argument(
        "--in-turn", action="store_true", help="decode begins when prefill has answered"
    )
    chosen = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    host, port = chosen.listen
    proxy = Proxy(chosen.prefill, chosen.decode, in_turn=chosen.in_turn)
    web.run_app(proxy.app(), host=host, port=port, handler_cancellation=True, print=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
