"""Traffic for people to look at: conversations of a few tenants, at a gentle pace, seeded."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from kvstore.client.cache import PrefixCache
from kvstore.hashing import chunk_digests
from kvstore.types import Digest
from tests.support.making import CHUNK_TOKENS, empty_targets, make_manifest, sources_of

TURN_CHUNKS = 6
TURNS_MAX = 8
# Of pictures of a machine with other things to do.
_TIMEOUT_SECONDS = 2.0


class Traffic(threading.Thread):
    """Holds conversations through the daemon at *socket* until `stop`.

    A turn looks the conversation up, loads what is there and stores the rest. Some are taken
    up again often, most are not.
    """

    def __init__(
        self,
        socket: Path,
        *,
        tenant: str = "",
        model: str = "llama",
        seed: int = 1,
        pause_seconds: float = 0.05,
        conversations: int = 60,
    ) -> None:
        super().__init__(name=f"traffic {model}")
        self.manifest = make_manifest(model=model, layers=8)
        self.turns = 0
        self._cache = PrefixCache(
            self.manifest, socket=socket, tenant=tenant, timeout_seconds=_TIMEOUT_SECONDS
        )
        self._random = np.random.default_rng(seed)
        self._pause_seconds = pause_seconds
        self._lengths = dict.fromkeys(range(conversations), 1)
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.wait(self._pause_seconds):
            self._turn()
            self.turns += 1
        self._cache.close()

    def stop(self) -> None:
        self._ends.set()
        self.join()

    def digests_of(self, conversation: int, turns: int) -> list[Digest]:
        # The first turn's beginning is a system prompt that all share.
        tokens = [
            *range(2 * CHUNK_TOKENS),
            conversation,
            *range(1, turns * TURN_CHUNKS * CHUNK_TOKENS),
        ]
        return chunk_digests(tokens, CHUNK_TOKENS)

    def _turn(self) -> None:
        place = int(self._random.pareto(0.9))
        conversation = place % len(self._lengths)
        turns = self._lengths[conversation] = self._lengths[conversation] % TURNS_MAX + 1
        digests = self.digests_of(conversation, turns)
        hits = self._cache.lookup(digests)
        if hits:
            _, targets = empty_targets(self.manifest, hits)
            hits = self._cache.load(digests[:hits], targets)
        missing = digests[hits:]
        if missing:
            parent = digests[hits - 1] if hits else None
            self._cache.store(missing, sources_of(self.manifest, missing), parent=parent)
