"""Scenes for kernels: paged caches of an engine, containers, and what NumPy makes of them."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from kvstore.compression.floats import narrow
from kvstore.compression.reference import REFERENCE
from kvstore.compression.shapes import (
    CodecId,
    Encoded,
    Kind,
    SectionCoder,
    SectionShape,
    SourceType,
    fixed_section_bytes,
    head_layout,
    padded,
)
from kvstore.compression.tables import HQ3, HQ4
from kvstore.compression.twins import KERNEL_NAMES, SIDES, TYPES
from kvstore.gpu.batches import CODING, REPORT, SECTION, SPAN, Chunks, Pages, Places, batch_of
from kvstore.gpu.build import SOURCES, source_names
from kvstore.gpu.kernels import (
    CODECS as SOURCES_OF,
    DTYPES,
    DTYPES_OF,
    WIDTH_MAX,
    WIDTHS_MAX,
    kernel_names,
)
from kvstore.types import HeadRange

CODECS = KERNEL_NAMES
"""Kernels' names of codecs of fixed rate."""
BLOCKS = 3
"""Fewer than there are parts, so that blocks take several."""
TABLES = {CodecId.HQ4: HQ4.table_id, CodecId.HQ3: HQ3.table_id}
SIZES = ((2, 64, 64), (1, 70, 80), (3, 33, 96), (1, 65, 112), (2, 128, 128), (1, 300, 192))
WIDE = ((1, 20, 256), (1, 66, 576), (1, 1, 64))
"""Heads, tokens, width."""
PAGE_TOKENS = 16
CHUNKS, SECTIONS = 2, 2
SUPPORT = Path(__file__).parent


class Kernels(Protocol):
    """Runs the kernels of a direction of a codec over arrays of the host."""

    def launch(
        self, codec: str, side: str, direction: str, dtype: str, scene: Scene, reports: np.ndarray
    ) -> None: ...

    def lay(self, scene: Scene, reports: np.ndarray) -> None: ...


class HostKernels:
    """Kernels built with g++ and run by host_cuda.h."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._libraries = {source: build_host_library(source, factory) for source in source_names()}

    def launch(
        self, codec: str, side: str, direction: str, dtype: str, scene: Scene, reports: np.ndarray
    ) -> None:
        for name in kernel_names(codec, side, direction, dtype):
            self._run(SOURCES_OF[codec], name, scene, reports)

    def lay(self, scene: Scene, reports: np.ndarray) -> None:
        self._run("spans", "spans_lay", scene, reports)

    def _run(self, source: str, name: str, scene: Scene, reports: np.ndarray) -> None:
        library = self._libraries[source]
        batch = scene.batch(scene.addresses(reports))
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p)
        library.host_launch(address, ctypes.c_uint(BLOCKS), ctypes.c_void_p(batch.ctypes.data))


def build_host_library(
    source: str, factory: pytest.TempPathFactory, sources: Path = SOURCES
) -> ctypes.CDLL:
    """Compile one of *sources* for the host, once for all processes of a test run.

    Skips the test where there is no g++.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the kernels cannot be built for the host")
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    library = folder / f"{source}.so"
    command = [
        *(compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *(f"-I{SOURCES}", f'-DKERNEL_SOURCE="{sources / source}.cu"'),
        *("-o", str(library), str(SUPPORT / "host_launch.cpp")),
    ]
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@dataclass
class Scene:
    """Some chunks of two layers of one kind, in pages, and room for their containers."""

    codec: CodecId
    shape: SectionShape
    source: str
    coder: SectionCoder
    planes: np.ndarray  # [section][page][token or head][head or token][channel]
    table: np.ndarray  # [chunk][page]
    heads_first: bool
    first_token: int
    containers: np.ndarray  # [chunk][byte]
    spans: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=SPAN))
    scratch: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.uint32))
    coding: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=CODING))
    coding_at: int = 0

    @classmethod
    def by_chance(
        cls,
        codec: CodecId,
        kind: Kind,
        source: SourceType,
        size: tuple[int, int, int],
        sinks: int,
    ) -> Scene:
        heads, tokens, width = size
        words = (codec, kind, source, size, sinks)
        rng = np.random.default_rng(zlib.crc32(repr(words).encode()))
        shape = SectionShape(
            kind, source, heads, tokens, width, 0, min(sinks, tokens), 0, TABLES.get(codec, 0)
        )
        first_token, heads_first = int(rng.integers(0, 3)), bool(rng.integers(0, 2))
        page_count = -(-(tokens + first_token) // PAGE_TOKENS)
        pages = CHUNKS * page_count + 3
        table = rng.permutation(pages)[: CHUNKS * page_count].reshape(CHUNKS, page_count)
        inner = (heads, PAGE_TOKENS) if heads_first else (PAGE_TOKENS, heads)
        spread = np.exp(rng.standard_normal(width))
        values = rng.standard_normal((SECTIONS, pages, *inner, width)) * spread
        values += rng.standard_normal(width)
        section = fixed_section_bytes(codec, shape)
        return cls(
            codec=codec,
            shape=shape,
            source=CODECS[codec],
            coder=REFERENCE[codec],
            planes=narrow(values.astype(np.float32), source),
            table=table.astype(np.int32),
            heads_first=heads_first,
            first_token=first_token,
            containers=np.full((CHUNKS, padded(SECTIONS * section, 256) + 256), 0xA5, np.uint8),
        )

    # --- what the chunk holds, the slow way ---------------------------------------------

    def values(self, chunk: int, section: int) -> np.ndarray:
        """Return the values `[head][token][channel]` of a section."""
        pages = self.planes[section][self.table[chunk]]
        if self.heads_first:
            pages = pages.transpose(0, 2, 1, 3)
        rows = pages.reshape(-1, self.shape.heads, self.shape.dim)
        rows = rows[self.first_token : self.first_token + self.shape.tokens]
        return np.ascontiguousarray(rows.transpose(1, 0, 2))

    def put(self, *, chunk: int, section: int, value: int) -> None:
        """Overwrite one value of the last token."""
        position = self.first_token + self.shape.tokens - 1
        page = self.table[chunk, position // PAGE_TOKENS]
        place = self.planes[section, page]
        token = position % PAGE_TOKENS
        (place[-1, token] if self.heads_first else place[token, -1])[3] = value

    # --- what kernels are told -------------------------------------------------------------

    def section_records(self) -> np.ndarray:
        """Return the sections with planes as offsets from the start of `planes`."""
        records = np.zeros(SECTIONS, dtype=SECTION)
        size = fixed_section_bytes(self.codec, self.shape)
        for index in range(SECTIONS):
            records[index] = (index * self.planes[0].nbytes, index * size, index, 0)
        return records

    def addresses(self, reports: np.ndarray) -> Places:
        """Return where the arrays of this scene lie in the host's memory; keeps them alive."""
        self._sections = self.section_records()
        self._sections["plane"] += np.uint64(self.planes.ctypes.data)
        base, step = self.containers.ctypes.data, self.containers.strides[0]
        self._containers = (base + step * np.arange(CHUNKS)).astype(np.uint64)
        return Places(
            sections=self._sections.ctypes.data,
            pages=self.table.ctypes.data,
            containers=self._containers.ctypes.data,
            reports=reports.ctypes.data,
        )

    def pages(self) -> Pages:
        """Return how the pages lie."""
        strides = self.planes[0].strides
        head, token = (strides[1], strides[2]) if self.heads_first else (strides[2], strides[1])
        return Pages(
            page_tokens=PAGE_TOKENS,
            page_count=self.table.shape[1],
            page_stride=strides[0],
            token_stride=token,
            head_stride=head,
            first_token=self.first_token,
        )

    def batch(self, places: Places) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the kernel's argument."""
        layout = head_layout(self.codec, self.shape)
        offset = layout.parts["sinks"][0]
        return batch_of(
            Chunks(
                chunk_count=CHUNKS,
                section_count=SECTIONS,
                heads=self.shape.heads,
                tokens=self.shape.tokens,
                width=self.shape.dim,
                sinks=self.shape.sinks,
                extra=layout.size_bytes - offset,
                table=self.shape.table,
            ),
            self.pages(),
            places,
        )

    # --- comparisons --------------------------------------------------------------------------

    def run(self, kernels: Kernels, direction: str, reports: np.ndarray) -> None:
        side = SIDES[self.shape.kind]
        dtype = TYPES[self.shape.source]
        kernels.launch(self.source, side, direction, dtype, self, reports)

    def encode(self, kernels: Kernels) -> np.ndarray:
        reports = np.zeros((CHUNKS, SECTIONS), dtype=REPORT)
        self.run(kernels, "encode", reports)
        return reports

    def sections_by_numpy(self) -> tuple[np.ndarray, list[list[Encoded]]]:
        size = fixed_section_bytes(self.codec, self.shape)
        content = np.full_like(self.containers, 0xA5)
        found: list[list[Encoded]] = []
        for chunk in range(CHUNKS):
            found.append([])
            for section in range(SECTIONS):
                target = content[chunk, section * size : (section + 1) * size]
                shape = SectionShape(**{**_fields(self.shape), "layer": section})
                values = self.values(chunk, section)
                found[chunk].append(self.coder.encode(shape, values, target))
        return content, found

    def check_encode(self, kernels: Kernels) -> None:
        reports = self.encode(kernels)
        content, found = self.sections_by_numpy()
        assert np.array_equal(self.containers, content)
        assert not reports["broken"].any()
        for chunk, section in np.ndindex(CHUNKS, SECTIONS):
            report, expected = reports[chunk, section], found[chunk][section]
            assert report["energy"] == pytest.approx(expected.energy, rel=1e-3)
            assert report["error"] == pytest.approx(expected.error, rel=1e-2, abs=1e-6)

    def check_decode(self, kernels: Kernels) -> None:
        """Decode what `check_encode` has left; pages outside the chunks stay as they are."""
        size = fixed_section_bytes(self.codec, self.shape)
        expected = []
        for chunk, section in np.ndindex(CHUNKS, SECTIONS):
            shape = SectionShape(**{**_fields(self.shape), "layer": section})
            decoded = np.zeros((shape.heads, shape.tokens, shape.dim), shape.source.carrier)
            source = self.containers[chunk, section * size : (section + 1) * size]
            self.coder.decode(shape, source, decoded, HeadRange(0, shape.heads))
            expected.append(decoded)
        self.planes[:] = 0x1234
        self.run(kernels, "decode", np.zeros(1, dtype=REPORT))
        for (chunk, section), decoded in zip(np.ndindex(CHUNKS, SECTIONS), expected, strict=True):
            ours = self.values(chunk, section)
            assert np.array_equal(ours[:, self.shape.sinks :], decoded[:, self.shape.sinks :])
        touched = CHUNKS * SECTIONS * self.shape.heads * self.shape.tokens * self.shape.dim
        assert (self.planes == 0x1234).sum() >= self.planes.size - touched


def check_kernels(kernels: Kernels, codec: CodecId, size: tuple[int, int, int]) -> None:
    """Compare both directions, for K and V of either type, with sinks and without."""
    if size[2] > WIDTHS_MAX.get(CODECS[codec], WIDTH_MAX):
        pytest.skip("refused by gpu/kernels.py")
    for kind in Kind:
        for source, dtype in TYPES.items():
            if dtype not in DTYPES_OF.get(CODECS[codec], DTYPES):
                continue
            for sinks in (4,) if source is SourceType.FLOAT32 else (0, 4):
                scene = Scene.by_chance(codec, kind, source, size, sinks)
                scene.check_encode(kernels)
                scene.check_decode(kernels)


def _fields(shape: SectionShape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in shape.__slots__}
