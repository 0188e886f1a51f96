"""Movement between tiers: what is written down when, what comes up again, and for whom."""

from __future__ import annotations

import pytest

from tests.support.making import make_digests, make_manifest, make_payload
from tests.support.tiers import DISK, REDIS, Slower, Tiers, fake, running

MANIFEST = make_manifest()


def payloads(digests):
    return [make_payload(digest, MANIFEST.chunk_bytes) for digest in digests]


@pytest.mark.parametrize("kind", [DISK, REDIS])
@pytest.mark.parametrize("policy", ["back", "through"])
async def test_what_left_the_host_tier_comes_back_byte_by_byte(kind, policy):
    async with running(Tiers([Slower(fake(kind), policy)])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(10)
        engine.put(digests)
        await tiers.settle()
        tiers.evict_all()
        assert tiers.store.residents.count == 0
        assert engine.hits(digests) == 10
        assert await tiers.load(engine, digests) == payloads(digests)
        assert tiers.store.residents.count == 10
        assert tiers.store.counters.promote_chunks == 10
