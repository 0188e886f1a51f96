"""The admin API's own server: where it listens, with which guards, and what it does by itself."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
import time
from typing import TYPE_CHECKING, Final, NoReturn

from aiohttp import web
from aiohttp.typedefs import Handler

from kvstore.admin.actions import Actions
from kvstore.admin.explaining import Explaining
from kvstore.admin.gate import Gate
from kvstore.admin.handshakes import accept_tls
from kvstore.admin.openapi import document, served_path
from kvstore.admin.routes import JSON, Call, Route, Text
from kvstore.admin.status import Observer
from kvstore.admin.tracing import Traces
from kvstore.admin.views import Views
from kvstore.errors import ConfigError
from kvstore.limits import (
    ADMIN_CONNECTION_IDLE_SECONDS,
    ADMIN_CONNECTIONS_MAX,
    ADMIN_FIRST_REQUEST_SECONDS,
    ADMIN_HISTORY_SECONDS,
    ADMIN_RETRY_SECONDS,
    ADMIN_SILENT_MAX,
    REUSE_BATCH,
    REUSE_PAUSE_SECONDS,
)

if TYPE_CHECKING:
    from kvstore.admin.exposure import Exposure
    from kvstore.admin.subject import Subject
    from kvstore.config import AdminConfig
    from kvstore.settings import ListenAddress

log = logging.getLogger(__name__)

_HEADER_MAX_BYTES: Final = 8190
_SHUTDOWN_SECONDS: Final = 0.2
_LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")


class Admin:
    """Serves the admin API of *subject* as *config* says, to whom *exposure* lets in."""

    def __init__(self, config: AdminConfig, exposure: Exposure, subject: Subject) -> None:
        assert config.listen is not None, "an admin API has an address"
        self._address: ListenAddress = config.listen
        self._exposure = exposure
        self._subject = subject
        hosts = {config.listen.host, *config.allowed_hosts, *_LOCAL_NAMES}
        if not exposure.is_local:
            hosts |= {socket.gethostname(), socket.getfqdn()}
        self._gate = Gate(exposure, hosts)
        self._observer = Observer(subject)
        self._routes = [
            *Views(subject, self._observer).routes(),
            *Explaining(subject).routes(),
            *Actions(subject).routes(),
            *Traces(subject.tracing).routes(),
        ]
        self._routes.append(self._description())
        # Connections on which nothing has been asked yet, and when that is too long.
        self._silent: dict[web.RequestHandler, asyncio.TimerHandle] = {}
        self.port = 0

    async def run(self) -> None:
        """Serve until cancelled. An address that is taken is tried again until it is free."""
        runner = web.AppRunner(
            self._app(),
            access_log=None,
            keepalive_timeout=ADMIN_CONNECTION_IDLE_SECONDS,
            max_line_size=_HEADER_MAX_BYTES,
            max_field_size=_HEADER_MAX_BYTES,
            lingering_time=0.0,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        await runner.setup()
        try:
            listening = await self._listen()
            server = runner.server
            assert server is not None, "the runner is set up"
            await self._accept(server, listening)
        finally:
            await runner.cleanup()

    async def _observe(self) -> NoReturn:
        """Look at the daemon from time to time, and do what look-ups have left to be done."""
        reuse, due = self._subject.store.reuse, 0.0
        reuse.is_on = True
        try:
            while True:
                now = time.monotonic()
                if now >= due:
                    self._observer.sample()
                    due = now + ADMIN_HISTORY_SECONDS
                reuse.work(REUSE_BATCH)
                await asyncio.sleep(REUSE_PAUSE_SECONDS)
        finally:
            reuse.is_on = False

    def _app(self) -> web.Application:
        @web.middleware
        async def hear(request: web.Request, handler: Handler) -> web.StreamResponse:
            """Note that a connection has asked something."""
            timer = self._silent.pop(request.protocol, None)
            if timer is not None:
                timer.cancel()
            return await handler(request)

        app = web.Application(middlewares=[hear, self._gate.middleware()])
        app.on_response_prepare.append(_hide_server)
        for route in self._routes:
            app.router.add_route(route.method, served_path(route.path), self._gate.serve(route))
        return app

    async def _accept(self, server: web.Server, listening: socket.socket) -> None:
        """Take connections, as many as there may be; those that stay silent are closed."""
        loop = asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            is_full = len(server.connections) >= ADMIN_CONNECTIONS_MAX
            if is_full or len(self._silent) >= ADMIN_SILENT_MAX:
                return _Refused()
            handler = server()
            self._silent[handler] = loop.call_later(
                ADMIN_FIRST_REQUEST_SECONDS, self._close_silent, handler
            )
            return handler

        tls = self._exposure.tls
        self.port = listening.getsockname()[1]
        where = str(self._address._replace(port=self.port))
        log.info("admin API is served", extra={"address": where, "tls": tls is not None})
        if tls is not None:
            with contextlib.closing(listening):
                async with asyncio.TaskGroup() as group:
                    group.create_task(accept_tls(listening, tls, connection), name="admin TLS")
                    await self._observe()
        else:
            listener = await loop.create_server(connection, sock=listening)
            try:
                await self._observe()
            finally:
                # Its connections are the runner's to end: waiting for them would be for ever.
                listener.close()

    def _close_silent(self, handler: web.RequestHandler) -> None:
        del self._silent[handler]
        if handler.transport is not None:
            handler.transport.abort()

    async def _listen(self) -> socket.socket:
        """Return a bound socket; raises `ConfigError` when there can be none."""
        told = False
        while True:
            try:
                return await asyncio.to_thread(_bind, self._address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ConfigError(
                        f"admin.listen {self._address}: {error.strerror or error}"
                    ) from None
            if not told:
                log.warning(
                    "admin API waits for its address, which is taken",
                    extra={"address": str(self._address)},
                )
                told = True
            await asyncio.sleep(ADMIN_RETRY_SECONDS)

    def _description(self) -> Route:
        async def describe(call: Call) -> Text:
            del call
            return text

        route = Route(
            *("GET", "/openapi.json", "openapi", "This description"), describe, "application/json"
        )
        body = document([*self._routes, route], needs_token=not self._exposure.reads_are_open)
        text = Text(json.dumps(body).encode(), JSON)
        return route


async def _hide_server(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Leave out which versions of what answer."""
    del request
    response.headers.pop("Server", None)


class _Refused(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it."""
        transport.close()


def _bind(address: ListenAddress) -> socket.socket:
    found = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, protocol, _, where = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(ADMIN_CONNECTIONS_MAX)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening
