"""Ten times what fits, as fast as it goes: nothing acknowledged is lost, no leased load fails."""

from __future__ import annotations

import threading

import pytest

from kvstore.types import Digest
from tests.support.making import (
    empty_targets,
    make_digests,
    make_manifest,
    make_payload,
    sources_of,
)
from tests.support.workload import Wrongs

MANIFEST = make_manifest(model="burst")
ARENA_CHUNKS = 4 * 1024 * 1024 // (9 * 4096)
WRITERS = 4
PROMPT_CHUNKS = 8


@pytest.mark.parametrize("eviction", ["s3fifo", "lru"])
def test_a_burst_of_ten_arenas_is_kept_or_evicted_by_policy_and_leased_loads_never_fail(
    start_daemon, eviction
):
    daemon = start_daemon({"tiers.host.capacity": "4MiB", "tiers.host.eviction": eviction})
    wrongs, stored, done = Wrongs(), [], threading.Event()
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        leased = make_digests(PROMPT_CHUNKS, prompt=9999)
        space.store(leased, sources_of(MANIFEST, leased))
        prompts = iter(range(10 * ARENA_CHUNKS // PROMPT_CHUNKS + 1))

        def write() -> None:
            for prompt in prompts:
                digests = make_digests(PROMPT_CHUNKS, prompt)
                report = space.store(digests, sources_of(MANIFEST, digests))
                assert report.present == 0
                stored.append((digests, report))

        def read() -> None:
            while not done.is_set():
                load_and_check(space, leased)

        with space.load(leased) as held:
            writers = [threading.Thread(target=wrongs.guard(write)) for _ in range(WRITERS)]
            reader = threading.Thread(target=wrongs.guard(read))
            for thread in [*writers, reader]:
                thread.start()
            for thread in writers:
                thread.join()
            done.set()
            reader.join()
            assert len(held) == PROMPT_CHUNKS
        assert wrongs.found == []
        check_the_books(client.stats(), space, stored)


def load_and_check(space, digests: list[Digest]) -> None:
    with space.load(digests) as loaded:
        assert len(loaded) == len(digests), "a leased chunk is gone"
        buffers, targets = empty_targets(MANIFEST, len(digests))
        loaded.copy_to(targets)
    for digest, buffer in zip(digests, buffers, strict=True):
        assert buffer == make_payload(digest, len(buffer)), "wrong bytes"


def check_the_books(stats, space, stored) -> None:
    """Every commit that was acknowledged is present or was evicted, and counted so."""
    acknowledged = sum(report.stored for _, report in stored) + PROMPT_CHUNKS
    refused = sum(report.refused for _, report in stored)
    counters = stats.counters
    assert acknowledged + refused >= 10 * ARENA_CHUNKS
    assert counters["commit_chunks"] == acknowledged
    assert counters["reserve_chunks_no_space"] == refused
    assert stats.tiers[0].chunks == acknowledged - counters["evict_chunks"]
    present = sum(space.lookup([digest]).hits for digests, _ in stored for digest in digests)
    assert present == stats.tiers[0].chunks - PROMPT_CHUNKS
    assert (stats.reservations, counters["checksum_failures"]) == (0, 0)
    assert stats.tiers[0].used_bytes <= stats.tiers[0].capacity_bytes
