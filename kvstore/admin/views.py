"""What the admin API shows. Reads only; every list has pages, every page an end."""

from __future__ import annotations

from importlib import resources
from itertools import islice
from typing import TYPE_CHECKING, Final, Literal

from kvstore.admin import schema
from kvstore.admin.curves import curves
from kvstore.admin.exposition import Exposition
from kvstore.admin.naming import digest_of, namespace_of, tenant_shares, tier_names
from kvstore.admin.readiness import Probe
from kvstore.admin.routes import Call, Parameter, Refusal, Route, Text, Unready, whole
from kvstore.config import plain
from kvstore.limits import ADMIN_PAGE_MAX, ADMIN_SCAN_MAX
from kvstore.types import NO_SLOT, TierKind

if TYPE_CHECKING:
    from kvstore.admin.status import Observer
    from kvstore.admin.subject import Subject
    from kvstore.store.index import Index
    from kvstore.store.namespace import Namespace

_PAGE: Final = 100
_CURSOR_MAX: Final = 2**53 - 1
_LIMIT: Final = Parameter(
    "limit",
    {"type": "integer", "minimum": 0, "maximum": ADMIN_PAGE_MAX},
    f"how many at most; {_PAGE} when left out",
)
_CURSOR: Final = Parameter(
    "cursor",
    {"type": "integer", "minimum": 0, "maximum": _CURSOR_MAX},
    "`next` of the page before",
)
_NAMESPACE: Final = Parameter(
    "namespace", {"type": "string", "pattern": "^[0-9a-f]{32}$"}, "its id", "path"
)
_DIGEST: Final = Parameter(
    "digest", {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "its digest", "path"
)
_PAGES: Final = {
    "/": ("dashboard.html", "text/html; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
}


class Views:
    """The routes that show something."""

    def __init__(self, subject: Subject, observer: Observer) -> None:
        self._subject = subject
        self._store = subject.store
        self._observer = observer
        self._exposition = Exposition(subject)
        self._probe = Probe(subject.socket)

    def routes(self) -> list[Route]:
        """Return all of them."""
        plain_text = "text/plain"
        return [
            Route("GET", "/livez", "livez", "Whether it is alive", self._livez, schema.Health),
            Route(
                *("GET", "/readyz", "readyz", "Whether engines can be served, tried out"),
                self._readyz,
                schema.Readiness,
                unready=True,
            ),
            Route("GET", "/metrics", "metrics", "For Prometheus", self._metrics, plain_text),
            Route("GET", "/v1/status", "status", "All at one look", self._status, schema.Status),
            Route("GET", "/v1/history", "history", "The last hour", self._history, schema.History),
            Route("GET", "/v1/tiers", "tiers", "All tiers", self._tiers, schema.Tiers),
            Route(
                *("GET", "/v1/namespaces", "namespaces", "All namespaces, in pages"),
                self._namespaces,
                schema.Namespaces,
                parameters=(_LIMIT, _CURSOR),
            ),
            Route(
                *("GET", "/v1/namespaces/{namespace}", "namespace", "One namespace"),
                self._namespace,
                schema.NamespaceShown,
                parameters=(_NAMESPACE,),
                problems=(404,),
            ),
            Route("GET", "/v1/tenants", "tenants", "All tenants", self._tenants, schema.Tenants),
            Route(
                *("GET", "/v1/reuse", "reuse", "How much more memory would help"),
                self._reuse,
                schema.Curves,
            ),
            *self._chunk_routes(),
            Route(
                *("GET", "/v1/events", "events", "What happened lately, oldest first"),
                self._events,
                schema.EventPage,
                parameters=(
                    _LIMIT,
                    Parameter("after", _CURSOR.schema, "only those behind this id"),
                ),
            ),
            Route(
                *("GET", "/v1/config", "config", "The settings that hold"),
                self._config,
                schema.ConfigShown,
            ),
            *self._page_routes(),
        ]

    def _chunk_routes(self) -> list[Route]:
        words = [kind.name.lower() for kind in TierKind]
        return [
            Route(
                *("GET", "/v1/chunks", "chunks", "Chunks that are kept, in pages"),
                self._chunks,
                schema.Chunks,
                parameters=(
                    _LIMIT,
                    _CURSOR,
                    Parameter("namespace", _NAMESPACE.schema, "only those of this namespace"),
                    Parameter("tier", {"enum": words}, "only those in this tier"),
                ),
                problems=(404,),
            ),
            Route(
                *("GET", "/v1/chunks/{namespace}/{digest}", "chunk", "One chunk"),
                self._chunk,
                schema.Chunk,
                parameters=(_NAMESPACE, _DIGEST),
                problems=(404,),
            ),
        ]

    def _page_routes(self) -> list[Route]:
        """Return the dashboard's files, as far as they are installed."""
        folder = resources.files("kvstore.admin")
        routes = []
        for path, (name, media_type) in _PAGES.items():
            if (folder / name).is_file():
                text = Text((folder / name).read_bytes(), media_type)
                routes.append(_page_route(path, name, text))
        return routes

    # --- health -------------------------------------------------------------------------

    async def _livez(self, call: Call) -> schema.Health:
        del call
        return schema.Health()

    async def _readyz(self, call: Call) -> object:
        del call
        draining = self._observer.status().state == "draining"
        readiness = await self._probe.readiness(draining=draining)
        return readiness if readiness.status == "ready" else Unready(readiness)

    async def _metrics(self, call: Call) -> Text:
        del call
        return self._exposition.text()

    # --- lists --------------------------------------------------------------------------

    async def _status(self, call: Call) -> schema.Status:
        del call
        return self._observer.status()

    async def _history(self, call: Call) -> schema.History:
        del call
        return self._observer.history()

    async def _tiers(self, call: Call) -> schema.Tiers:
        del call
        status = self._observer.status()
        return schema.Tiers(tiers=status.tiers, flows=status.flows)

    async def _tenants(self, call: Call) -> schema.Tenants:
        del call
        return schema.Tenants(tenants=tenant_shares(self._store))

    async def _reuse(self, call: Call) -> schema.Curves:
        del call
        return schema.Curves(curves=list(curves(self._store)))

    async def _namespaces(self, call: Call) -> schema.Namespaces:
        limit = whole(call.query, "limit", _PAGE, ADMIN_PAGE_MAX)
        cursor = whole(call.query, "cursor", 0, _CURSOR_MAX)
        spaces = self._store.index.namespaces
        page = list(islice(spaces, cursor, cursor + limit))
        following = cursor + len(page)
        return schema.Namespaces(
            namespaces=[_shown(space) for space in page if not space.is_unused],
            next=following if page and following < len(spaces) else None,
        )

    async def _namespace(self, call: Call) -> schema.NamespaceShown:
        return _shown(namespace_of(self._store, call.path["namespace"]))

    async def _chunks(self, call: Call) -> schema.Chunks:
        """Look at a bounded number of places of the index, whoever is there."""
        limit = whole(call.query, "limit", _PAGE, ADMIN_PAGE_MAX)
        cursor = whole(call.query, "cursor", 0, _CURSOR_MAX)
        wanted, tiers = self._chunks_wanted(call)
        found: list[schema.Chunk] = []
        index = self._store.index
        slot, end = cursor, cursor + ADMIN_SCAN_MAX
        try:
            while slot < end and len(found) < limit:
                is_wanted = wanted is None or wanted is index.space_of(slot)
                # Where no chunk is, there is none in any tier.
                if is_wanted and index.tiers_of(slot) & tiers:
                    found.append(self._chunk_at(slot))
                slot += 1
        except IndexError:
            return schema.Chunks(chunks=found, next=None)
        return schema.Chunks(chunks=found, next=slot)

    def _chunks_wanted(self, call: Call) -> tuple[Namespace | None, int]:
        name, tier = call.query.get("namespace"), call.query.get("tier")
        if tier is not None and tier.upper() not in TierKind.__members__:
            raise Refusal(400, f"tier must be one of {', '.join(TierKind.__members__).lower()}")
        tiers = sum(TierKind) if tier is None else int(TierKind[tier.upper()])
        return None if name is None else namespace_of(self._store, name), tiers

    async def _chunk(self, call: Call) -> schema.Chunk:
        space = namespace_of(self._store, call.path["namespace"])
        slot = space.find(digest_of(call.path["digest"]))
        if slot == NO_SLOT:
            raise Refusal(404, "no such chunk is kept; /v1/prefixes/explain says why")
        return self._chunk_at(slot)

    def _chunk_at(self, slot: int) -> schema.Chunk:
        index, store = self._store.index, self._store
        parent, space = index.parent_digest(slot), index.space_of(slot)
        digest = index.digest(slot)
        return schema.Chunk(
            digest=digest.hex(),
            namespace=space.id.hex(),
            parent=None if parent is None else parent.hex(),
            tenant=store.tenants[index.tenant_of(slot)],
            is_whole=digest in space.ready,
            tiers=tier_names(index.tiers_of(slot)),
            leases=index.lease_count(slot),
            pin=_pin_of(index, slot),
            shards=[
                schema.ShardShown(
                    head_start=shard.heads.start,
                    head_stop=shard.heads.stop,
                    size_bytes=shard.size_bytes,
                    tiers=tier_names(shard.tiers),
                )
                for shard in index.shards(slot)
            ],
        )

    async def _events(self, call: Call) -> schema.EventPage:
        limit = whole(call.query, "limit", _PAGE, ADMIN_PAGE_MAX)
        after = whole(call.query, "after", 0, _CURSOR_MAX)
        events = self._subject.events.after(after, limit)
        return schema.EventPage(events=events, next=events[-1].id if events else after)

    async def _config(self, call: Call) -> schema.ConfigShown:
        del call
        return schema.ConfigShown(
            settings=[
                schema.SettingShown(
                    path=path, value=value, reloadable=self._subject.is_reloadable(path)
                )
                for path, value in plain(self._subject.config()).items()
            ]
        )


def _pin_of(index: Index, slot: int) -> Literal["none", "soft", "hard"]:
    if index.is_hard_pinned(slot):
        return "hard"
    return "soft" if index.is_soft_pinned(slot) else "none"


def _page_route(path: str, name: str, text: Text) -> Route:
    async def show(call: Call) -> Text:
        del call
        return text

    return Route("GET", path, name.replace(".", "_"), "The dashboard", show, text.media_type)


def _shown(space: Namespace) -> schema.NamespaceShown:
    return schema.NamespaceShown(
        namespace=space.id.hex(),
        tenant=space.tenant,
        chunks=len(space.ready),
        partial_chunks=len(space.partial),
        chunk_bytes=space.chunk_bytes,
        sessions=space.entered,
        manifest=space.manifest,
    )
