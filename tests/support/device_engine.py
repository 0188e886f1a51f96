"""An engine whose pages lie on a stand-in, as `kvstore.client.gpu` serves it.

`python -m tests.support.device_engine SOCKET [stored]` is one that gets stuck while it stores, or
has stored, and says so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from kvstore.client.cache import PrefixCache
from kvstore.client.gpu import DeviceCache
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.shapes import source_type
from kvstore.compression.twins import CODEC_TWINS
from kvstore.errors import KVStoreError
from kvstore.gpu.device import Event, Fence, StuckError
from kvstore.gpu.lanes import LaneSettings
from kvstore.gpu.pages import PageLayout
from kvstore.gpu.standin import Standin
from kvstore.limits import KIB
from kvstore.protocol.manifest import Manifest
from kvstore.types import Digest, HeadRange
from tests.support.making import make_digests, make_manifest, make_payload
from tests.support.waiting import DEADLINE_SECONDS, wait_until

MANIFEST = make_manifest(model="on a device")
PAGE_TOKENS = 4
EACH = MANIFEST.chunk_tokens // PAGE_TOKENS
STREAM = 1
CHUNK_BYTES = MANIFEST.chunk_bytes


def patient(event: Event) -> None:
    """Wait for an event, as long as it takes: every look lets the stand-in get on."""
    for _ in range(1_000_000):
        if event.is_done():
            return
    raise AssertionError("the device does not get done")


class Impatience:
    """Waits for so many polls."""

    def __init__(self, polls: int) -> None:
        self.polls = polls

    def __call__(self, event: Event) -> None:
        if not any(event.is_done() for _ in range(self.polls)):
            raise StuckError("told to lose patience")


class DeviceEngine:
    """Pages for *chunks* chunks, in shuffled order, and the daemon at *socket*."""

    def __init__(
        self,
        socket: Path,
        *,
        seed: int = 0,
        chunks: int = 8,
        device: Standin | None = None,
        settings: LaneSettings | None = None,
        manifest: Manifest = MANIFEST,
        heads: HeadRange | None = None,
        policy: CodecPolicy | None = None,
    ) -> None:
        self.device = device or Standin(np.random.default_rng(seed), twins=CODEC_TWINS)
        self.cache = PrefixCache(
            manifest,
            heads=heads,
            socket=socket,
            name="device",
            timeout_seconds=DEADLINE_SECONDS,
            policy=policy,
        )
        wait_until(lambda: self.cache.is_connected, what="connected")
        self.heads = heads or manifest.all_heads
        row = manifest.head_dim * source_type(manifest.dtype).size_bytes
        self.page_bytes = self.heads.width * PAGE_TOKENS * row
        count = chunks * EACH
        planes = manifest.layers * 2
        self.memory = self.device.allocate(planes * count * self.page_bytes)
        plane_bytes = count * self.page_bytes
        starts = [self.memory.address + plane * plane_bytes for plane in range(planes)]
        self.layout = PageLayout(
            planes=tuple(starts),
            heads=self.heads.width,
            page_tokens=PAGE_TOKENS,
            pages_per_chunk=EACH,
            row_bytes=row,
            page_stride=self.page_bytes,
            token_stride=row,
            head_stride=PAGE_TOKENS * row,
        )
        order = np.random.default_rng(seed).permutation(count)
        self.pages: list[list[int]] = order.reshape(chunks, EACH).tolist()
        self.settings = settings or LaneSettings(
            staging_bytes=4 * self.layout.chunk_bytes, slots=2, wait=patient
        )
        try:
            self.on_gpu = DeviceCache(
                self.cache,
                self.device,
                self.layout,
                settings=self.settings,
                register_step_bytes=80 * KIB,
            )
        except KVStoreError:
            self.cache.close()
            self.memory.free()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.on_gpu.close()
        self.cache.close()

    def fence(self) -> Fence:
        return self.on_gpu.fence(STREAM)

    def put(self, number: int, payload: bytes) -> None:
        """Have the pages of chunk *number* hold *payload*."""
        self._view(number)[:] = self._as_chunk(payload)

    def take(self, number: int) -> bytes:
        """Return what the pages of chunk *number* hold."""
        return bytes(self._view(number).tobytes())

    def store(self, digests: Sequence[Digest]):
        """Compute chunks of the payloads of *digests*, and store them."""
        for number, digest in enumerate(digests):
            self.put(number, make_payload(digest, self.layout.chunk_bytes))
        return self.on_gpu.store(digests, self.pages[: len(digests)], after=self.fence())

    def load(self, digests: Sequence[Digest]) -> int:
        """Load *digests* into pages that held nothing; check those that came."""
        self.memory.view[:] = 0
        loaded = self.on_gpu.load(digests, self.pages[: len(digests)], after=self.fence())
        self.device.drain()
        for number, digest in enumerate(digests[:loaded]):
            assert self.take(number) == make_payload(digest, self.layout.chunk_bytes)
        return loaded

    def _as_chunk(self, payload: bytes) -> np.ndarray:
        shape = (len(self.layout.planes), self.heads.width, EACH, PAGE_TOKENS, -1)
        return np.frombuffer(payload, np.uint8).reshape(shape)

    def _view(self, number: int) -> ChunkView:
        return ChunkView(self, number)


class ChunkView:
    """The pages of one chunk as `[plane][head][page][token][byte]`."""

    def __init__(self, engine: DeviceEngine, number: int) -> None:
        form = (len(engine.layout.planes), -1, engine.heads.width, PAGE_TOKENS)
        self._pages = engine.memory.view.reshape(*form, engine.layout.row_bytes)
        self._numbers = engine.pages[number]

    def __setitem__(self, _: object, chunk: np.ndarray) -> None:
        self._pages[:, self._numbers] = chunk.transpose(0, 2, 1, 3, 4)

    def tobytes(self) -> bytes:
        return np.ascontiguousarray(
            self._pages[:, self._numbers].transpose(0, 2, 1, 3, 4)
        ).tobytes()


def main(socket: str, task: str = "stuck") -> None:
    engine = DeviceEngine(Path(socket))

    def say() -> None:
        sys.stdout.write(f"{task}\n")
        sys.stdout.flush()
        sys.stdin.read()

    def stuck(event: Event) -> None:
        engine.device.stall()
        say()

    if task == "stuck":
        engine.on_gpu._stores.settings = engine.settings._replace(wait=stuck)
    engine.store(make_digests(8))
    say()


if __name__ == "__main__":
    main(*sys.argv[1:])
