"""Miss-ratio curves by sampling, beside a full simulation of an LRU on the same trace.

Prints, for every multiple of a capacity, the hit rate that sampling says and the one that the
simulation found, and what noting look-ups and taking distances cost, a chunk and a look-up.

Run: python -m tests.bench.reuse [--requests 1000000] [--traffic chat,programs] [--chunks 16000]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from kvstore.limits import MIB
from kvstore.protocol.messages import Lookup, encode
from kvstore.store.reuse import Reuse
from kvstore.types import Digest
from tests.bench.traces import TRAFFIC, Request, trace

CHUNK_BYTES = MIB
TIMES = (0.5, 1.0, 2.0, 4.0, 8.0)


class Lru:
    """Every chunk of a trace, in an LRU of so many chunks: what sampling has to come close to."""

    def __init__(self, chunks: int) -> None:
        self.hits = 0
        self._chunks = chunks
        self._kept: OrderedDict[Digest, None] = OrderedDict()

    def use(self, request: Request) -> None:
        """Look *request* up, then keep its prompt and its answer, the head as the latest."""
        kept = self._kept
        self.hits += sum(digest in kept for digest in request.prompt)
        for digest in reversed(request.prompt + request.answer):
            if digest in kept:
                kept.move_to_end(digest)
            else:
                kept[digest] = None
        while len(kept) > self._chunks:
            kept.popitem(last=False)


class Compared(NamedTuple):
    """What came out. *curve* has (times, sampled hit rate, simulated hit rate)."""

    asked_chunks: int
    sampling_rate: float
    sampled_references: int
    note_ns_per_chunk: float
    work_ns_per_chunk: float
    curve: list[tuple[float, float, float]]

    @property
    def worst(self) -> float:
        """The largest distance between both hit rates."""
        return max(abs(sampled - simulated) for _, sampled, simulated in self.curve)


def compare(requests: Iterable[Request], chunks: int) -> Compared:
    """Run *requests* through both, for multiples of *chunks*."""
    reuse = Reuse()
    reuse.is_on = True
    full = [Lru(int(chunks * times)) for times in TIMES]
    asked = 0
    noting = working = 0.0
    for request in requests:
        asked += len(request.prompt)
        if request.prompt:
            frame = encode(Lookup(1, 1, 0, request.prompt))
        began = time.perf_counter()
        if request.prompt:
            reuse.looked_up(0, request.prompt, CHUNK_BYTES, frame)
        noting += time.perf_counter() - began
        for digest in request.answer:
            reuse.stored(0, digest, CHUNK_BYTES)
        began = time.perf_counter()
        reuse.work()
        working += time.perf_counter() - began
        for lru in full:
            lru.use(request)
    stack = reuse.stack(0)
    assert stack is not None, "something was sampled"
    return Compared(
        asked,
        stack.rate,
        stack.references,
        1e9 * noting / asked,
        1e9 * working / asked,
        [
            (times, stack.hit_rate(int(chunks * times) * CHUNK_BYTES), lru.hits / asked)
            for times, lru in zip(TIMES, full, strict=True)
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--traffic", default="chat,programs", help=", ".join(TRAFFIC))
    parser.add_argument("--chunks", type=int, default=16_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kinds = tuple(arguments.traffic.split(","))
    found = compare(trace(kinds, arguments.requests, arguments.seed), arguments.chunks)
    if arguments.json:
        print(json.dumps(found._asdict() | {"worst": found.worst}))
        return
    print(f"{found.asked_chunks:,} chunks asked for, one in {1 / found.sampling_rate:.0f} sampled")
    note_ns, work_ns = found.note_ns_per_chunk, found.work_ns_per_chunk
    print(f"{note_ns:.1f} ns a chunk to note, {work_ns:.1f} ns to take distances")
    for times, sampled, simulated in found.curve:
        print(f"{times:>4}x  sampled {sampled:.2%}  simulated {simulated:.2%}")
    print(f"worst {100 * found.worst:.2f} percentage points")


if __name__ == "__main__":
    main()
