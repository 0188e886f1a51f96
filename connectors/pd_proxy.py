"""A proxy that spreads requests over prefill and decode engines: `python -m ...pd_proxy`.

    python -m kvstore.connectors.pd_proxy --prefill http://127.0.0.1:8100 \
        --decode http://127.0.0.1:8200 --listen 127.0.0.1:8000

Each request is given to one prefill engine, for its KV and the first token, and to one decode
engine, which answers. Both begin at once: the proxy chooses the name of the hand-off, and the
decode engine loads what the prefill engine has stored so far. With `--in-turn` decode begins when
prefill has answered, as with vLLM's own proxies. Where that changes nothing but the time, the
client reads the first token as soon as prefill has it. Engines that fail are left out for a
while; a request that no prefill engine takes is computed by decode alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from kvstore.connectors.pd_answers import Ahead, Begun, PrefillError, RefusedRequest, give_up
from kvstore.connectors.pd_first import FirstToken, first_token, may_split, with_seed
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
    PROXY_PREFILL_SECONDS,
    PROXY_PROBE_SECONDS,
    PROXY_QUIET_MAX_SECONDS,
    PROXY_REQUESTS_MAX,
)

log = logging.getLogger("kvstore.pd_proxy")

_GENERATING: Final = ("/v1/completions", "/v1/chat/completions")
_PASSED_ON: Final = ("Authorization", "X-Request-Id")
_REFUSED: Final = range(400, 500)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asks. If it *may_split*, the first token may be prefill's."""

    path: str
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    may_split: bool


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What prefill answers: what decode is to be given, and a token that can be shown."""

    params: dict[str, Any] | None
    token: FirstToken | None


class Proxy:
    """Serves the OpenAI endpoints that generate. One event loop, any number of requests."""

    def __init__(
        self,
        prefill: Sequence[EngineURL],
        decode: Sequence[EngineURL],
        *,
        in_turn: bool = False,
        prefill_seconds: float = PROXY_PREFILL_SECONDS,
        requests_max: int = PROXY_REQUESTS_MAX,
    ) -> None:
        """Give up a prefill after *prefill_seconds*; answer at most *requests_max* at a time."""
        self._prefill = Pool(prefill)
        self._decode = Pool(decode)
        self._in_turn = in_turn
        self._prefill_timeout = aiohttp.ClientTimeout(
            total=prefill_seconds, sock_connect=PROXY_CONNECT_SECONDS
        )
        self._requests_max = requests_max
        self._requests = 0
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
        # Clients are limited, and need two of them each.
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            self._session = session
            yield
        self._session = None

    # --- what clients ask ------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if self._requests >= self._requests_max:
            message = f"{self._requests} requests are being answered, no more at a time"
            return _error(503, message, "overloaded", {"Retry-After": "1"})
        self._requests += 1
        try:
            return await self._answer(request)
        except RefusedRequest as refused:
            return web.Response(
                status=refused.status, body=refused.body, content_type=refused.content_type
            )
        finally:
            self._requests -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        headers = _passed_on(request)
        headers.setdefault("X-Request-Id", secrets.token_hex(16))
        body = _parsed(await request.read())
        splits = may_split(request.path, body)
        asked = Asked(request.path, with_seed(body) if splits else body, headers, splits)
        try:
            begun, prefilling = await self._begin(asked)
        except EngineError as error:
            return _error(503, str(error), "no_engine")
        try:
            return await begun.relay(request)
        finally:
            await begun.end()
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

    async def _begin(self, asked: Asked) -> tuple[Begun | Ahead, asyncio.Task[Any] | None]:
        """Return the answer as it begins, and the prefill that may still be under way."""
        for engine in self._prefill.in_order():
            try:
                if self._in_turn:
                    return await self._begin_in_turn(engine, asked), None
                return await self._begin_both(engine, asked)
            except PrefillError as error:
                self._prefill.rest(engine, error, is_silent=error.is_silent)
        log.warning("no prefill engine answers, a decode engine computes all")
        return await self._ask_decode(asked, decode_body(asked.body, None)), None

    async def _begin_in_turn(self, engine: EngineURL, asked: Asked) -> Begun | Ahead:
        done = await self._ask_prefill(engine, asked, None)
        if done.token is None:
            return await self._ask_decode(asked, decode_body(asked.body, done.params))
        accepted = asyncio.get_running_loop().create_future()
        body = decode_body(done.token.rest_of(asked.body), done.params)
        rest = asyncio.ensure_future(self._ask_decode(asked, body, accepted))
        try:
            await asyncio.wait((rest, accepted), return_when=asyncio.FIRST_COMPLETED)
            if rest.done():
                rest.result()  # raises what no decode engine accepts
        except RefusedRequest:
            # With this token the context may be full: what it says of the prompt alone, counts.
            return await self._ask_decode(asked, decode_body(asked.body, done.params))
        except BaseException:
            await give_up(rest)
            raise
        return Ahead(asked.body, done.token, rest)

    async def _begin_both(
        self, engine: EngineURL, asked: Asked
    ) -> tuple[Begun | Ahead, asyncio.Task[Any]]:
        name = f"pd-{secrets.token_hex(16)}"
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": name,
            "remote_host": engine.peer,
            "early": True,
        }
        accepted = asyncio.get_running_loop().create_future()
        prefilling = asyncio.ensure_future(self._ask_prefill(engine, asked, name))
        decoding = asyncio.ensure_future(
            self._ask_decode(asked, decode_body(asked.body, params), accepted)
        )
        try:
            await asyncio.wait((prefilling, decoding), return_when=asyncio.FIRST_COMPLETED)
            if decoding.done():
                return decoding.result(), prefilling
            # Raises if prefill has failed: then decode waits for what never comes.
            done = prefilling.result()
            if done.params is None:
                # Nor does it come if prefill hands nothing over.
                await give_up(decoding)
                alone = self._ask_decode(asked, decode_body(asked.body, None))
                decoding = asyncio.ensure_future(alone)
            elif done.token is not None:
                # What decode refuses, such as more tokens than fit, the client must hear first.
                await asyncio.wait((accepted, decoding), return_when=asyncio.FIRST_COMPLETED)
                if not decoding.done():
                    rest = self._go_on(asked, done.token, decoding)
                    ahead = Ahead(asked.body, done.token, asyncio.ensure_future(rest))
                    return ahead, prefilling
            return await decoding, prefilling
        except BaseException:
            prefilling.cancel()
            await give_up(decoding)
            await asyncio.gather(prefilling, return_exceptions=True)
            raise

    async def _go_on(
        self, asked: Asked, token: FirstToken, loading: asyncio.Future[Begun]
    ) -> Begun:
        """Return the answer behind *token*, of the engine that has by then loaded the KV for it.

        That engine has a token of its own, which nobody needs.
        """
        loaded = await loading
        await loaded.end()
        body = decode_body(token.rest_of(asked.body), None)
        # The other request of this name may not have ended yet.
        headers = dict(asked.headers)
        headers["X-Request-Id"] += "-rest"
        return await self._ask_decode(replace(asked, headers=headers), body, at=loaded.engine)

    async def _ask_prefill(self, engine: EngineURL, asked: Asked, name: str | None) -> Prefilled:
        """Have *engine* compute the prompt, and hand it over as *name* if that is given."""
        body = prefill_body(asked.body, name)
        if asked.may_split:
            body["return_token_ids"] = True
        try:
            async with self._http.post(
                engine.url + asked.path,
                json=body,
                headers=asked.headers,
                timeout=self._prefill_timeout,
            ) as response:
                content = await response.read()
                if response.status in _REFUSED:
                    raise RefusedRequest(response.status, content, response.content_type)
                if response.status != 200:
                    raise PrefillError(f"{engine.url} answered {response.status}")
                found = json.loads(content)
                params = found.get("kv_transfer_params")
        except TimeoutError as error:
            raise PrefillError(f"{engine.url} says nothing", is_silent=True) from error
        except (aiohttp.ClientError, ValueError, AttributeError) as error:
            raise PrefillError(f"{engine.url}: {error!r}") from error
        token = first_token(found) if asked.may_split else None
        return Prefilled(params if isinstance(params, dict) else None, token)

    async def _ask_decode(
        self,
        asked: Asked,
        body: Mapping[str, Any],
        accepted: asyncio.Future[None] | None = None,
        *,
        at: EngineURL | None = None,
    ) -> Begun:
        """Return the answer of the first decode engine that begins one; *at* is asked first.

        *accepted* is done once an engine has begun to compute it.
        """
        failures = []
        for engine in sorted(self._decode.in_order(), key=lambda engine: engine != at):
            try:
                return await self._begin_answer(engine, asked, body, accepted)
            except (aiohttp.ClientError, TimeoutError, EngineError) as error:
                self._decode.rest(engine, error)
                failures.append(f"{engine.url}: {error!r}")
        raise EngineError(f"no decode engine answers: {'; '.join(failures)}")

    async def _begin_answer(
        self,
        engine: EngineURL,
        asked: Asked,
        body: Mapping[str, Any],
        accepted: asyncio.Future[None] | None,
    ) -> Begun:
        url = engine.url + asked.path
        response = await self._http.post(url, json=body, headers=asked.headers)
        try:
            if response.status in _REFUSED:
                content = await response.read()
                raise RefusedRequest(response.status, content, response.content_type)
            if response.status != 200:
                raise EngineError(f"{engine.url} answered {response.status}")
            if accepted is not None and not accepted.done():
                accepted.set_result(None)
            # Headers come at once, and say nothing yet of whether tokens will.
            first = await response.content.readany()
        except BaseException:
            response.close()
            raise
        return Begun(engine, response, first)

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None, "requests come while the application runs"
        return self._session


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


def _words(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind}}


def _error(
    status: int, message: str, kind: str, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.json_response(_words(message, kind), status=status, headers=headers)


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


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        number = kind(text)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
        return number

    return read


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
    parser.add_argument(
        "--prefill-timeout",
        type=_positive(float),
        default=PROXY_PREFILL_SECONDS,
        metavar="SECONDS",
        help="an engine that has not prefilled a prompt by then is left out (%(default)s)",
    )
    parser.add_argument(
        "--requests-max",
        type=_positive(int),
        default=PROXY_REQUESTS_MAX,
        metavar="N",
        help="answered at a time; what comes on top is refused (%(default)s)",
    )
    chosen = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    host, port = chosen.listen
    proxy = Proxy(
        chosen.prefill,
        chosen.decode,
        in_turn=chosen.in_turn,
        prefill_seconds=chosen.prefill_timeout,
        requests_max=chosen.requests_max,
    )
    web.run_app(proxy.app(), host=host, port=port, handler_cancellation=True, print=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
