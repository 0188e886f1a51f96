"""A daemon with disk and Redis below its host tier, killed under mixed load again and again.

Whatever is served afterwards is whole and right; what was stored with policy `through` is
there; and nothing that was half done takes up room.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from kvstore.client.cache import PrefixCache
from kvstore.types import Digest
from tests.support.daemon import Daemon
from tests.support.making import (
    empty_targets,
    make_digests,
    make_manifest,
    make_payload,
    sources_of,
)
from tests.support.redis import SERVER, RedisServer
from tests.support.waiting import DEADLINE_SECONDS, wait_until
from tests.support.workload import Wrongs

# A chunk of 8 KiB takes three pages with its table.
MANIFEST = make_manifest(model="tiers", layers=1, kv_heads=2)
CHUNK_PAGES = 3
CHUNKS = 3
WRITERS = 3
ROUNDS_BETWEEN_KILLS = 6
SAMPLE = 30

pytestmark = pytest.mark.skipif(SERVER is None, reason="redis-server is not installed")


def digests_of(prompt: int) -> list[Digest]:
    return make_digests(CHUNKS, prompt)


class Writer:
    """A thread that stores prompts nobody has stored, and loads those that anybody has."""

    def __init__(self, daemon: Daemon, wrongs: Wrongs, number: int) -> None:
        self.cache = PrefixCache(MANIFEST, socket=daemon.socket, timeout_seconds=2.0)
        self.durable: list[int] = []
        self.rounds = 0
        self._wrongs = wrongs
        self._rng = np.random.default_rng(number)
        self._prompts = count(number, WRITERS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=wrongs.guard(self._work))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive(), "a writer hangs"
        self.cache.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            prompt = next(self._prompts)
            digests = digests_of(prompt)
            report = self.cache.store(digests, sources_of(MANIFEST, digests))
            if report.stored == CHUNKS:
                self.durable.append(prompt)
                self._load(self.durable[self._rng.integers(len(self.durable))])
                self.rounds += 1
            else:
                self._stop.wait(0.002)

    def _load(self, prompt: int) -> None:
        digests = digests_of(prompt)
        buffers, targets = empty_targets(MANIFEST, CHUNKS)
        hits = self.cache.load(digests, targets)
        for digest, buffer in zip(digests[:hits], buffers, strict=False):
            if buffer != make_payload(digest, len(buffer)):
                self._wrongs.found.append(f"wrong bytes of prompt {prompt}")


@contextlib.contextmanager
def writers(daemon: Daemon, wrongs: Wrongs) -> Iterator[list[Writer]]:
    crew = [Writer(daemon, wrongs, number) for number in range(WRITERS)]
    for writer in crew:
        writer.start()
    try:
        yield crew
    finally:
        for writer in crew:
            writer.stop()


def until_busy(crew: list[Writer], wrongs: Wrongs) -> None:
    """Wait until every writer has done some rounds more."""
    wanted = [writer.rounds + ROUNDS_BETWEEN_KILLS for writer in crew]
    wait_until(
        lambda: (
            wrongs.found
            or all(writer.rounds >= rounds for writer, rounds in zip(crew, wanted, strict=True))
        ),
        what="all writers work",
    )


def assert_kept(daemon: Daemon, prompts: list[int]) -> None:
    """Check that every chunk of *prompts* is a hit, and right."""
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        for prompt in prompts:
            digests = digests_of(prompt)
            with space.load(digests) as loaded:
                assert len(loaded) == CHUNKS, f"prompt {prompt} was stored"
                buffers, targets = empty_targets(MANIFEST, CHUNKS)
                loaded.copy_to(targets)
            for digest, buffer in zip(digests, buffers, strict=True):
                assert buffer == make_payload(digest, len(buffer)), f"prompt {prompt} is right"


def restart(daemon: Daemon) -> None:
    daemon.kill()
    daemon.launch()
    daemon.wait_ready()


def settings_for(directory: Path, server: RedisServer, *, warm: bool) -> dict[str, object]:
    (directory / "disk").mkdir()
    return {
        "tiers.host.arena": directory / "memory" / "arena" if warm else "memfd",
        "tiers.host.capacity": "2MiB",
        "tiers.disk.path": directory / "disk",
        "tiers.disk.capacity": "1GiB",
        "tiers.disk.write": "through",
        "tiers.redis.url": server.unix_url,
        "tiers.redis.write": "back",
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("times", "warm"), [(40, True), (10, False)])
def test_after_every_kill_what_was_stored_through_is_there_and_right(
    tmp_path, start_daemon, times, warm
):
    wrongs = Wrongs()
    rng = np.random.default_rng(times)
    with RedisServer(tmp_path / "redis") as server:
        daemon = start_daemon(settings_for(tmp_path, server, warm=warm))
        with writers(daemon, wrongs) as crew:
            for _ in range(times):
                until_busy(crew, wrongs)
                daemon.kill()
                durable = [prompt for writer in crew for prompt in list(writer.durable)]
                daemon.launch()
                daemon.wait_ready()
                recent = [prompt for writer in crew for prompt in writer.durable[-3:]]
                older = rng.choice(durable, SAMPLE).tolist()
                assert_kept(daemon, [*recent, *older])
        assert wrongs.found == []
        durable = [prompt for writer in crew for prompt in writer.durable]
        restart(daemon)
        assert_kept(daemon, durable)
        assert daemon.log().count("host tier is warm") == (times + 1) * warm
        assert "Traceback" not in daemon.log()
        assert_nothing_half_done(daemon)
        with server.client() as redis:
            assert redis.dbsize() > 0, "Redis has taken its part"


def assert_nothing_half_done(daemon: Daemon) -> None:
    with daemon.connect() as client:

        def is_tidy() -> bool:
            host = client.stats().tiers[0]
            return host.used_bytes == host.chunks * CHUNK_PAGES * 4096

        wait_until(is_tidy, what="nothing but chunks takes up room")
        assert client.stats().counters["checksum_failures"] == 0
