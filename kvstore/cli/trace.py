"""`kvstore trace`: what engines look up into a file, and such a file against another daemon.

A trace is a text: one JSON object a line, the first with the format. It holds when which chunks
were asked for; chunks go by marks that mean nothing outside of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final, NamedTuple, TextIO, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from kvstore.cli.admin_client import AdminClient
from kvstore.client.cache import PrefixCache
from kvstore.errors import ConfigError, UnavailableError
from kvstore.limits import CHUNK_SIZE_MAX_BYTES, KEYS_PER_REQUEST_MAX
from kvstore.protocol.manifest import Manifest
from kvstore.transfer.copies import Runs
from kvstore.types import Digest

FORMAT: Final = 1
_POLL_SECONDS: Final = 0.5

_Line = TypeVar("_Line", bound=msgspec.Struct)
Mark = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}$")]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of a trace."""

    kvstore_trace: int


class Lookup(msgspec.Struct, frozen=True):
    """One line: a look-up of one prompt. *hits* is what it hit when it was recorded."""

    at: float
    namespace: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]
    chunk_bytes: Annotated[int, Meta(ge=1, le=CHUNK_SIZE_MAX_BYTES)]
    hits: Annotated[int, Meta(ge=0)]
    chunks: Annotated[list[Mark], Meta(min_length=1, max_length=KEYS_PER_REQUEST_MAX)]


class Page(msgspec.Struct, frozen=True):
    """What the daemon answers with."""

    class Numbered(Lookup, frozen=True):
        """A look-up with its number."""

        number: int = 0

    lookups: list[Numbered]
    next: int


# --- recording -----------------------------------------------------------------------------


class Recorded(NamedTuple):
    """What was recorded; *lost* look-ups came faster than they were fetched."""

    lookups: int
    chunks: int
    lost: int


class Source:
    """The look-ups that a daemon notes, over its admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    def after(self, number: int) -> Page:
        """Return the look-ups behind *number*; raises `UnavailableError` or `RefusedError`."""
        answer = self._client.ask("GET", f"/v1/trace?after={number}")
        try:
            return msgspec.convert(answer, Page)
        except msgspec.ValidationError as error:
            raise UnavailableError(f"the daemon speaks of other traces: {error}") from None


def record(source: Source, file: TextIO, seconds: float | None) -> Recorded:
    """Write what engines look up to *file* until *seconds* have passed or it is interrupted."""
    # What was noted before, for somebody else, is not of this trace.
    number = _latest(source)
    file.write(_line(Header(FORMAT)))
    lookups = chunks = lost = 0
    ends_at = None if seconds is None else time.monotonic() + seconds
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            page = source.after(number)
            for one in page.lookups:
                lost += one.number - number - 1
                number = one.number
                lookups, chunks = lookups + 1, chunks + len(one.chunks)
                kept = (one.at, one.namespace, one.chunk_bytes, one.hits, one.chunks)
                file.write(_line(Lookup(*kept)))
            _progress(f"{lookups:,} look-ups, {chunks:,} chunks")
            if ends_at is not None and time.monotonic() >= ends_at:
                break
            if not page.lookups:
                time.sleep(_POLL_SECONDS)
    _progress("")
    return Recorded(lookups, chunks, lost)


def _latest(source: Source) -> int:
    number = 0
    while True:
        page = source.after(number)
        if not page.lookups:
            return number
        number = page.next


def _line(content: msgspec.Struct) -> str:
    return msgspec.json.encode(content).decode() + "\n"


# --- replaying -------------------------------------------------------------------------------


class Replayed(NamedTuple):
    """What a daemon made of a trace, in chunks, beside what was hit when it was recorded."""

    lookups: int
    asked: int
    hits: int
    recorded_hits: int
    stored: int
    refused: int
    seconds: float


def read(path: Path) -> Iterator[Lookup]:
    """Yield the look-ups of a trace; raises `ConfigError` naming the line."""
    try:
        with path.open("rb") as file:
            header = _decode(next(file, b""), Header, path, 1)
            if header.kvstore_trace != FORMAT:
                raise ConfigError(f"{path}: format {header.kvstore_trace}, known is {FORMAT}")
            for number, line in enumerate(file, 2):
                yield _decode(line, Lookup, path, number)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(line: bytes, kind: type[_Line], path: Path, number: int) -> _Line:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}:{number}: not of a trace: {error}") from None


def replay(lookups: Iterator[Lookup], socket: Path, speed: float) -> Replayed:
    """Ask the daemon at *socket* what the trace asked, load what is there, store the rest.

    With *speed* 0 as fast as it goes, else so many times as fast as it was. Namespaces and sizes
    are those of the trace, bytes are made up.
    """
    caches: dict[str, PrefixCache] = {}
    count = asked = hits = recorded = stored = refused = 0
    began, first_at = time.monotonic(), None
    for lookup in lookups:
        first_at = lookup.at if first_at is None else first_at
        if speed:
            due = began + (lookup.at - first_at) / speed
            time.sleep(max(0.0, due - time.monotonic()))
        name = f"{lookup.namespace} {lookup.chunk_bytes}"
        if name not in caches:
            caches[name] = PrefixCache(_manifest(lookup), socket=socket, name="trace")
        digests = _digests(lookup.chunks)
        found, report = _play(caches[name], digests, lookup.chunk_bytes)
        count, asked, hits = count + 1, asked + len(digests), hits + found
        recorded += min(lookup.hits, len(digests))
        stored, refused = stored + report[0], refused + report[1]
        _progress(f"{count:,} look-ups, hit rate {hits / asked:.1%}")
    _progress("")
    for cache in caches.values():
        cache.close()
    return Replayed(count, asked, hits, recorded, stored, refused, time.monotonic() - began)


def _play(cache: PrefixCache, digests: Sequence[Digest], size: int) -> tuple[int, tuple[int, int]]:
    hits = cache.lookup(digests)
    if hits:
        # All chunks of a load go to one place: nobody reads them.
        room = np.empty(size, dtype=np.uint8)
        hits = cache.load(digests[:hits], [Runs.of_buffer(room)] * hits)
    missing = digests[hits:]
    if not missing:
        return hits, (0, 0)
    bytes_of_all = np.zeros(size, dtype=np.uint8)
    parent = digests[hits - 1] if hits else None
    report = cache.store(missing, [Runs.of_buffer(bytes_of_all)] * len(missing), parent=parent)
    return hits, (report.stored, report.refused)


def _manifest(lookup: Lookup) -> Manifest:
    return Manifest(
        model=f"trace of {lookup.namespace}",
        revision="1",
        dtype="opaque",
        layers=1,
        kv_heads=1,
        head_dim=1,
        chunk_tokens=1,
        layout="opaque",
        opaque_bytes=lookup.chunk_bytes,
    )


def _digests(marks: Sequence[str]) -> list[Digest]:
    """Return digests that are equal where the marks are, and chained by the trace itself."""
    return [Digest(hashlib.sha256(mark.encode()).digest()) for mark in marks]


def render(replayed: Replayed) -> str:
    """Return *replayed* as JSON for machines and people alike."""
    shown = replayed._asdict()
    asked = max(1, replayed.asked)
    shown["hit_rate"] = round(replayed.hits / asked, 4)
    shown["recorded_hit_rate"] = round(replayed.recorded_hits / asked, 4)
    return json.dumps(shown, indent=2)


def _progress(text: str) -> None:
    """Keep one line of a terminal up to date; elsewhere say nothing."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()
