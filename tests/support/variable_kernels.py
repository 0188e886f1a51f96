"""Scenes for kernels of variable rate: sections are measured, laid behind each other, and placed.

Between the sections of a scene lies one that somebody else writes, of a known size.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from kvstore.compression.floats import narrow
from kvstore.compression.raw import Raw
from kvstore.compression.reference import REFERENCE
from kvstore.compression.shapes import (
    LOSSLESS,
    CodecId,
    Encoded,
    Kind,
    SectionShape,
    SourceType,
    padded,
    section_cap_bytes,
)
from kvstore.compression.tables import PRESETS
from kvstore.compression.twins import VARIABLE_NAMES, coding_of
from kvstore.errors import ContainerError
from kvstore.gpu.batches import REPORT, SECTION, SPAN, Chunks, Places
from kvstore.gpu.kernels import checked_batch, scratch_bytes
from kvstore.types import HeadRange
from tests.support.kernels import CHUNKS, PAGE_TOKENS, SECTIONS, Kernels, Scene

FIRST, OTHER, UNIT = 512, 720, 256
"""Where payloads begin, the size of what lies between two sections, and what sections begin at."""
SPANS = (0, 2)
BF16, FP16, FP32 = SourceType.BFLOAT16, SourceType.FLOAT16, SourceType.FLOAT32
CASES = [
    (CodecId.EXP3, BF16, Kind.K, (1, 71, 80), "spread"),
    (CodecId.EXP3, BF16, Kind.V, (2, 131, 80), "noise in places"),
    (CodecId.EXP3, BF16, Kind.K, (3, 33, 96), "zeros among"),
    (CodecId.EXP3, BF16, Kind.K, (2, 20, 576), "normal"),
    (CodecId.EXP3, BF16, Kind.K, (1, 70, 48), "noise"),
    (CodecId.EXP3, BF16, Kind.K, (1, 1, 16), "normal"),
    (CodecId.RANS, BF16, Kind.K, (2, 131, 80), "normal"),
    (CodecId.RANS, BF16, Kind.V, (1, 71, 80), "rare"),
    (CodecId.RANS, BF16, Kind.K, (1, 1, 16), "normal"),
    (CodecId.RANS, FP16, Kind.K, (3, 33, 96), "zeros among"),
    (CodecId.RANS, FP16, Kind.V, (1, 71, 80), "rare"),
    (CodecId.RANS, FP32, Kind.K, (1, 65, 256), "spread"),
    (CodecId.RANS, FP32, Kind.V, (2, 20, 48), "noise"),
    (CodecId.ECSQ, BF16, Kind.K, (2, 131, 80), "far"),
    (CodecId.ECSQ, BF16, Kind.V, (1, 65, 256), "far"),
    (CodecId.ECSQ, BF16, Kind.K, (3, 33, 96), "noise in places"),
    (CodecId.ECSQ, BF16, Kind.V, (1, 1, 16), "normal"),
    (CodecId.ECSQ, FP16, Kind.K, (1, 20, 576), "normal"),
    (CodecId.ECSQ, FP16, Kind.V, (2, 71, 112), "zeros among"),
]
"""Streams that end within a step, heads of several streams, sections that are not fit."""
DAMAGED = [*((codec, Kind.K) for codec in VARIABLE_NAMES), (CodecId.ECSQ, Kind.V)]
ECSQ = PRESETS[2]


def values_by_chance(
    flavour: str, source: SourceType, form: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """Return values of one flavour; only the first is what engines have."""
    if flavour == "noise":
        return rng.integers(0, 256, (*form, source.size_bytes), np.uint8).view(source.carrier)[
            ..., 0
        ]
    values = rng.standard_normal(form) * np.exp(rng.standard_normal(form[-1]))
    if flavour == "spread":
        values *= np.exp2(rng.integers(-9, 1, form))
    if flavour == "zeros among":
        values[rng.random(form) < 0.04] = 0.0
    if flavour == "far":
        values[rng.random(form) < 0.002] *= 60.0
    found = narrow(values.astype(np.float32), source)
    if flavour == "rare":
        found[:] = found[0, 0, 0, 0]
    if flavour in ("rare", "noise in places"):
        chosen = rng.random(form if flavour == "rare" else form[:2]) < 0.1
        found[chosen] = rng.integers(0, 1 << 8 * source.size_bytes, found.shape)[chosen]
    return found


@dataclass
class VariableScene(Scene):
    """Two sections of each container, with another between them."""

    @classmethod
    def of(
        cls,
        codec: CodecId,
        source: SourceType,
        size: tuple[int, int, int],
        flavour: str = "normal",
        kind: Kind = Kind.K,
        sinks: int = 0,
    ) -> VariableScene:
        heads, tokens, width = size
        words = (codec, kind, source, size, flavour, sinks)
        rng = np.random.default_rng(zlib.crc32(repr(words).encode()))
        first_token, heads_first = int(rng.integers(0, 3)), bool(rng.integers(0, 2))
        page_count = -(-(tokens + first_token) // PAGE_TOKENS)
        pages = CHUNKS * page_count + 3
        inner = (heads, PAGE_TOKENS) if heads_first else (PAGE_TOKENS, heads)
        shape = SectionShape(kind, source, heads, tokens, width, sinks=min(sinks, tokens))
        if codec is CodecId.ECSQ:
            shape = replace(shape, table=ECSQ.table_id)
        made = cls(
            codec=codec,
            shape=shape,
            source=VARIABLE_NAMES[codec],
            coder=REFERENCE[codec],
            planes=values_by_chance(flavour, source, (SECTIONS, pages, *inner, width), rng),
            table=rng.permutation(pages)[: CHUNKS * page_count]
            .reshape(CHUNKS, page_count)
            .astype(np.int32),
            heads_first=heads_first,
            first_token=first_token,
            containers=np.zeros(0, np.uint8),
        )
        room = FIRST + SECTIONS * padded(section_cap_bytes(codec, shape), UNIT) + 2 * OTHER
        made.containers = np.full((CHUNKS, padded(room, UNIT)), 0xA5, np.uint8)
        made.spans = np.zeros((CHUNKS, 3), dtype=SPAN)
        made.spans["offset"][:, 0] = FIRST
        made.spans["size"][:, 1] = OTHER
        scratch = scratch_bytes(made.source, made.chunks()) // 4
        made.scratch = np.full(scratch, 0xA5A5A5A5, dtype=np.uint32)
        if codec is CodecId.ECSQ:
            made.coding = coding_of(ECSQ, kind)
        made.coding_at = made.coding.ctypes.data
        return made

    # --- what kernels are told -------------------------------------------------------------

    def chunks(self) -> Chunks:
        """Return what the sections have in common."""
        return Chunks(
            chunk_count=CHUNKS,
            section_count=SECTIONS,
            heads=self.shape.heads,
            tokens=self.shape.tokens,
            width=self.shape.dim,
            sinks=self.shape.sinks,
            extra=padded(self.shape.sinks * self.shape.dim * self.shape.source.size_bytes),
            table=self.coding_at,
            span_count=3,
        )

    def section_records(self) -> np.ndarray:
        records = np.zeros(SECTIONS, dtype=SECTION)
        records["plane"] = np.arange(SECTIONS) * self.planes[0].nbytes
        records["span"] = SPANS
        return records

    def addresses(self, reports: np.ndarray) -> Places:
        found = super().addresses(reports)
        return replace(found, spans=self.spans.ctypes.data, scratch=self.scratch.ctypes.data)

    def batch(self, places: Places) -> np.ndarray[Any, np.dtype[Any]]:
        return checked_batch(self.source, self.chunks(), self.pages(), places)

    # --- comparisons --------------------------------------------------------------------------

    def by_numpy(self) -> tuple[np.ndarray, np.ndarray, list[Encoded]]:
        """Return containers, spans, and how each section was encoded."""
        content, spans = np.full_like(self.containers, 0xA5), self.spans.copy()
        found = []
        for chunk in range(CHUNKS):
            at = FIRST
            for span in range(3):
                size = OTHER
                if span in SPANS:
                    cap = section_cap_bytes(self.codec, self.shape)
                    room = np.full(cap, 0xA5, np.uint8)
                    values = self.values(chunk, SPANS.index(span))
                    encoded = self.coder.encode(self.shape, values, room)
                    if not encoded.is_fit:
                        room[:] = 0xA5
                        if self.codec in LOSSLESS:
                            Raw().encode(self.shape, values, room)
                    found.append(encoded)
                    size = encoded.size_bytes if encoded.is_fit else cap
                    if encoded.is_fit or self.codec in LOSSLESS:
                        content[chunk, at : at + size] = room[:size]
                spans[chunk, span] = (at, size)
                end = padded(at + size, UNIT)
                content[chunk, padded(at + size) : end] = 0
                at = end
        return content, spans, found

    def check_encode(self, kernels: Kernels) -> list[Encoded]:
        reports = np.zeros((CHUNKS, SECTIONS), dtype=REPORT)
        content, spans, found = self.by_numpy()
        self.run(kernels, "measure", reports)
        kernels.lay(self, reports)
        self.run(kernels, "place", reports)
        assert (reports["broken"].ravel() == 0).tolist() == [one.is_fit for one in found]
        assert np.array_equal(self.spans, spans)
        assert np.array_equal(self.containers, content)
        for report, encoded in zip(reports.ravel(), found, strict=True):
            if encoded.is_fit:
                assert report["energy"] == pytest.approx(encoded.energy, rel=1e-3)
                assert report["error"] == pytest.approx(encoded.error, rel=1e-2, abs=1e-6)
        return found

    def check_decode_of(self, kernels: Kernels, found: list[Encoded]) -> None:
        """Decode what `check_encode` has left; pages outside the chunks stay as they are."""
        fit = np.array([one.is_fit for one in found]).reshape(CHUNKS, SECTIONS)
        expected = self.decoded()
        self.planes[:] = 0x1234
        reports = np.zeros((CHUNKS, SECTIONS), dtype=REPORT)
        self.run(kernels, "decode", reports)
        assert (reports["broken"][fit] == 0).all()
        for chunk, section in zip(*np.nonzero(fit), strict=True):
            ours = self.values(chunk, section)[:, self.shape.sinks :]
            assert np.array_equal(ours, expected[chunk, section][:, self.shape.sinks :])
        touched = CHUNKS * SECTIONS * self.shape.heads * self.shape.tokens * self.shape.dim
        assert (self.planes == 0x1234).sum() >= self.planes.size - touched

    def decoded(self) -> dict[tuple[int, int], Any]:
        """Return what NumPy makes of the sections, None for what it refuses."""
        made: dict[tuple[int, int], Any] = {}
        for chunk, section in np.ndindex(CHUNKS, SECTIONS):
            span = self.spans[chunk, SPANS[section]]
            source = self.containers[chunk, int(span["offset"]) :][: int(span["size"])]
            target = np.zeros_like(self.values(chunk, section))
            try:
                self.coder.decode(self.shape, source, target, HeadRange(0, self.shape.heads))
                made[chunk, section] = target
            except ContainerError:
                made[chunk, section] = None
        return made


def check_variable(
    kernels: Kernels,
    codec: CodecId,
    source: SourceType,
    kind: Kind,
    size: tuple[int, int, int],
    flavour: str,
) -> None:
    """Compare both directions with NumPy, with sinks where the codec has them."""
    sinks = 4 if codec is CodecId.ECSQ else 0
    scene = VariableScene.of(codec, source, size, flavour, kind, sinks)
    scene.check_decode_of(kernels, scene.check_encode(kernels))


def check_every_bf16(kernels: Kernels) -> None:
    """Every pattern, NaN with all payloads among them, comes back; channels keep to an exponent."""
    scene = VariableScene.of(CodecId.EXP3, BF16, (3, 128, 256))
    rows = scene.planes.reshape(-1, 256)
    rest = np.arange(len(rows), dtype=np.uint16)[:, None] % 256
    rows[:] = (rest & 0x80) << 8 | np.arange(256, dtype=np.uint16) << 7 | rest & 0x7F
    held = [scene.values(*place) for place in np.ndindex(CHUNKS, SECTIONS)]
    assert len(np.unique(np.stack(held))) == 1 << 16
    found = scene.check_encode(kernels)
    assert all(encoded.is_fit for encoded in found)
    scene.check_decode_of(kernels, found)


def check_damage(kernels: Kernels, codec: CodecId, kind: Kind) -> None:
    """A damaged section is reported where NumPy refuses it, and decodes as NumPy decodes it."""
    scene = VariableScene.of(codec, BF16, (1, 71, 80), "far", kind)
    containers, spans, _ = scene.by_numpy()
    rng = np.random.default_rng(codec)
    refused = []
    for turn in range(6):
        scene.containers, scene.spans = containers.copy(), spans.copy()
        for chunk, section in np.ndindex(CHUNKS, SECTIONS):
            span = scene.spans[chunk, SPANS[section]]
            if turn == 0:
                span["size"] -= 16
            else:
                most = int(span["size"]) if turn > 3 else 16 << 2 * turn
                place = int(span["offset"]) + int(rng.integers(0, most))
                scene.containers[chunk, place] ^= 1 << int(rng.integers(0, 8))
        expected = scene.decoded()
        reports = np.zeros((CHUNKS, SECTIONS), dtype=REPORT)
        scene.planes[:] = 0
        scene.run(kernels, "decode", reports)
        for place, values in expected.items():
            assert (reports["broken"][place] != 0) == (values is None)
            if values is not None:
                # What an infinite scale makes of zero is nobody's matter.
                known = (values & 0x7FFF <= 0x7F80) | (codec in LOSSLESS)
                assert np.array_equal(scene.values(*place)[known], values[known])
        refused += [values is None for values in expected.values()]
    assert all(refused[:4])
    assert any(refused[4:])
