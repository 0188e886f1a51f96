"""Miss-ratio curves by sampling, beside a full simulation of an LRU on the same trace.

Prints, for every multiple of a capacity, the hit rate that sampling says and the one that the
simulation found, and what noting look-ups and taking distances cost, a chunk; or, with
`--lookups`, which share noting has in a look-up of a daemon with nothing else to do.

Run: python -m tests.bench.reuse [--requests 1000000] [--traffic chat,programs] [--chunks 16000]
     python -m tests.bench.reuse --lookups 2000
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvstore.bench.daemon import BenchDaemon
from kvstore.bench.filling import MANIFEST, arena_bytes_for, fill, prefix
from kvstore.client.sync import Space
from kvstore.limits import MIB, REUSE_BATCH, REUSE_PAUSE_SECONDS
from kvstore.protocol.messages import Lookup, encode
from kvstore.store.reuse import Reuse
from kvstore.types import Digest
from tests.bench.traces import TRAFFIC, Request, trace

CHUNK_BYTES = MIB
TIMES = (0.5, 1.0, 2.0, 4.0, 8.0)
DIGESTS = (16, 256, 4096)


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


class Share(NamedTuple):
    """Noting look-ups of so many digests, beside the look-ups themselves, in seconds.

    The mean has what is selected at once when more is noted than may wait; the median has not.
    """

    digests: int
    noted_median: float
    noted_mean: float
    looked_up_median: float
    looked_up_mean: float

    def __str__(self) -> str:
        noted, looked_up = 1e6 * self.noted_median, 1e6 * self.looked_up_median
        share, with_selecting = noted / looked_up, self.noted_mean / self.looked_up_mean
        return (
            f"{self.digests:>5} digests  noting takes {noted:.2f} us of {looked_up:.0f} us: "
            f"{share:.2%}; on average, without a pause between look-ups, {with_selecting:.2%}"
        )


def shares(rounds: int) -> list[Share]:
    """Look up and note in turns, without a pause; what the daemon does afterwards is not timed."""
    with BenchDaemon(arena_bytes_for(max(DIGESTS)), checksums=False, prefault=False) as daemon:
        space = daemon.client.attach(MANIFEST)
        fill(space, max(DIGESTS))
        return [_share(space, prefix(0, count), rounds) for count in DIGESTS]


def _share(space: Space, digests: Sequence[Digest], rounds: int) -> Share:
    reuse = Reuse()
    noting: list[float] = []
    looking: list[float] = []
    waited = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        assert space.lookup(digests).hits == len(digests), "all are there"
        looking.append(time.perf_counter() - began)
        # As in the daemon, each look-up has a frame and a list of its own.
        asked = list(digests)
        frame = encode(Lookup(1, 1, 0, asked))
        began = time.perf_counter()
        reuse.looked_up(0, asked, CHUNK_BYTES, frame)
        noting.append(time.perf_counter() - began)
        waited += looking[-1]
        if waited > REUSE_PAUSE_SECONDS:
            waited = 0.0
            reuse.work(REUSE_BATCH)
    medians = statistics.median(noting), statistics.median(looking)
    means = statistics.fmean(noting), statistics.fmean(looking)
    return Share(len(digests), medians[0], means[0], medians[1], means[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--traffic", default="chat,programs", help=", ".join(TRAFFIC))
    parser.add_argument("--chunks", type=int, default=16_000)
    parser.add_argument("--lookups", type=int, help="measure what noting so many of them takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.lookups:
        for one in shares(arguments.lookups):
            print(one)
        return
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
