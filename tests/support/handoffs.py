"""Both ends of hand-offs in tests: chunks stored one by one, and a consumer that reads them."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.client.handoff import Awaited
from kvstore.client.sync import Space
from kvstore.types import Digest
from tests.support.making import empty_targets, make_payload, sources_of
from tests.support.waiting import DEADLINE_SECONDS


def store_one(space: Space, digests: Sequence[Digest], number: int) -> None:
    """Store chunk *number* of a prompt."""
    parent = digests[number - 1] if number else None
    chunk = [digests[number]]
    space.store(chunk, sources_of(space.manifest, chunk), parent=parent)


def wait(space: Space, name: str, first: int, peer: str = "", *, early: bool = False) -> Awaited:
    return space.handoffs.wait(
        name, first, timeout_seconds=DEADLINE_SECONDS, peer=peer, early=early
    )


def take_all(space: Space, name: str, peer: str = "") -> list[Digest]:
    """Wait for every chunk of a hand-off, load and compare it; return what came before its end."""
    taken: list[Digest] = []
    while True:
        ready = wait(space, name, len(taken), peer, early=True)
        assert is_right(space, ready.digests)
        taken += ready.digests
        if ready.is_last:
            return taken
        assert ready.digests, "the wait ended without news"


def is_right(space: Space, digests: Sequence[Digest]) -> bool:
    """Load *digests*; return whether all are there with their bytes."""
    if not digests:
        return True
    buffers, targets = empty_targets(space.manifest, len(digests))
    with space.load(digests) as loaded:
        if len(loaded) < len(digests):
            return False
        loaded.copy_to(targets)
    return buffers == [make_payload(digest, len(buffers[0])) for digest in digests]
