"""Gather and scatter as a GPU does them, run on the CPU thread by thread, do what their twins do.

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
from tests.support.kernels import build_host_library

CHUNKS, PLANES, HEADS, TOKENS, EACH, PAGES = 3, 3, 2, 4, 5, 20
SCENES = {
    "heads before tokens, rows of 2-byte values": {"row": 32, "heads_first": True},
    "tokens before heads, rows of 4-byte values": {"row": 80, "heads_first": False},
    "one vector a row, more rows than threads": {"row": 16, "heads_first": True, "tokens": 60},
}

Run = Callable[[str, np.ndarray], None]


class Scene:
    """Noise in pages and in chunks, and everything that kernels read, in one array."""

    def __init__(self, *, row: int, heads_first: bool, tokens: int = TOKENS) -> None:
        rng = np.random.default_rng(row)
        page = HEADS * tokens * row
        self._room = np.zeros(1 << 20, dtype=np.uint8)
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
        table = rng.permutation(PAGES)[: CHUNKS * EACH].reshape(CHUNKS, EACH).astype("<i4")
        table[0, 0] = table[2, 3] = NOWHERE
        places = Places(
            sections=self._put(self.layout.sections()),
            pages=self._put(table),
            containers=self._put(np.array(chunks, dtype="<u8")),
        )
        form = plain_form(self.layout)
        self.batch = batch_for(form, form.launches[0], CHUNKS, places)

    def _put(self, content: np.ndarray) -> int:
        start, raw = self._at, np.ascontiguousarray(content).view(np.uint8).ravel()
        host_bytes(start, raw.nbytes)[:] = raw
        self._at += raw.nbytes + -raw.nbytes % 16
        assert self._at < self._room.ctypes.data + self._room.nbytes
        return start

    def after(self, run: Run, kernel: str) -> np.ndarray:
        """Return all memory as *run* leaves it, and put back what was there."""
        before = self._room.copy()
        run(kernel, self.batch)
        after = self._room.copy()
        self._room[:] = before
        return after


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_host_library("raw", tmp_path_factory)


def by_twin(kernel: str, batch: np.ndarray) -> None:
    for step in TWINS[kernel](batch, host_bytes):
        step()


@pytest.mark.parametrize("kernel", ["raw_gather", "raw_scatter"])
@pytest.mark.parametrize("words", SCENES.values(), ids=SCENES)
def test_kernels_do_what_their_twins_do(
    library: ctypes.CDLL, words: dict[str, Any], kernel: str
) -> None:
    def by_kernel(name: str, batch: np.ndarray) -> None:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p)
        library.host_launch(address, ctypes.c_uint(4), ctypes.c_void_p(batch.ctypes.data))

    scene = Scene(**words)
    found, expected = scene.after(by_kernel, kernel), scene.after(by_twin, kernel)
    assert not np.array_equal(expected, scene._room)
    assert np.array_equal(found, expected)
