"""Two daemons in network namespaces of their own, with a shaped link between them: what streaming
a hand-off saves against moving it afterwards, and against computing the prompt again.

`python -m tests.bench.two_hosts [--gbits 1,10] [--codecs raw,int4kv] [--prefill SECONDS]` (root)

Prefill is a producer that stores a chunk every so often, as chunked prefill would. Decode is
ready when the last chunk can be loaded at its host. *streamed* follows from the start, *afterwards*
asks when prefill has ended, *recompute* is prefill's own time once more. All from prefill's start.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kvstore.client.sync import Space
from kvstore.protocol.manifest import Manifest
from kvstore.types import Digest
from tests.support.daemon import Daemon
from tests.support.hosts import called, caller
from tests.support.making import make_digests, make_manifest, runs_of

_PORT = 7412
_NAMES = ("kvprefill", "kvdecode")
_ADDRESSES = ("10.231.7.1", "10.231.7.2")
_CAPACITY = {"tiers.host.capacity": "1GiB", "peer.insecure": "true", "admin.listen": ""}


class Placed(Daemon):
    """A daemon inside a network namespace."""

    def into(self, namespace: str) -> Placed:
        self._command = ["ip", "netns", "exec", namespace, *self._command]
        return self


@contextlib.contextmanager
def link(gbits: float) -> Iterator[None]:
    """Two namespaces with a link of so many Gbit/s between them, for as long as this lasts."""
    a, b = _NAMES
    try:
        for name in _NAMES:
            ip("netns", "add", name)
        ip("link", "add", "kv0", "netns", a, "type", "veth", "peer", "name", "kv0", "netns", b)
        for name, address in zip(_NAMES, _ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/30", "dev", "kv0")
            ip("-n", name, "link", "set", "kv0", "up")
            shape = f"tbf rate {gbits}gbit burst 512kb latency 50ms".split()
            run("tc", "-n", name, "qdisc", "add", "dev", "kv0", "root", *shape)
        yield
    finally:
        for name in _NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ip(*words: str) -> None:
    run("ip", *words)


def run(*words: str) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")


def produce(
    space: Space, name: str, digests: Sequence[Digest], payload: bytes, prefill_seconds: float
) -> None:
    """Store and publish a chunk at a time, so that all takes *prefill_seconds*."""
    started = time.monotonic()
    for number, digest in enumerate(digests):
        due = started + (number + 1) * prefill_seconds / len(digests)
        time.sleep(max(0.0, due - time.monotonic()))
        parent = digests[number - 1] if number else None
        space.handoffs.publish(name, number, [digest])
        space.store([digest], runs_of([payload]), parent=parent)
    space.handoffs.close(name)


def follow(space: Space, name: str, count: int) -> None:
    came = 0
    while came < count:
        ready = space.handoffs.wait(name, came, timeout_seconds=60.0, peer="prefill", early=True)
        came += len(ready.digests)
        if ready.is_last and came < count:
            raise SystemExit(f"{name}: {came} of {count} chunks came")


def time_one(
    spaces: tuple[Space, Space], prompt: int, chunks: int, payload: bytes, seconds: float,
    *, streamed: bool,
) -> float:  # fmt: skip
    """Return the time from prefill's start until decode has all of it."""
    producer, consumer = spaces
    digests, name = make_digests(chunks, prompt), f"prompt {prompt}"
    started = time.monotonic()
    producer.handoffs.open(name)
    prefill = threading.Thread(target=produce, args=(producer, name, digests, payload, seconds))
    prefill.start()
    if not streamed:
        prefill.join()
    follow(consumer, name, chunks)
    took = time.monotonic() - started
    prefill.join()
    consumer.handoffs.leave(name, peer="prefill")
    return took


def model(codec: str) -> Manifest:
    """Return the manifest of an 8B model's chunks of 64 tokens: 8 MiB as they are."""
    return make_manifest(
        model="two hosts", codec=codec, layers=32, kv_heads=8, head_dim=128, chunk_tokens=64
    )


def measure(directory: Path, codec: str, chunks: int, seconds: float) -> tuple[float, float, float]:
    """Return streamed and afterwards, in seconds, and MiB of one prompt as it travels."""
    manifest = model(codec)
    plain = np.random.default_rng(7).standard_normal(
        manifest.plain_bytes(manifest.all_heads) // 2, np.float32
    )
    payload = (plain.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    way = {"peers.prefill.url": f"tcp://{_ADDRESSES[0]}:{_PORT}"}
    here = called(directory / "a", _PORT, {"peer.listen": f"0.0.0.0:{_PORT}"} | _CAPACITY)
    there = caller(directory / "b", _PORT, way | _CAPACITY)
    for daemon, name in ((here, _NAMES[0]), (there, _NAMES[1])):
        Placed.into(daemon, name)  # type: ignore[arg-type]  # it adds to the command alone
    with here, there, here.connect() as one, there.connect() as other:
        spaces = one.attach(manifest), other.attach(manifest)
        time_one(spaces, 0, 2, payload, 0.1, streamed=True)
        before = other.stats().counters["peer_received_bytes"]
        streamed = time_one(spaces, 1, chunks, payload, seconds, streamed=True)
        size = (other.stats().counters["peer_received_bytes"] - before) / 2**20
        afterwards = time_one(spaces, 2, chunks, payload, seconds, streamed=False)
    return streamed, afterwards, size


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gbits", default="1,10")
    parser.add_argument("--codecs", default="raw,int4kv")
    parser.add_argument("--chunks", type=int, default=16, help="of 64 tokens")
    parser.add_argument("--prefill", type=float, default=2.0, help="seconds for all of them")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("namespaces need root")
    print(f"{options.chunks} chunks, prefill {options.prefill} s; seconds from prefill's start")
    print(
        f"{'link':>8} {'codec':>7} {'MiB':>6} {'streamed':>9} {'afterwards':>10} {'recompute':>9}"
    )
    for gbits in [float(text) for text in options.gbits.split(",")]:
        for codec in options.codecs.split(","):
            with tempfile.TemporaryDirectory() as directory, link(gbits):
                streamed, afterwards, size = measure(
                    Path(directory), codec, options.chunks, options.prefill
                )
            figures = f"{streamed:9.2f} {afterwards:10.2f} {2 * options.prefill:9.2f}"
            print(f"{gbits:>3g} Gbit/s {codec:>6} {size:6.0f} {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
