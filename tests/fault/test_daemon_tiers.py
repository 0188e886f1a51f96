"""A real daemon over real and scripted slower tiers: nothing is lost, wrong, or waited for long."""

from __future__ import annotations

import signal

import pytest

from tests.support.daemon import Daemon
from tests.support.making import empty_targets, make_digests, make_manifest, make_payload, sources_of

MANIFEST = make_manifest()
# Four times what the host tier holds.
CHUNKS = 128


@pytest.fixture
def settings(tmp_path):
    return {
        "tiers.host.capacity": "1MiB",
        "tiers.disk.path": tmp_path / "disk",
        "tiers.disk.capacity": "64MiB",
        "tiers.disk.write": "through",
    }


def store_all(daemon: Daemon, digests) -> None:
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        for start in range(0, len(digests), 16):
            batch = digests[start : start + 16]
            parent = digests[start - 1] if start else None
            report = space.store(batch, sources_of(MANIFEST, batch), parent=parent)
            assert report.stored == len(batch)


def load_all(daemon: Daemon, digests) -> None:
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        assert space.lookup(digests).hits == len(digests)
        for start in range(0, len(digests), 16):
            batch = digests[start : start + 16]
            buffers, targets = empty_targets(MANIFEST, len(batch))
            with space.load(batch) as loaded:
                assert len(loaded) == len(batch)
                loaded.copy_to(targets)
            for digest, buffer in zip(batch, buffers, strict=True):
                assert buffer == make_payload(digest, MANIFEST.chunk_bytes)


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGKILL])
def test_what_disk_was_to_keep_is_served_after_a_restart(tmp_path, settings, ended_by):
    digests = make_digests(CHUNKS)
    with Daemon(tmp_path, settings) as daemon:
        store_all(daemon, digests)
        load_all(daemon, digests)
        stats = daemon.stats()
        disk = next(tier for tier in stats.tiers if tier.tier == "disk")
        assert disk.chunks == CHUNKS
        assert stats.counters["evict_chunks"] > 0
        daemon.end(ended_by)
        daemon.launch()
        daemon.wait_ready()
        load_all(daemon, digests)
