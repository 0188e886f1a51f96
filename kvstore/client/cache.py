"""The client for connectors: it never raises because of the daemon. What fails is a miss."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar

from kvstore.client.breaker import Breaker
from kvstore.client.sync import Client, Space, StoreReport
from kvstore.config import default_socket_path
from kvstore.errors import ChecksumError, KVStoreError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.protocol.manifest import Manifest
    from kvstore.transfer.copies import Runs
    from kvstore.types import Digest

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_TIMEOUT_SECONDS: Final = 0.05
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
        if not digests:
            return 0
        return self._ask(lambda space: space.lookup(digests, window=window).hits, 0)

    def load(self, digests: Sequence[Digest], targets: Sequence[Runs]) -> int:
        """Copy chunk i to `targets[i]`; return how many leading ones are whole and right.

        Targets behind those may hold anything.
        """
        if not digests:
            return 0
        return self._ask(lambda space: _load(space, digests, targets), 0)

    def store(
        self, digests: Sequence[Digest], sources: Sequence[Runs], *, parent: Digest | None = None
    ) -> StoreReport:
        """Store chunk i from `sources[i]`; *parent* is the digest before the first.

        Reports what was kept; nothing, while there is no daemon.
        """
        if not digests:
            return _NOTHING_STORED
        return self._ask(
            lambda space: space.store(digests, sources, parent=parent), _NOTHING_STORED
        )

    def close(self) -> None:
        """End the session. Idempotent."""
        self._breaker.close()

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


def _load(space: Space, digests: Sequence[Digest], targets: Sequence[Runs]) -> int:
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
