"""Engines on a stand-in whose chunks a codec encodes, and what the host makes of the same values.

A *space* is a namespace as one sees it who has no device, with the policy of its codec.

`python -m tests.support.coded_engine SOCKET` is one that has encoded eight chunks where they are
to stay, gets stuck before some of them have their heads, and says so.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.client.sync import Space, StoreReport
from kvstore.compression.chunks import ChunkCodec, decode
from kvstore.compression.container import POSITION_MAX, open_container
from kvstore.compression.floats import narrow
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.shapes import SourceType, source_type
from kvstore.gpu.device import Event
from kvstore.gpu.pages import NOWHERE
from kvstore.types import Digest
from tests.support.daemon import Daemon
from tests.support.device_engine import EACH, PAGE_TOKENS, DeviceEngine, patient
from tests.support.making import make_digests, make_manifest

CodedSpace = tuple[Space, CodecPolicy]
COUNT = 5
DIGESTS = make_digests(COUNT)
POLICIES = {
    "int8kv": CodecPolicy(codec="int8kv"),
    "int4kv": CodecPolicy(codec="int4kv", edge_layers=0, layers={1: "int8kv"}),
    "k8v4": CodecPolicy(codec="k8v4", edge_layers=0, sinks=2),
    "fp8": CodecPolicy(codec="fp8", layers={0: "raw"}),
    "nvfp4": CodecPolicy(codec="nvfp4", edge_layers=0),
    "hq4": CodecPolicy(codec="hq4", edge_layers=0),
    "hq3": CodecPolicy(codec="hq3", edge_layers=0, tail_channels=16),
    "nvfp4-compat": CodecPolicy(codec="nvfp4-compat", edge_layers=0),
    "hq4 in a layer": CodecPolicy(codec="int4kv", edge_layers=0, layers={1: "hq4"}),
    "exp3": CodecPolicy(codec="exp3"),
    "rans": CodecPolicy(codec="rans"),
    "ecsq-mid": CodecPolicy(codec="ecsq-mid", edge_layers=0, sinks=3),
    "ecsq-lo": CodecPolicy(codec="ecsq-lo", edge_layers=0, layers={0: "int8kv"}, tail_channels=16),
}


def engine_of(daemon: Daemon, space: CodedSpace, **words: Any) -> DeviceEngine:
    attached, policy = space
    return DeviceEngine(daemon.socket, manifest=attached.manifest, policy=policy, **words)


def values(number: int, size_bytes: int, source: SourceType = SourceType.BFLOAT16) -> bytes:
    """Return KV that codecs are made for."""
    count = size_bytes // source.size_bytes
    noise = np.random.default_rng(number).standard_normal(count).astype(np.float32)
    return narrow(noise, source).tobytes()


def put(engine: DeviceEngine, count: int = COUNT) -> list[bytes]:
    """Have the pages hold values; return them."""
    source = source_type(engine.cache.manifest.dtype)
    made = [values(number, engine.layout.chunk_bytes, source) for number in range(count)]
    for number, payload in enumerate(made):
        engine.put(number, payload)
    return made


def store(engine: DeviceEngine, digests: list[Digest] = DIGESTS) -> StoreReport:
    pages = engine.pages[: len(digests)]
    return engine.on_gpu.store(digests, pages, after=engine.fence())


def load(engine: DeviceEngine) -> list[bytes]:
    """Load into pages that held nothing; return what came."""
    engine.memory.view[:] = 0
    loaded = engine.on_gpu.load(DIGESTS, engine.pages[:COUNT], after=engine.fence())
    engine.device.drain()
    return [engine.take(number) for number in range(loaded)]


def load_with_gap(engine: DeviceEngine) -> None:
    """Load all chunks, two pages of the first nowhere, into pages that held nothing."""
    engine.memory.view[:] = 0
    pages = [list(each) for each in engine.pages[:COUNT]]
    pages[0][:2] = [NOWHERE, NOWHERE]
    assert engine.on_gpu.load(DIGESTS, pages, after=engine.fence()) == COUNT
    engine.device.drain()


def with_gap(engine: DeviceEngine, chunk: bytes) -> bytes:
    """Return what the pages of the first *chunk* hold then."""
    form = (len(engine.layout.planes), engine.heads.width, EACH, PAGE_TOKENS, -1)
    expected = np.frombuffer(chunk, np.uint8).reshape(form).copy()
    expected[:, :, :2] = 0
    return expected.tobytes()


def stored(space: CodedSpace) -> list[bytes]:
    """Return the containers that the daemon holds."""
    with space[0].load(DIGESTS) as loaded:
        return [bytes(chunk.shards[0].view) for chunk in loaded.chunks]


def by_host(space: CodedSpace, chunks: list[bytes]) -> list[bytes]:
    """Return *chunks* as the host encodes them."""
    attached, policy = space
    codec, heads = ChunkCodec(attached.manifest, policy), attached.manifest.all_heads
    made = []
    for number, chunk in enumerate(chunks):
        room = bytearray(2 * len(chunk) + 4096)
        position = POSITION_MAX if number else 0
        report = codec.encode(chunk, memoryview(room), heads, first_position=position)
        made.append(bytes(room[: report.size_bytes]))
    return made


def assert_alike(found: list[bytes], expected: list[bytes]) -> None:
    """Compare containers, byte by byte but for the last bits of the errors in their tables."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        mine, theirs = open_container(one), open_container(other)
        assert mine.header == theirs.header
        start = mine.header.payload_offset
        assert one[start:] == other[start:]
        for section, same in zip(mine.sections, theirs.sections, strict=True):
            assert section.relative_error == pytest.approx(same.relative_error, rel=1e-3)
            assert replace(section, relative_error=0.0) == replace(same, relative_error=0.0)


def decoded(space: CodedSpace, containers: list[bytes], size_bytes: int) -> list[bytes]:
    manifest, made = space[0].manifest, []
    for container in containers:
        room = bytearray(size_bytes)
        decode(manifest, container, memoryview(room), manifest.all_heads)
        made.append(bytes(room))
    return made


def main(socket: str) -> None:
    manifest = make_manifest(model="headless", codec="int8kv")
    engine = DeviceEngine(Path(socket), manifest=manifest, policy=POLICIES["int8kv"])
    waits = 0

    def stuck(event: Event) -> None:
        nonlocal waits
        waits += 1
        if waits == 1:  # for its encoders
            patient(event)
            return
        engine.device.stall()
        sys.stdout.write("headless\n")
        sys.stdout.flush()
        sys.stdin.read()

    put(engine, 8)
    engine.on_gpu._stores.settings = engine.settings._replace(wait=stuck)
    store(engine, make_digests(8))


if __name__ == "__main__":
    main(*sys.argv[1:])
