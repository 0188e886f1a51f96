"""The client for connectors: it never raises because of the daemon. What fails is a miss."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar

from kvstore.client.breaker import Breaker
from kvstore.client.sync import Client, Space, StoreReport
from kvstore.config import default_socket_path
from kvstore.errors import ChecksumError, KVStoreError, UnavailableError
from kvstore.limits import CHUNKS_PER_TRANSFER_MAX, KEYS_PER_REQUEST_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.protocol.manifest import Manifest
    from kvstore.transfer.copies import Runs
    from kvstore.types import Digest

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# With what it takes to give up, a daemon that hangs costs 50 ms, once.
_TIMEOUT_SECONDS: Final = 0.04
# A connection is made in the background, so it may take longer than a call.
_CONNECT_TIMEOUT_SECONDS: Final = 1.0
_NOTHING_STORED: Final = StoreReport(0, 0, 0, 0)


class _Link(NamedTuple):
    """One session that has entered the namespace."""

    client: Client
    space: Space


class PrefixCache:
    """The chunks of one namespace, as one engine uses them. Thread-safe, fails open.

    A daemon that is gone, or does not answer within *timeout_seconds*, costs that time once;
    from then on every call is a miss at once, until a background probe finds the daemon
    again. Construction itself never fails for want of a daemon.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        socket: Path | str | None = None,
        timeout_seconds: float = _TIMEOUT_SECONDS,
        name: str = "",
    ) -> None:
        self.manifest = manifest
        self._path = default_socket_path(os.environ) if socket is None else Path(socket)
        self._timeout_seconds = timeout_seconds
        self._name = name
        self._breaker = Breaker(self._connect, lambda link: link.client.close())
        self._breaker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """Whether the daemon is being asked at present."""
        return self._breaker.link is not None

    def lookup(self, digests: Sequence[Digest], *, window: int = 0) -> int:
        """Return how many leading chunks are present.

        With *window* w > 0: the largest n such that chunks [n - w, n) are all present, the
        rule for sliding-window layers.
        """
        window = min(window, len(digests))
        is_one_request = len(digests) <= KEYS_PER_REQUEST_MAX
        # Longer windows would make requests overlap too much to get on. For them the leading
        # chunks are counted, which are right for every window.
        if window > 0 and (is_one_request or window <= KEYS_PER_REQUEST_MAX // 2):
            return self._lookup_window(digests, window)
        hits = 0
        for start, batch in _batches(digests, KEYS_PER_REQUEST_MAX):
            hits += self._ask(partial(_lookup, batch, 0), 0)
            if hits < start + len(batch):
                break
        return hits

    def load(self, digests: Sequence[Digest], targets: Sequence[Runs]) -> int:
        """Copy chunk i to `targets[i]`; return how many leading ones are whole and right.

        Targets behind those may hold anything.
        """
        loaded = 0
        for start, batch in _batches(digests, CHUNKS_PER_TRANSFER_MAX):
            loaded += self._ask(partial(_load, batch, targets[start : start + len(batch)]), 0)
            if loaded < start + len(batch):
                break
        return loaded

    def store(
        self, digests: Sequence[Digest], sources: Sequence[Runs], *, parent: Digest | None = None
    ) -> StoreReport:
        """Store chunk i from `sources[i]`; *parent* is the digest before the first.

        Reports what was kept; nothing, while there is no daemon.
        """
        stored = _NOTHING_STORED
        for start, batch in _batches(digests, CHUNKS_PER_TRANSFER_MAX):
            some = sources[start : start + len(batch)]
            report = self._ask(partial(_store, batch, some, parent), _NOTHING_STORED)
            stored = StoreReport(*(a + b for a, b in zip(stored, report, strict=True)))
            parent = batch[-1]
        return stored

    def close(self) -> None:
        """End the session. Idempotent."""
        self._breaker.close()

    def _lookup_window(self, digests: Sequence[Digest], window: int) -> int:
        """Look from the end, request by request, overlapping by what a window may reach back."""
        stop = len(digests)
        while stop > 0:
            start = max(0, stop - KEYS_PER_REQUEST_MAX)
            found = self._ask(partial(_lookup, digests[start:stop], window), 0)
            if found >= window or start == 0:
                return start + found if found else 0
            stop = start + window - 1
        return 0

    def _ask(self, question: Callable[[Space], Answer], miss: Answer) -> Answer:
        link = self._breaker.link
        if link is None:
            return miss
        try:
            return question(link.space)
        except KVStoreError as error:
            if isinstance(error, UnavailableError) or not link.client.is_open:
                self._breaker.trip(link, error)
            else:
                log.warning("counted as a miss", extra={"reason": str(error)})
            return miss

    def _connect(self) -> _Link:
        client = Client.connect(
            self._path, name=self._name, timeout_seconds=_CONNECT_TIMEOUT_SECONDS
        )
        try:
            space = client.attach(self.manifest)
        except KVStoreError:
            client.close()
            raise
        return _Link(client, space.with_timeout(self._timeout_seconds))


def _batches(digests: Sequence[Digest], most: int) -> Iterator[tuple[int, Sequence[Digest]]]:
    """Yield at most *most* digests at a time, with the position of the first."""
    for start in range(0, len(digests), most):
        yield start, digests[start : start + most]


def _lookup(digests: Sequence[Digest], window: int, space: Space) -> int:
    return space.lookup(digests, window=window).hits


def _store(
    digests: Sequence[Digest], sources: Sequence[Runs], parent: Digest | None, space: Space
) -> StoreReport:
    return space.store(digests, sources, parent=parent)


def _load(digests: Sequence[Digest], targets: Sequence[Runs], space: Space) -> int:
    with space.load(digests) as loaded:
        whole = 0
        for chunk, target in zip(loaded.chunks, targets, strict=False):
            try:
                loaded.copy_one(chunk, target)
            except ChecksumError as error:
                log.error("stored bytes are wrong, recomputing", extra={"reason": str(error)})
                break
            whole += 1
        trusted = whole if loaded.is_trusted else 0
        damaged = digests[whole : whole + 1] if whole < min(len(loaded), len(targets)) else []
    if damaged:
        # Gone from the store, the chunk can be stored anew by whoever computes it next.
        space.delete(damaged)
    return trusted
