"""Ranks that share a model's heads, with a live daemon: each keeps its own, all find all."""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import numpy as np
import pytest

from kvstore.client.cache import PrefixCache
from kvstore.client.sync import Client
from kvstore.errors import RequestError
from kvstore.types import HeadRange, TierKind
from tests.support.making import make_digests, make_manifest, make_payload, runs_of

MANIFEST = make_manifest(model="shards")
DIGESTS = make_digests(3)
ALL, LOWER, UPPER = HeadRange(0, 4), HeadRange(0, 2), HeadRange(2, 4)
SINGLE = [HeadRange(head, head + 1) for head in range(4)]


def part(digest: bytes, heads: HeadRange) -> bytes:
    """Return the bytes of *heads* of a chunk: a run out of every plane (layer, k or v)."""
    whole = np.frombuffer(make_payload(digest, MANIFEST.chunk_bytes), dtype=np.uint8)
    planes = whole.reshape(MANIFEST.layers * 2, MANIFEST.kv_heads, -1)
    return np.ascontiguousarray(planes[:, slice(*heads)]).tobytes()


class Ranks:
    """The caches of an engine whose ranks have *shares* of the heads."""

    def __init__(self, stack: ExitStack, socket, shares: list[HeadRange]) -> None:
        self.caches = [
            stack.enter_context(
                PrefixCache(MANIFEST, heads=heads, socket=socket, timeout_seconds=5)
            )
            for heads in shares
        ]

    def store(self) -> None:
        for cache in self.caches:
            report = cache.store(DIGESTS, runs_of([part(d, cache.heads) for d in DIGESTS]))
            assert report.stored == len(DIGESTS)

    def check(self) -> None:
        for cache in self.caches:
            buffers = [bytearray(MANIFEST.shard_bytes(cache.heads)) for _ in DIGESTS]
            assert cache.load(DIGESTS, runs_of(buffers)) == len(DIGESTS)
            assert [bytes(b) for b in buffers] == [part(d, cache.heads) for d in DIGESTS]


CUTS = {"whole": [ALL], "halves": [LOWER, UPPER], "quarters": SINGLE}


@pytest.mark.parametrize(("written", "read"), list(itertools.permutations(CUTS, 2)))
def test_ranks_of_one_number_serve_those_of_another(start_daemon, written, read):
    daemon = start_daemon({})
    with ExitStack() as stack:
        Ranks(stack, daemon.socket, CUTS[written]).store()
        readers = Ranks(stack, daemon.socket, CUTS[read])
        assert [cache.lookup(DIGESTS) for cache in readers.caches] == [3] * len(readers.caches)
        readers.check()


def test_a_chunk_is_found_when_all_of_its_heads_are_there(start_daemon):
    daemon = start_daemon({})
    with ExitStack() as stack:
        lower, upper = Ranks(stack, daemon.socket, CUTS["halves"]).caches
        lower.store(DIGESTS, runs_of([part(d, LOWER) for d in DIGESTS]))
        assert lower.lookup(DIGESTS) == upper.lookup(DIGESTS) == 0
        upper.store(DIGESTS[:2], runs_of([part(d, UPPER) for d in DIGESTS[:2]]))
        found = lower.find(DIGESTS)
        assert found.chunks == 2
        assert found.tiers == [(TierKind.HOST, 2)]


def test_heads_that_a_model_does_not_have_are_refused(tmp_path):
    with pytest.raises(RequestError, match="of a model with 4"):
        PrefixCache(MANIFEST, heads=HeadRange(3, 5), socket=tmp_path / "none")


def test_a_damaged_chunk_that_others_are_reading_is_stored_anew(start_daemon):
    """The rank that finds the damage cannot delete what its sibling still holds."""
    daemon = start_daemon({})
    with ExitStack() as stack:
        ranks = Ranks(stack, daemon.socket, CUTS["halves"])
        ranks.store()
        lower, upper = ranks.caches
        with Client.connect(daemon.socket) as client:
            space = client.attach(MANIFEST)
            with space.load(DIGESTS, heads=LOWER) as held:
                held.chunks[1].shards[0]._bytes[5] ^= 1
                buffers = [bytearray(MANIFEST.shard_bytes(LOWER)) for _ in DIGESTS]
                assert lower.load(DIGESTS, runs_of(buffers)) == 1
                assert upper.lookup(DIGESTS) == 3
        for cache in (lower, upper):
            cache.store(DIGESTS, runs_of([part(d, cache.heads) for d in DIGESTS]))
        assert upper.lookup(DIGESTS) == 3
        ranks.check()
