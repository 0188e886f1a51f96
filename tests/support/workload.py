"""Engines in threads: they store, look up and load prefixes for as long as they are told to."""

from __future__ import annotations

import functools
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from itertools import count

from kvstore.client.cache import PrefixCache
from kvstore.types import Digest
from tests.support.making import empty_targets, make_digests, make_payload, runs_of
from tests.support.waiting import DEADLINE_SECONDS

CHUNKS = 6
PROMPTS = 40
RECOMPUTE_SECONDS = 0.002


payload_of = functools.cache(make_payload)


@functools.cache
def digests_of(prompt: int) -> list[Digest]:
    """Return the digests of one of the prompts that the engines share."""
    return make_digests(CHUNKS, prompt)


class Wrongs:
    """What went wrong in any thread; must stay empty."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def guard(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return *work* with every exception noted instead of lost."""

        def guarded() -> None:
            try:
                work()
            except BaseException:  # noqa: BLE001  # nothing is lost
                self.found.append(traceback.format_exc())

        return guarded


class Engine:
    """One thread that uses a cache and checks every byte it is given."""

    def __init__(
        self, cache: PrefixCache, wrongs: Wrongs, stop: threading.Event, seed: int
    ) -> None:
        self.cache = cache
        self.wrongs = wrongs
        self.stored = self.loaded = self.misses = self.rounds = 0
        self._stop = stop
        self._seed = seed

    def run(self) -> None:
        """Store a prompt, then load one that anybody may have stored."""
        for turn in count(self._seed):
            if self._stop.is_set():
                return
            self.one_round(turn * 7 % PROMPTS, turn * 11 % PROMPTS)

    def one_round(self, mine: int, anyones: int) -> None:
        digests = digests_of(mine)
        size = self.cache.manifest.chunk_bytes
        sources = runs_of([payload_of(digest, size) for digest in digests])
        report = self.cache.store(digests, sources)
        self.stored += report.stored + report.present
        digests = digests_of(anyones)
        buffers, targets = empty_targets(self.cache.manifest, CHUNKS)
        hits = self.cache.load(digests, targets)
        for digest, buffer in zip(digests[:hits], buffers, strict=False):
            if buffer != payload_of(digest, len(buffer)):
                self.wrongs.found.append(f"wrong bytes for {digest.hex()}")
        self.loaded += hits
        self.rounds += 1
        if hits == 0:
            self.misses += 1
            self._stop.wait(RECOMPUTE_SECONDS)


@contextmanager
def engines(caches: list[PrefixCache], wrongs: Wrongs):
    """Run one engine a cache until the block ends; yield them."""
    stop = threading.Event()
    crew = [Engine(cache, wrongs, stop, seed) for seed, cache in enumerate(caches)]
    threads = [threading.Thread(target=wrongs.guard(engine.run)) for engine in crew]
    for thread in threads:
        thread.start()
    try:
        yield crew
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_SECONDS)
            assert not thread.is_alive(), "an engine hangs"
