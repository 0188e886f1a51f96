"""Gathers and scatters as a GPU does them, run on the CPU thread by thread, do what their twins do.

So the stand-in, which runs the twins, stands for the kernels. Needs g++; on a GPU:
tests/gpu/test_transfers.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvstore.gpu.batches import Places
from kvstore.gpu.device import host_bytes
from kvstore.gpu.forms import batch_for, plain_form
from kvstore.gpu.pages import NOWHERE, PageLayout
from kvstore.gpu.twins import TWINS
from kvstore.hashing import block_count, block_digests
from tests.support.kernels import build_host_library

CHUNKS, PLANES, HEADS, TOKENS, EACH, PAGES = 3, 3, 2, 4, 5, 20
SCENES = {
    "heads before tokens, rows of 2-byte values": {"row": 32, "heads_first": True},
    "tokens before heads, rows of 4-byte values": {"row": 80, "heads_first": False},
    "one vector a row, more rows than threads": {"row": 16, "heads_first": True, "tokens": 60},
    "chunks of more than one block": {"row": 224, "heads_first": False, "tokens": 13},
}
KERNELS = {"raw": ("raw_gather", "raw_scatter"), "whole": ("whole_gather", "whole_scatter")}

Run = Callable[[str, np.ndarray], None]


class Scene:
    """Noise in pages and in chunks, and everything that kernels read, in one array."""

    def __init__(self, *, row: int, heads_first: bool, tokens: int = TOKENS) -> None:
        rng = np.random.default_rng(row)
        page = HEADS * tokens * row
        self._room = np.zeros(1 << 21, dtype=np.uint8)
        self._at = self._room.ctypes.data + -self._room.ctypes.data % 16
        planes = [self._put(rng.integers(0, 256, PAGES * page, np.uint8)) for _ in range(PLANES)]
        self.layout = PageLayout(
            planes=tuple(planes),
            heads=HEADS,
            page_tokens=tokens,
            pages_per_chunk=EACH,
            row_bytes=row,
            page_stride=page,
            token_stride=row if heads_first else HEADS * row,
            head_stride=tokens * row if heads_first else row,
        )
        size = self.layout.chunk_bytes
        chunks = [self._put(rng.integers(0, 256, size, np.uint8)) for _ in range(CHUNKS)]
        self.chunks, self.base = chunks, self._room.ctypes.data
        table = rng.permutation(PAGES)[: CHUNKS * EACH].reshape(CHUNKS, EACH).astype("<i4")
        table[0, 0] = table[2, 3] = NOWHERE
        places = Places(
            sections=self._put(self.layout.sections()),
            pages=self._put(table),
            containers=self._put(np.array(chunks, dtype="<u8")),
        )
        form = plain_form(self.layout)
        self.batch = batch_for(form, form.launches[0], CHUNKS, places)
        self.digests = self._put(np.zeros((CHUNKS, block_count(size)), dtype="<u8"))

    def _put(self, content: np.ndarray) -> int:
        start, raw = self._at, np.ascontiguousarray(content).view(np.uint8).ravel()
        host_bytes(start, raw.nbytes)[:] = raw
        self._at += raw.nbytes + -raw.nbytes % 16
        assert self._at < self._room.ctypes.data + self._room.nbytes
        return start

    def after(self, run: Run, kernel: str, *, digests: bool = False) -> np.ndarray:
        """Return all memory as *run* leaves it, and put back what was there."""
        before = self._room.copy()
        self.batch["reports"] = self.digests if digests else 0
        run(kernel, self.batch)
        after = self._room.copy()
        self._room[:] = before
        return after


@pytest.fixture(scope="module")
def by_kernel(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return what runs a kernel."""
    built = {source: build_host_library(source, tmp_path_factory) for source in KERNELS}

    def run(kernel: str, batch: np.ndarray) -> None:
        library = built[kernel.partition("_")[0]]
        address = ctypes.cast(getattr(library, kernel), ctypes.c_void_p)
        library.host_launch(address, ctypes.c_uint(4), ctypes.c_void_p(batch.ctypes.data))

    return run


def by_twin(kernel: str, batch: np.ndarray) -> None:
    for step in TWINS[kernel](batch, host_bytes):
        step()


@pytest.mark.parametrize(("raw", "whole"), list(zip(*KERNELS.values(), strict=True)))
@pytest.mark.parametrize("words", SCENES.values(), ids=SCENES)
def test_kernels_do_what_their_twins_do(
    by_kernel: Run, words: dict[str, Any], raw: str, whole: str
) -> None:
    scene = Scene(**words)
    expected = scene.after(by_twin, raw)
    assert not np.array_equal(expected, scene._room)
    for run, kernel in ((by_kernel, raw), (by_twin, whole), (by_kernel, whole)):
        assert np.array_equal(scene.after(run, kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS["whole"])
@pytest.mark.parametrize("words", SCENES.values(), ids=SCENES)
def test_digests_are_taken_on_the_way(by_kernel: Run, words: dict[str, Any], kernel: str) -> None:
    scene = Scene(**words)
    found = scene.after(by_kernel, kernel, digests=True)
    assert np.array_equal(found, scene.after(by_twin, kernel, digests=True))
    start, size = scene.chunks[1] - scene.base, scene.layout.chunk_bytes
    at = scene.digests - scene.base
    expected = block_digests(found[start : start + size].tobytes())
    digests = found[at : at + CHUNKS * expected.nbytes].view("<u8").reshape(CHUNKS, -1)
    assert np.array_equal(digests[1], expected)
