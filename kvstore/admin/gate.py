"""What every request passes before anything acts on it, and every answer on its way out.

In this order: the name by which we were asked for, the rate of requests, the token, its scope.
Writes are logged with the token's line, whatever became of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from kvstore.admin.auth import Grant, Pace, Scope
from kvstore.admin.routes import JSON, Call, Refusal, Route, problem, reply
from kvstore.errors import (
    ConfigError,
    KVStoreError,
    LimitError,
    ManifestError,
    NoSpaceError,
    RequestError,
)
from kvstore.limits import (
    ADMIN_BODY_SECONDS,
    ADMIN_FAILURES_BURST,
    ADMIN_FAILURES_PER_SECOND,
    ADMIN_REQUESTS_BURST,
    ADMIN_REQUESTS_PER_SECOND,
)

if TYPE_CHECKING:
    from kvstore.admin.exposure import Exposure

log = logging.getLogger(__name__)
audit = logging.getLogger("kvstore.audit")

Answering = Callable[[web.Request], Awaitable[web.StreamResponse]]

_STATUSES: Final[tuple[tuple[type[KVStoreError], int], ...]] = (
    (RequestError, 400),
    (ManifestError, 400),
    (ConfigError, 409),
    (LimitError, 429),
    (NoSpaceError, 409),
)
SECURITY_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_CHALLENGE: Final = {"WWW-Authenticate": 'Bearer realm="kvstore"'}
_BEARER: Final = "bearer "


class Gate:
    """Judges requests by *exposure*, and by the names of *hosts* that are ours."""

    def __init__(
        self,
        exposure: Exposure,
        hosts: Iterable[str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exposure = exposure
        self._hosts = frozenset(host.lower() for host in hosts)
        self._pace = Pace(ADMIN_REQUESTS_PER_SECOND, ADMIN_REQUESTS_BURST, clock)
        self._failures = Pace(ADMIN_FAILURES_PER_SECOND, ADMIN_FAILURES_BURST, clock)

    def serve(self, route: Route) -> Answering:
        """Return what answers the requests of *route*."""

        async def answer(request: web.Request) -> web.StreamResponse:
            grant = self._judge(request, route.scope)
            try:
                response = reply(await route.handler(await _call(request, route)))
            except Refusal as refusal:
                response = problem(refusal.status, refusal.detail, refusal.headers)
            except KVStoreError as error:
                response = problem(_status_of(error), self._told(error))
            if route.is_write:
                _note(request, route, grant, response.status)
            return response

        return answer

    def middleware(self) -> Middleware:
        """Return what stands before all routes, and before requests for none."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                response = await self._guarded(request, handler)
            except web.HTTPException as error:
                response = _as_problem(error)
            except Exception:
                log.exception("admin request failed", extra={"path": request.path[:128]})
                response = problem(500, "the daemon's log says why")
            response.headers.update(SECURITY_HEADERS)
            return response

        return guard

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not self._is_for_us(request):
            return problem(421, "the Host header names another host (admin.allowed_hosts)")
        if not self._pace.take(request.remote or ""):
            return problem(429, "too many requests from this address", {"Retry-After": "1"})
        try:
            return await handler(request)
        except Refusal as refusal:
            return problem(refusal.status, refusal.detail, refusal.headers)

    def _is_for_us(self, request: web.Request) -> bool:
        """Return whether the Host header names this daemon: a page elsewhere cannot fake it."""
        name = request.headers.get("Host", "").lower()
        host = name[: name.rfind("]") + 1] if name.startswith("[") else name.partition(":")[0]
        return host.strip("[]") in self._hosts

    def _judge(self, request: web.Request, needed: Scope) -> Grant | None:
        """Return the token's grant, None where none is needed; raises `Refusal`."""
        header, address = request.headers.get("Authorization"), request.remote or ""
        if header is None:
            if needed is Scope.READ and self._exposure.reads_are_open:
                return None
            if not len(self._exposure.tokens):
                raise Refusal(403, "no tokens are configured (admin.token_file)")
            raise Refusal(401, "send Authorization: Bearer and a token", _CHALLENGE)
        if not self._failures.allows(address):
            raise Refusal(429, "too many wrong tokens from this address", {"Retry-After": "10"})
        token = header[len(_BEARER) :] if header[: len(_BEARER)].lower() == _BEARER else ""
        grant = self._exposure.tokens.judge(token.strip())
        if grant is None:
            self._failures.take(address)
            audit.warning("token refused", extra={"address": address, "path": request.path[:128]})
            raise Refusal(401, "the token is not known here", _CHALLENGE)
        if grant.scope < needed:
            raise Refusal(403, f"the token has no scope {needed.name.lower()}")
        return grant

    def _told(self, error: KVStoreError) -> str:
        """Return what is said of *error*: from afar nothing that names a path."""
        if self._exposure.is_local or not isinstance(error, ConfigError):
            return str(error)
        return "the daemon's log says why"


async def _call(request: web.Request, route: Route) -> Call:
    known = {parameter.name for parameter in route.parameters if parameter.place == "query"}
    unknown = sorted(set(request.query) - known)
    if unknown:
        raise Refusal(400, f"unknown parameter {unknown[0][:64]!r}")
    body: object = None
    if route.asked is not None:
        if request.content_type != JSON:
            raise Refusal(415, f"the body must be {JSON}")
        body = _decode(await _read(request, route.body_max_bytes), route.asked)
    return Call(dict(request.match_info), dict(request.query), body)


async def _read(request: web.Request, most_bytes: int) -> bytes:
    if (request.content_length or 0) > most_bytes:
        raise Refusal(413, f"a body has at most {most_bytes} bytes here")
    parts = bytearray()
    try:
        async with asyncio.timeout(ADMIN_BODY_SECONDS):
            async for part in request.content.iter_any():
                parts += part
                if len(parts) > most_bytes:
                    raise Refusal(413, f"a body has at most {most_bytes} bytes here")
    except TimeoutError:
        raise Refusal(408, f"the body took longer than {ADMIN_BODY_SECONDS} s") from None
    return bytes(parts)


def _decode(body: bytes, kind: type[msgspec.Struct]) -> object:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, str(error)) from None


def _status_of(error: KVStoreError) -> int:
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def _as_problem(error: web.HTTPException) -> web.StreamResponse:
    if error.status == 404:
        return problem(404, "there is no such resource; see /openapi.json")
    if error.status == 405:
        allowed = error.headers.get("Allow", "")
        return problem(405, f"allowed here: {allowed}", {"Allow": allowed})
    return problem(400 if error.status < 500 else 500, error.reason)


def _note(request: web.Request, route: Route, grant: Grant | None, status: int) -> None:
    audit.info(
        "admin call",
        extra={
            "call": route.name,
            "path": request.path[:128],
            "address": request.remote or "",
            "token_line": 0 if grant is None else grant.line,
            "scope": "none" if grant is None else grant.scope.name.lower(),
            "status": status,
        },
    )
