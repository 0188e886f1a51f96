"""The host tier: extents with their checksum tables, and how much of them is verified."""

from __future__ import annotations

import pytest

from kvstore.limits import CHECKSUM_BLOCK_BYTES, MIB
from kvstore.tiers.host import HostTier
from kvstore.transfer.arena import Arena
from kvstore.types import Root, TierKind
from tests.support.making import loose_digest, make_payload
from tests.support.stores import make_store, write_chunk

SIZE_BYTES = 8 * CHECKSUM_BLOCK_BYTES + 100


@pytest.fixture
def make_tier():
    """Return a function that makes a store's host tier with one filled extent and its root."""
    stores = []

    def make(verification="sample", **kwargs):
        store = make_store(verification=verification, **kwargs)
        stores.append(store)
        extent = store.host.allocate(SIZE_BYTES)
        root = write_chunk(store, extent, make_payload(loose_digest(0), SIZE_BYTES))
        return store.host, extent, root

    yield make
    for store in stores:
        store.host.close()


def flip(tier: HostTier, at: int) -> None:
    tier.arena.view[at] ^= 0x10


@pytest.mark.parametrize("verification", ["root", "sample", "full"])
def test_right_bytes_pass_every_verification(make_tier, verification):
    tier, extent, root = make_tier(verification)
    assert tier.verify(extent, root)


@pytest.mark.parametrize("verification", ["root", "sample", "full"])
def test_a_wrong_root_or_table_passes_none(make_tier, verification):
    tier, extent, root = make_tier(verification)
    assert not tier.verify(extent, Root(root ^ 1))
    flip(tier, extent.offset + tier.padded(SIZE_BYTES) - 1)
    assert not tier.verify(extent, root)


def test_the_root_alone_reads_no_payload(make_tier):
    tier, extent, root = make_tier("root")
    for block in range(9):
        flip(tier, extent.offset + block * CHECKSUM_BLOCK_BYTES)
    assert tier.verify(extent, root)


@pytest.mark.parametrize("block", range(9))
def test_a_full_verification_finds_one_flipped_bit_in_any_block(make_tier, block):
    tier, extent, root = make_tier("full")
    flip(tier, extent.offset + block * CHECKSUM_BLOCK_BYTES + 99)
    assert not tier.verify(extent, root)


def test_a_sample_finds_what_spoils_every_block_and_misses_what_it_does_not_read(make_tier):
    tier, extent, root = make_tier("sample")
    caught = []
    for block in range(9):
        flip(tier, extent.offset + block * CHECKSUM_BLOCK_BYTES)
        caught.append(not tier.verify(extent, root))
        flip(tier, extent.offset + block * CHECKSUM_BLOCK_BYTES)
    assert caught.count(True) == 1


def test_different_chunks_have_different_blocks_sampled():
    store = make_store(capacity_bytes=8 * MIB, verification="sample")
    first_blocks = set()
    for number in range(12):
        extent = store.host.allocate(SIZE_BYTES)
        root = write_chunk(store, extent, make_payload(loose_digest(number), SIZE_BYTES))
        for block in range(9):
            flip(store.host, extent.offset + block * CHECKSUM_BLOCK_BYTES)
            if not store.host.verify(extent, root):
                first_blocks.add(block)
            flip(store.host, extent.offset + block * CHECKSUM_BLOCK_BYTES)
    assert len(first_blocks) > 3
    store.host.close()


def test_without_checksums_nothing_is_kept_for_them_and_anything_passes(make_tier):
    tier, extent, root = make_tier(checksums=False)
    assert tier.padded(SIZE_BYTES) == SIZE_BYTES
    assert tier.verify(extent, Root(root ^ 1))


def test_an_extent_takes_its_bytes_and_its_table_in_whole_pages(make_tier):
    tier, extent, _ = make_tier()
    assert extent.size_bytes == SIZE_BYTES
    assert tier.padded(SIZE_BYTES) == SIZE_BYTES + 28 + 9 * 8
    assert tier.usage().used_bytes == tier.footprint(SIZE_BYTES) == 129 * 4096
    tier.check([extent])
    tier.free(extent)
    usage = tier.usage()
    assert (usage.used_bytes, usage.largest_free_bytes) == (0, usage.capacity_bytes)


def test_a_full_tier_gives_no_room(make_tier):
    tier, _, _ = make_tier()
    assert tier.allocate(MIB) is None


def test_closing_is_idempotent():
    tier = HostTier(Arena.create(MIB))
    assert tier.kind is TierKind.HOST
    tier.close()
    tier.close()
