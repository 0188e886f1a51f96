"""Scenes of chunks that are encoded in device memory, and of the heads that go there behind it.

The same on the stand-in and on a GPU, as those of `tests.support.device`. Where chunks stay is
memory of the device, filled with rubbish at first.
"""

from __future__ import annotations

import numpy as np

from kvstore.client.coding import Coding
from kvstore.compression.container import open_container
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.shapes import Encoded
from kvstore.errors import ContainerError
from kvstore.gpu.device import StuckError
from kvstore.gpu.heads import Desk, Heads
from kvstore.gpu.lanes import LaneSettings, LoadLane, StoreLane
from kvstore.gpu.standin import Standin
from kvstore.gpu.transfers import Moved, Transfer
from kvstore.hashing import block_digests
from tests.support.device import PAGES, PAGES_PER_CHUNK, RUBBISH, World

PLACES = 4


class Pooled:
    """A world whose chunks stay in device memory: *count* places behind one another."""

    def __init__(self, world: World, told: LaneSettings, *, desk: type[Desk] = Desk) -> None:
        self.world = world
        self.size = world.form.size_bytes
        self.memory = world.device.allocate(PLACES * self.size)
        self.rub_out()
        self.stores = StoreLane(world.device, world.layout, world.windows, world.counters, told)
        self.loads = LoadLane(world.device, world.layout, world.windows, world.counters, told)
        policy = CodecPolicy(codec=world.codec, edge_layers=0, sinks=1)
        self.coding = Coding(world.manifest, world.manifest.all_heads, policy)
        kind = type("SomeHeads", (Heads,), {"desk_type": desk})
        self.store_heads: Heads = kind(world.device, self.stores)
        self.load_heads: Heads = kind(world.device, self.loads)

    def place(self, number: int) -> int:
        return self.memory.address + number * self.size

    def stored(self, number: int) -> np.ndarray:
        """Return what place *number* holds now."""
        return self.world.get(self.place(number), self.size)

    def rub_out(self) -> None:
        """Have other bytes there."""
        self.world.put(self.memory.address, np.full(PLACES * self.size, RUBBISH, np.uint8))

    def close(self) -> None:
        self.stores.close()
        self.loads.close()
        for heads in (self.store_heads, self.load_heads):
            heads.close()
        self.world.windows.close()

    def compute(self, count: int) -> tuple[list[np.ndarray], list[list[int]]]:
        """Have the engine compute *count* chunks; return them and their pages."""
        chosen = self.world.rng.permutation(PAGES)[: count * PAGES_PER_CHUNK]
        pages: list[list[int]] = chosen.reshape(count, -1).tolist()
        contents = [self.world.content() for _ in pages]
        for content, some in zip(contents, pages, strict=True):
            self.world.write(content, some)
        return contents, pages

    def encode(self, pages: list[list[int]]) -> Transfer:
        moved = [Moved(some, self.place(n), on_device=True) for n, some in enumerate(pages)]
        return self.stores.begin(moved, self.world.fence(), form=self.world.form)

    def head_of(self, reports: np.ndarray) -> bytes:
        found = [
            Encoded(0, float(report["error"]), float(report["energy"]), not report["broken"])
            for report in reports
        ]
        return self.coding.head_of(found, is_first=True)


def store_scene(pooled: Pooled) -> bool:
    """Encode chunks where they stay and put their heads there; others read them at once."""
    world = pooled.world
    contents, pages = pooled.compute(2)
    transfer = pooled.encode(pages)
    digests = transfer.finish()
    assert digests is not None
    assert transfer.reports is not None
    heads = [pooled.head_of(reports) for reports in transfer.reports]
    step = pooled.store_heads.put([pooled.place(0), pooled.place(1)], heads, pooled.size)
    step.finish()
    assert step.digests is not None
    good = True
    for number, content in enumerate(contents):
        found, (expected, errors) = pooled.stored(number), world.stored(content)
        start = world.form.head_bytes
        good &= bool(np.array_equal(found[start:], expected[start:]))
        good &= found[:start].tobytes() == heads[number]
        good &= step.digests[number].tolist() == list(block_digests(found.tobytes()))
        good &= np.allclose(errors_in(found, len(errors)), errors, rtol=1e-2)
    return good


def errors_in(container: np.ndarray, sections: int) -> list[float]:
    """Return the errors of sections that a container's table tells of."""
    try:
        found = open_container(container.tobytes()).sections
    except ContainerError:
        return [float("inf")] * sections
    return [section.relative_error for section in found]


def fetch_scene(pooled: Pooled, *, steps: int = 2) -> bool:
    """Fetch heads, step by step; the moment that one has ended, others may store there."""
    world = pooled.world
    containers = [world.stored(world.content())[0] for _ in range(PLACES)]
    good, size = True, world.form.head_bytes
    for numbers in ([2, 0, 3], [1])[:steps]:
        for number in numbers:
            world.put(pooled.place(number), containers[number])
        step = pooled.load_heads.fetch([pooled.place(number) for number in numbers], size)
        step.finish()
        pooled.rub_out()
        for number, head in zip(numbers, step.fetched, strict=True):
            good &= bool(np.array_equal(head, containers[number][:size]))
    return good


def stuck_scene(pooled: Pooled) -> bool:
    """Give up heads that are stuck; their room is used again when they are over, not before."""
    world, device = pooled.world, pooled.world.device
    assert isinstance(device, Standin), "no other can be told to be stuck"
    pooled.store_heads.fetch([pooled.place(0)], world.form.head_bytes).finish()  # has its stream
    _, pages = pooled.compute(2)
    transfer = pooled.encode(pages)
    transfer.finish()
    assert transfer.reports is not None
    heads = [pooled.head_of(reports) for reports in transfer.reports]
    if world.rng.integers(2):
        device.stall()
    step = pooled.store_heads.put([pooled.place(0), pooled.place(1)], heads, pooled.size)
    device.stall()
    try:
        step.finish()
    except StuckError:
        polls = 0
        while not step.is_over():
            polls += 1
            if polls == 10:
                device.resume()
    kept = np.full(PLACES * pooled.size, 0x33, np.uint8)
    world.put(pooled.memory.address, kept)
    device.resume()
    device.drain()
    return bool(np.array_equal(world.get(pooled.memory.address, kept.size), kept))
