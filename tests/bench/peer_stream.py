"""Hand-offs from one daemon to another over TCP on loopback, beside a raw stream in the same run.

`python -m tests.bench.peer_stream [--rounds N] [--sizes 1,8,32] [--total MIB] [--transport nixl]`

The floor is two processes with as many connections as two daemons use, sendmsg on one side and
recv_into on the other, between memory that is mapped: the same bytes, nothing checked. Rounds
are interleaved, so that both see the same machine; each shows its median, and the ratio is of
the medians. The hand-off has been closed before the consumer asks: what is timed is the stream
alone, from the first request to the last chunk that can be loaded.

With `--transport nixl` two more daemons hand over the same by NIXL, in the same rounds, and it
fails when a batch of theirs has come by TCP. `UCX_TLS=tcp` keeps it off shared memory, which no
two hosts have.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from kvstore.client.sync import Client, Space
from kvstore.limits import MIB, PEER_LANES, PEER_SOCKET_BUFFER_BYTES
from kvstore.transfer.arena import Arena
from kvstore.types import Digest
from tests.support.hosts import called, caller, free_port
from tests.support.making import make_digests, opaque_manifest, sources_of
from tests.support.waiting import wait_until

_STORE_AT_ONCE = 8
_PATIENCE_SECONDS = 60.0


def send_raw(port: int, chunk_bytes: int, chunks: int, orders: Connection) -> None:
    """In a process of its own: send all chunks over every lane's share, once an order."""
    arena = Arena.create(chunk_bytes * chunks)
    fill(arena)
    lanes = [socket.create_connection(("127.0.0.1", port)) for _ in range(PEER_LANES)]
    for lane in lanes:
        lane.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PEER_SOCKET_BUFFER_BYTES)
    orders.send("ready")
    while orders.recv() == "go":
        in_threads([(send_share, lane, share(arena, n)) for n, lane in enumerate(lanes)])
    for lane in lanes:
        lane.close()
    arena.close()


def send_share(lane: socket.socket, view: memoryview) -> None:
    sent = 0
    while sent < len(view):
        sent += lane.sendmsg([view[sent : sent + 8 * MIB]])


def receive_share(lane: socket.socket, view: memoryview) -> None:
    got = 0
    while got < len(view):
        got += lane.recv_into(view[got : got + 8 * MIB], 0, socket.MSG_WAITALL)


def share(arena: Arena, number: int) -> memoryview:
    size = arena.size_bytes // PEER_LANES
    return arena.view[number * size : (number + 1) * size]


def fill(arena: Arena) -> None:
    """Write to all of it, so that it is there."""
    for start in range(0, arena.size_bytes, MIB):
        arena.view[start : start + MIB] = bytes([start // MIB % 251]) * MIB


def in_threads(works: Sequence[tuple[object, ...]]) -> None:
    threads = [threading.Thread(target=one[0], args=one[1:]) for one in works]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class RawStream:
    """The floor: a process that sends, and this one that receives."""

    def __init__(self, chunk_bytes: int, chunks: int) -> None:
        self._arena = Arena.create(chunk_bytes * chunks)
        fill(self._arena)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PEER_SOCKET_BUFFER_BYTES)
            port = listener.getsockname()[1]
            self._orders, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("spawn")
            self._sender = context.Process(
                target=send_raw, args=(port, chunk_bytes, chunks, theirs), daemon=True
            )
            self._sender.start()
            self._lanes = [listener.accept()[0] for _ in range(PEER_LANES)]
        assert self._orders.recv() == "ready"

    def run(self) -> float:
        """Return the bytes per second of one round."""
        started = time.perf_counter()
        self._orders.send("go")
        in_threads([(receive_share, x, share(self._arena, n)) for n, x in enumerate(self._lanes)])
        return self._arena.size_bytes / (time.perf_counter() - started)

    def close(self) -> None:
        self._orders.send("end")
        self._sender.join()
        for lane in self._lanes:
            lane.close()
        self._arena.close()


class Handed:
    """A producer at one daemon, a consumer at another, and chunks that only the first has."""

    def __init__(self, producer: Space, consumer: Space, digests: Sequence[Digest]) -> None:
        self._producer = producer
        self._consumer = consumer
        self._digests = list(digests)
        self._round = 0

    def run(self) -> float:
        """Return the bytes per second of one round."""
        self._round += 1
        name = f"round {self._round} of {len(self._digests)}"
        self._producer.handoffs.open(name)
        self._producer.handoffs.publish(name, 0, self._digests)
        self._producer.handoffs.close(name)
        started = time.perf_counter()
        came = 0
        while came < len(self._digests):
            ready = self._consumer.handoffs.wait(
                name, came, timeout_seconds=_PATIENCE_SECONDS, peer="prefill"
            )
            came += len(ready.digests)
            assert came == len(self._digests) or not ready.is_last, f"{came} chunks came"
        seconds = time.perf_counter() - started
        self._consumer.handoffs.leave(name, peer="prefill")
        self._forget()
        return len(self._digests) * self._consumer.manifest.chunk_bytes / seconds

    def _forget(self) -> None:
        """Let the consumer's side have none of them again."""
        left = self._digests
        while left:
            done = self._consumer.delete(left)
            left = left if done.busy else []


@contextmanager
def handing_over(
    transport: str, chunk_bytes: int, chunks: int, directory: Path
) -> Generator[Handed]:
    """Have two daemons, and chunks at the first of them, that are handed over by *transport*."""
    capacity = f"{chunk_bytes * chunks * 5 // 4 // MIB + 64}MiB"
    settings = {"tiers.host.capacity": capacity, "peer.transport": transport}
    settings["peer.insecure"] = str(transport == "nixl").lower()
    port = free_port()
    manifest = opaque_manifest(chunk_bytes, model=f"stream {chunk_bytes}")
    digests = make_digests(chunks)
    directory.mkdir()
    with (
        called(directory / "prefill", port, settings) as prefill,
        caller(directory / "decode", port, settings) as decode,
        prefill.connect() as one,
        decode.connect() as other,
    ):
        producer, consumer = one.attach(manifest), other.attach(manifest)
        for start in range(0, chunks, _STORE_AT_ONCE):
            some = digests[start : start + _STORE_AT_ONCE]
            parent = digests[start - 1] if start else None
            producer.store(some, sources_of(manifest, some), parent=parent)
        for client in (one, other):
            wait_until(partial(_is_up, client, transport), what=f"{transport} is there")
        yield Handed(producer, consumer, digests)
        stats = other.stats()
        assert not stats.counters["peer_nixl_fallbacks"], f"some came by {stats.peer_transport}"
        if transport == "nixl":
            print(f"  {stats.peer_transport}")


def _is_up(client: Client, transport: str) -> bool:
    return client.stats().peer_transport.startswith(transport)


def measure(
    transports: Sequence[str], chunk_bytes: int, chunks: int, rounds: int, directory: Path
) -> list[float]:
    """Return the medians of hand-offs by each of *transports*, and of the floor, in bytes/s."""
    with ExitStack() as stack:
        runs = [
            stack.enter_context(handing_over(one, chunk_bytes, chunks, directory / one)).run
            for one in transports
        ]
        raw = RawStream(chunk_bytes, chunks)
        runs.append(raw.run)
        for run in runs:
            run()
        found = [[run() for run in runs] for _ in range(rounds)]
        raw.close()
    return [statistics.median(one) for one in zip(*found, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", default="1,8,32", help="MiB of a chunk, comma-separated")
    parser.add_argument("--transport", choices=["tcp", "nixl"], default="tcp")
    parser.add_argument("--total", type=int, default=512, help="MiB of one round")
    options = parser.parse_args()
    transports = ["tcp"] if options.transport == "tcp" else ["tcp", options.transport]
    print(f"{options.total} MiB a round, {PEER_LANES} connections, on loopback, GB/s (of raw TCP)")
    print(f"{'chunk':>8}  " + "".join(f"{one:>8}        " for one in transports) + f"{'raw':>8}")
    for size in [int(size) * MIB for size in options.sizes.split(",")]:
        with tempfile.TemporaryDirectory() as directory:
            chunks = options.total * MIB // size
            *ours, floor = measure(transports, size, chunks, options.rounds, Path(directory))
        shown = "".join(f"{one / 1e9:8.2f} ({one / floor:4.2f}) " for one in ours)
        print(f"{size // MIB:>4} MiB  {shown} {floor / 1e9:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
