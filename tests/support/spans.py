"""A receiver of OTLP over HTTP in a thread, which keeps the spans that come."""

from __future__ import annotations

import asyncio
import threading
from typing import NamedTuple, Self

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.waiting import DEADLINE_SECONDS


class Received(NamedTuple):
    """One span, as it came over the wire."""

    name: str
    trace: str
    span: str
    parent: str
    began_ns: int
    ended_ns: int
    fields: dict[str, object]
    error: str


class SpanReceiver:
    """Listens at a port of its own. *headers* are those of the last request."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.headers: dict[str, str] = {}
        self.endpoint = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        self._on_loop(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._on_loop(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_SECONDS)
        self._loop.close()

    def named(self, name: str) -> list[Received]:
        return [span for span in self.spans if span.name == name]

    def _on_loop(self, work) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_SECONDS)

    async def _listen(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port = self._runner.addresses[0][1]
        self.endpoint = f"http://127.0.0.1:{port}/v1/traces"

    async def _take(self, request: web.Request) -> web.Response:
        self.headers = dict(request.headers)
        told = ExportTraceServiceRequest.FromString(await request.read())
        for resource in told.resource_spans:
            for scope in resource.scope_spans:
                self.spans += [_received(span) for span in scope.spans]
        return web.Response(content_type="application/x-protobuf")


def _received(span) -> Received:
    values = {one.key: one.value for one in span.attributes}
    return Received(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()},
        span.status.message,
    )
