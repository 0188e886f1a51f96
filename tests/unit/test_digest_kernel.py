"""The checksum kernel, run on the CPU thread by thread, gives the digests of kvstore.hashing.

So does its twin, which the stand-in runs. Needs g++; on a GPU: tests/gpu/test_transfers.py.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from kvstore.gpu.batches import BATCH
from kvstore.gpu.twins import xxh3_blocks
from kvstore.hashing import block_count, block_digests
from tests.support.kernels import build_host_library

KIB = 1024
SIZES = (
    *(16, 32, 48, 64, 96, 112, 128, 144, 160, 224, 240),  # inputs that have ways of their own
    *(256, 512, KIB, KIB + 16, 2 * KIB, 2 * KIB + 64, 4096 - 16),  # ends of units and of stripes
    *(64 * KIB - 16, 64 * KIB, 64 * KIB + 16, 64 * KIB + 240, 130 * KIB + 48),
)


class Scene:
    """Three chunks in shuffled pieces."""

    def __init__(self, size: int, piece: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.pieces = -(-size // piece)
        room = rng.integers(0, 256, (3 * self.pieces, piece + 16), dtype=np.uint8)
        order = rng.permutation(3 * self.pieces).reshape(3, -1)
        base = room.ctypes.data
        skip = -base % 16
        self.starts = (base + skip + order * room.strides[0]).astype(np.uint64)
        flat = room.reshape(-1)
        self.chunks = [
            np.concatenate([flat[skip + at * room.strides[0] :][:piece] for at in row])[:size]
            for row in order
        ]
        self.found = np.zeros((3, block_count(size)), dtype=np.uint64)
        self.batch = np.zeros(1, dtype=BATCH)
        self.batch["containers"] = self.starts.ctypes.data
        self.batch["reports"] = self.found.ctypes.data
        self.batch["chunk_count"], self.batch["page_count"] = 3, self.pieces
        self.batch["page_stride"], self.batch["extra"] = piece, size
        self.room = room

    def check(self) -> None:
        for chunk, found in zip(self.chunks, self.found, strict=True):
            assert np.array_equal(found, block_digests(chunk.tobytes()))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_host_library("xxh3", tmp_path_factory)


def run(library: ctypes.CDLL, scene: Scene, grid: int) -> None:
    address = ctypes.cast(library.xxh3_blocks, ctypes.c_void_p)
    batch = ctypes.c_void_p(scene.batch.ctypes.data)
    library.host_launch(address, ctypes.c_uint(grid), batch)


@pytest.mark.parametrize("size", SIZES)
def test_a_chunk_in_one_piece(library: ctypes.CDLL, size: int) -> None:
    scene = Scene(size, size)
    run(library, scene, 1)
    scene.check()


@pytest.mark.parametrize(("size", "piece"), [(64, 16), (70 * KIB, 48), (129 * KIB, 4096)])
def test_a_chunk_in_pieces_that_lie_anywhere(library: ctypes.CDLL, size: int, piece: int) -> None:
    scene = Scene(size, piece)
    run(library, scene, 2)
    scene.check()


def test_the_twin_does_the_same() -> None:
    def memory(address: int, size: int) -> np.ndarray:
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=np.uint8)

    scene = Scene(70 * KIB, 4096)
    for step in xxh3_blocks(scene.batch, memory):
        step()
    scene.check()
