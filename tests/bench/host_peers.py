"""The host tier beside its peers: paged KV from one engine to another, on a machine without a GPU.

`python -m tests.bench.host_peers [--lmcache PATH/TO/bin/lmcache] [--mooncake PATH/TO/PYTHON]
[--shape llama-8b|qwen2.5-0.5b|lookups] [--rounds 7]`

One engine stores requests of 1, 4 and 8 chunks of 256 tokens in shuffled pages of 16; another,
with memory of its own, looks them up and loads them, and every byte is compared. A pass goes once
over 192 or 256 MiB, so that little of it is found in the caches; its median request counts. Rounds
alternate between the stores. Before and behind each of them the bare copy of requests of the same
size is taken, between an engine's pages and shared memory, by kvstore's own copy kernel: its mean
is the floor, and where the two differ by more than 15 %, that turn is dropped. Pages are warm on
all sides: two passes before the first are not counted.

- kvstore: a daemon with default settings, `PrefixCache`; in columns of its own without checksums,
  and with canonical chunks, whose heads are put outermost while they are copied (the other columns
  store pages as they are).
- LMCache: its standalone server without further tiers, on CPU tensors in shared memory
  (`lmcache_driven`, its fastest way there), with one and with two OpenMP threads; malloc keeps what
  it was given, and threads wait passively. No checksums. A look-up sends token ids, which the
  server hashes: there are no keys to have ready.
- Mooncake: master, standalone client, and dummy clients over shared memory, zero-copy calls on
  lists of pages; no checksums, as is its default. Its look-up says of every key whether it exists.

Neither peer is installed with kvstore: `mooncake-transfer-engine-non-cuda==0.3.13.post1` and NumPy
into an environment of its own (with libibverbs1, libnuma1, libcurl4, libnl-route-3-200), and
`lmcache==0.5.6` into another. What is not given is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from deploy.demo.daemon import running_daemon, stop
from kvstore.bench.report import Figures, machine, print_heading, print_json, print_table
from kvstore.bench.shapes import Pool, Shape as BareShape
from kvstore.limits import MIB
from kvstore.transfer.copies import Runs, gather, scatter
from tests.bench.host_engines import CHUNK_PAGES, CHUNK_TOKENS, PASSES_MAX, STEP_BYTES, Settings
from tests.bench.lmcache_server import environment, lmcache_server
from tests.support.redis import free_port
from tests.support.waiting import wait_until

ENGINES: Final = Path(__file__).with_name("host_engines.py")
BATCHES: Final = (1, 4, 8)
LOOK_UPS: Final = (16, 256, 4096)
DRIFT_MAX: Final = 0.15
WARM_UPS: Final = 2
REQUESTS_MAX: Final = 24
ANSWER_SECONDS: Final = 120.0
STOP_SECONDS: Final = 15.0


class Shape(NamedTuple):
    """A model as far as copies go: a plane is the keys or the values of a layer."""

    layers: int
    heads: int
    head_dim: int
    blocks: int

    def settings(self, **more: Any) -> Settings:
        return Settings(**self._asdict(), **more)

    @property
    def chunk_bytes(self) -> int:
        return 2 * self.layers * self.heads * self.head_dim * 2 * CHUNK_TOKENS

    @property
    def pool_bytes(self) -> int:
        return self.chunk_bytes * self.blocks // CHUNK_PAGES

    def requests(self, chunks: int) -> int:
        """Return how many requests of so many chunks a pass has."""
        return min(self.blocks // CHUNK_PAGES // chunks, REQUESTS_MAX)


SHAPES: Final = {
    "llama-8b": Shape(layers=32, heads=8, head_dim=128, blocks=128),  # 32 KiB runs, 32 MiB chunks
    "qwen2.5-0.5b": Shape(layers=24, heads=2, head_dim=64, blocks=1024),  # 4 KiB runs, 3 MiB chunks
    "lookups": Shape(layers=1, heads=1, head_dim=8, blocks=4096 * CHUNK_PAGES),
}


class Engine:
    """An engine in a process of its own."""

    def __init__(
        self, python: str, kind: str, settings: Settings, env: Mapping[str, str], log: Path
    ) -> None:
        self._log = log
        module = ["-m", "tests.bench.host_engines"] if kind == "kvstore" else [str(ENGINES)]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [python, *module, kind, json.dumps(asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=dict(env),
                bufsize=0,
            )
        self._read_answer()

    def do(self, what: str, **arguments: object) -> Figures:
        """Have it do something, and return its answer."""
        line = json.dumps({"do": what, **arguments}) + "\n"
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode())
        return self._read_answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._process.kill()
        self._process.wait()

    def _read_answer(self) -> Figures:
        assert self._process.stdout is not None
        line, ends_at = b"", time.monotonic() + ANSWER_SECONDS
        while not line.endswith(b"\n"):
            left = max(ends_at - time.monotonic(), 0)
            ready, _, _ = select.select([self._process.stdout], [], [], left)
            part = os.read(self._process.stdout.fileno(), 1 << 20) if ready else b""
            if not part:
                self._process.kill()
                words = self._log.read_text(errors="replace")[-3000:]
                raise SystemExit(f"an engine gave no answer; {self._log}:\n{words}")
            line += part
        answer: Figures = json.loads(line)
        return answer


class Store(NamedTuple):
    """One store, with the engine that stores and the one that loads."""

    name: str
    writer: Engine
    reader: Engine


@dataclass(slots=True)
class Turns:
    """What one store did with requests of one size in one direction, turn by turn."""

    seconds: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


# --- starting what is compared ---------------------------------------------------------


class Starter:
    """Starts stores and their engines, all of which end with *stack*."""

    def __init__(self, stack: ExitStack, shape: Shape, folder: Path) -> None:
        self._stack = stack
        self._shape = shape
        self._folder = folder
        self._contents = folder / "contents"
        self._pool_mib = -(-shape.pool_bytes // MIB)
        rng = np.random.default_rng(0)
        rng.integers(0, 256, shape.pool_bytes + PASSES_MAX * STEP_BYTES, dtype=np.uint8).tofile(
            self._contents
        )

    def kvstore(self, name: str, *, checksum: str = "xxh3", canonical: bool = False) -> Store:
        """A daemon with default settings, but for the checksums."""
        capacity = self._pool_mib + self._pool_mib // 8 + 16
        settings = [f"tiers.host.capacity={capacity}MiB", f"tiers.host.checksum={checksum}"]
        socket, process = self._stack.enter_context(running_daemon(settings))
        python = (sys.executable, "kvstore", os.environ)
        return self._engines(name, python, str(socket), [process.pid], canonical=canonical)

    def lmcache(self, program: Path, threads: int) -> Store:
        """LMCache's server with so many OpenMP threads."""
        env = environment(threads)
        log = self._folder / f"lmcache-{threads}.log"
        ports, process = self._stack.enter_context(lmcache_server(program, log, env, l1_gib=1))
        python = (str(program.with_name("python")), "lmcache", env)
        name = f"LMCache, {threads} OpenMP thread{'s' if threads > 1 else ''}"
        return self._engines(name, python, f"tcp://127.0.0.1:{ports.engines}", [process.pid])

    def mooncake(self, python: Path) -> Store:
        """Mooncake's master, and the client that owns the memory."""
        env = os.environ | {"MC_LOG_LEVEL": "WARNING", "GLOG_minloglevel": "1"}
        master, metrics, client = free_port(), free_port(), free_port()
        at = f"127.0.0.1:{master}"
        log = self._folder / "mooncake.log"
        processes = [
            self._run(
                [
                    *(python.with_name("mooncake_master"), "--rpc_address", "127.0.0.1"),
                    *("--rpc_port", master, "--metrics_host", "127.0.0.1"),
                    *("--metrics_port", metrics),
                ],
                env,
                log,
                master,
            ),
            self._run(
                [
                    *(python.with_name("mooncake_client"), "--host", "127.0.0.1"),
                    *("--port", client, "--master_server_address", at, "--protocol", "tcp"),
                    *("--metadata_server", "P2PHANDSHAKE", "--threads", 2),
                    *("--global_segment_size", f"{self._pool_mib * 5 // 4 + 64} MB"),
                ],
                env,
                log,
                client,
            ),
        ]
        pids = [process.pid for process in processes]
        return self._engines(
            "Mooncake", (str(python), "mooncake", env), f"127.0.0.1:{client}", pids
        )

    def _run(
        self, command: Sequence[object], env: Mapping[str, str], log: Path, port: int
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=env)
        self._stack.callback(stop, process, STOP_SECONDS)
        wait_until(lambda: _listens(process.pid, port), what=f"{command[0]} listens; {log}")
        return process

    def _engines(
        self,
        name: str,
        python: tuple[str, str, Mapping[str, str]],
        address: str,
        servers: list[int],
        *,
        canonical: bool = False,
    ) -> Store:
        program, kind, env = python
        engines = []
        for role in (0, 1):
            settings = self._shape.settings(
                contents=str(self._contents),
                address=address,
                servers=servers,
                role=role,
                canonical=canonical,
            )
            log = self._folder / f"{kind}-engine.log"
            engines.append(Engine(program, kind, settings, env, log))
            self._stack.callback(engines[-1].close)
        return Store(name, *engines)


def _listens(process: int, port: int) -> bool:
    lines = Path(f"/proc/{process}/net/tcp").read_text().splitlines()[1:]
    states = {line.split()[1].rsplit(":")[1]: line.split()[3] for line in lines}
    return states.get(f"{port:04X}") == "0A"


# --- measuring -------------------------------------------------------------------------


class BareCopy:
    """The same bytes between an engine's pages and shared memory, with nothing around it."""

    def __init__(self, shape: Shape) -> None:
        count = shape.blocks // CHUNK_PAGES
        heads = shape.heads * shape.head_dim // 128  # as many bytes a token
        bare = BareShape("bare", shape.layers, heads, CHUNK_TOKENS)
        self._runs = Pool(count * bare.chunk_bytes).chunks(bare, "whole pages", count)
        self._shared = mmap.mmap(-1, count * bare.chunk_bytes)
        room = memoryview(self._shared)
        size = bare.chunk_bytes
        self._parts = [room[at : at + size] for at in range(0, count * size, size)]
        self.seconds(count, 1)  # faults it in

    def seconds(self, requests: int, chunks: int) -> dict[str, float]:
        """Return the median seconds of a request of so many chunks, in and out."""
        pairs = list(zip(self._parts, self._runs, strict=True))
        parts = [pairs[n * chunks : (n + 1) * chunks] for n in range(requests)]
        ins = [
            self._timed(part, lambda room, runs: gather(room, runs, checksums=False))
            for part in parts
        ]
        outs = [
            self._timed(part, lambda room, runs: scatter(runs, room, checksums=False))
            for part in parts
        ]
        return {"store": statistics.median(ins), "load": statistics.median(outs)}

    @staticmethod
    def _timed(
        part: Sequence[tuple[memoryview, Runs]], copy: Callable[[memoryview, Runs], object]
    ) -> float:
        began = time.perf_counter()
        for room, runs in part:
            copy(room, runs)
        return time.perf_counter() - began


def measure(shape: Shape, stores: Sequence[Store], rounds: int) -> Iterator[Figures]:
    """Yield a row for every size of request, direction and store."""
    bare = BareCopy(shape)
    turns = {
        (chunks, store.name, side): Turns()
        for chunks in BATCHES
        for store in stores
        for side in ("store", "load")
    }
    number = 0
    for at in range(-WARM_UPS, rounds):
        for chunks in BATCHES:
            size = {"requests": shape.requests(chunks), "chunks": chunks}
            before = bare.seconds(**size)
            # Each is the first as often as the others.
            first = at % len(stores)
            for store in (*stores[first:], *stores[:first]):
                number += 1
                took = _turn(store, number, size)
                behind = bare.seconds(**size)
                if at >= 0:
                    for side in ("store", "load"):
                        _note(
                            turns[chunks, store.name, side], took[side], before[side], behind[side]
                        )
                before = behind
        print(f"round {at + 1} of {rounds}", file=sys.stderr, flush=True)
    for (chunks, name, side), noted in turns.items():
        row = _row(noted, chunks * shape.chunk_bytes, shape.requests(chunks))
        yield {"chunks": chunks, "side": side, "store": name} | row


def _turn(store: Store, number: int, size: Mapping[str, int]) -> dict[str, Figures]:
    store.writer.do("fill", number=number)
    stored = store.writer.do("do_store", number=number, **size)
    loaded = store.reader.do("do_load", number=number, **size)
    store.writer.do("clear")
    return {"store": stored, "load": loaded}


def _note(turns: Turns, took: Figures, before: float, behind: float) -> None:
    turns.seconds.append(statistics.median(took["seconds"]))
    turns.floors.append((before + behind) / 2)
    turns.drifts.append(abs(behind / before - 1))
    turns.cpu.append(took["cpu"])


def _row(turns: Turns, size_bytes: int, requests: int) -> Figures:
    kept = [at for at, drift in enumerate(turns.drifts) if drift <= DRIFT_MAX]
    if not kept:
        return {"kept": 0, "turns": len(turns.drifts)}
    seconds = statistics.median(turns.seconds[at] for at in kept)
    floor = statistics.median(turns.floors[at] for at in kept)
    shares = [turns.floors[at] / turns.seconds[at] for at in kept]
    cpu = statistics.median(turns.cpu[at] for at in kept)
    return {
        "ms": seconds * 1e3,
        "gb_per_s": size_bytes / seconds / 1e9,
        "floor_ms": floor * 1e3,
        "share": statistics.median(shares),
        "cpu_s_per_gb": cpu / (requests * size_bytes) * 1e9,
        "kept": len(kept),
        "turns": len(turns.drifts),
    }


def measure_look_ups(stores: Sequence[Store], rounds: int) -> Iterator[Figures]:
    """Yield a row for every number of keys and store: all of them hit."""
    most = max(LOOK_UPS)
    found: dict[tuple[int, str, str], list[float]] = {}
    for store in stores:
        store.writer.do("fill", number=1)
        store.writer.do("do_store", number=1, requests=1, chunks=most)
    for at in range(rounds):
        for asked in LOOK_UPS:
            for store in stores:
                times = max(3, 1024 // asked)
                answer = store.reader.do("do_find", number=1, chunks=most, asked=asked, times=times)
                for kind, seconds in answer.items():
                    found.setdefault((asked, store.name, kind), []).extend(seconds)
        print(f"round {at + 1} of {rounds}", file=sys.stderr, flush=True)
    for (asked, name, kind), seconds in found.items():
        quartiles = statistics.quantiles(seconds, n=4)
        yield {
            "keys": asked,
            "store": name,
            "from": kind,
            "ms": statistics.median(seconds) * 1e3,
            "low_ms": quartiles[0] * 1e3,
            "high_ms": quartiles[2] * 1e3,
        }


# --- printing --------------------------------------------------------------------------

COLUMNS: Final = {
    "chunks": "chunks",
    "side": "direction",
    "store": "store",
    "ms": "ms",
    "gb_per_s": "GB/s",
    "floor_ms": "bare copy ms",
    "share": "share of it",
    "cpu_s_per_gb": "CPU s/GB, all processes",
    "kept": "turns kept",
    "turns": "of",
}
LOOK_UP_COLUMNS: Final = {
    "keys": "keys",
    "store": "store",
    "from": "from",
    "ms": "ms",
    "low_ms": "lower quartile",
    "high_ms": "upper quartile",
}


def main(words: Sequence[str]) -> None:
    chosen = _parse(words)
    # Whoever ends this ends all that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    shape = SHAPES[chosen.shape]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        start = Starter(stack, shape, folder)
        stores = [start.kvstore("kvstore")]
        if chosen.shape != "lookups":
            stores.append(start.kvstore("kvstore, no checksums", checksum="off"))
        if chosen.shape == "llama-8b":
            stores.append(start.kvstore("kvstore, canonical", canonical=True))
        if chosen.lmcache is not None:
            threads = (1,) if chosen.shape == "lookups" else (1, 2)
            stores += [start.lmcache(chosen.lmcache.absolute(), count) for count in threads]
        if chosen.mooncake is not None:
            stores.append(start.mooncake(chosen.mooncake.absolute()))
        if chosen.shape == "lookups":
            rows = list(measure_look_ups(stores, chosen.rounds))
        else:
            rows = list(measure(shape, stores, chosen.rounds))
    if chosen.json:
        print_json({"machine": machine(), "shape": chosen.shape, "rows": rows})
        return
    print_heading(f"{chosen.shape}: {machine()}")
    print_table(LOOK_UP_COLUMNS if chosen.shape == "lookups" else COLUMNS, rows)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="host_peers")
    parser.add_argument("--lmcache", type=Path, help="LMCache's program, 0.5.6")
    parser.add_argument("--mooncake", type=Path, help="a Python with Mooncake, 0.3.13.post1")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


if __name__ == "__main__":
    main(sys.argv[1:])
