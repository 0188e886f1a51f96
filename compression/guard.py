"""What encoding did to KV, counted: errors, fallbacks, bytes. Plain numbers, no metrics library."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from kvstore.compression.shapes import CodecId

ERROR_EDGES: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Upper edges of the histogram of relative errors; one more counts what lies above."""


@dataclass(frozen=True, slots=True)
class SectionReport:
    """How one section was encoded: with *codec*, where *nominal* was asked for."""

    nominal: CodecId
    codec: CodecId
    size_bytes: int
    relative_error: float

    @property
    def is_fallback(self) -> bool:
        """Whether the section did not get what was asked for."""
        return self.codec is not self.nominal


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """How one chunk was encoded."""

    size_bytes: int
    raw_bytes: int
    sections: tuple[SectionReport, ...]

    @property
    def fallbacks(self) -> int:
        """Sections that did not get what was asked for."""
        return sum(section.is_fallback for section in self.sections)

    @property
    def relative_error(self) -> float:
        """The greatest relative error of any section."""
        return max(section.relative_error for section in self.sections)


@dataclass
class CodecCounters:
    """Everything encoded so far, by codec of the sections. Not for several threads at once."""

    raw_bytes: int = 0
    stored_bytes: int = 0
    refused: int = 0
    sections: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)
    errors: dict[str, list[int]] = field(default_factory=dict)

    def record(self, report: EncodeReport) -> None:
        """Count one chunk."""
        self.raw_bytes += report.raw_bytes
        self.stored_bytes += report.size_bytes
        for section in report.sections:
            name = section.codec.name.lower()
            self.sections[name] += 1
            if section.is_fallback:
                self.fallbacks[section.nominal.name.lower(), name] += 1
            histogram = self.errors.setdefault(name, [0] * (len(ERROR_EDGES) + 1))
            histogram[bisect_left(ERROR_EDGES, section.relative_error)] += 1

    def add(self, other: CodecCounters) -> None:
        """Count all that *other* has counted."""
        self.raw_bytes += other.raw_bytes
        self.stored_bytes += other.stored_bytes
        self.refused += other.refused
        self.sections.update(other.sections)
        self.fallbacks.update(other.fallbacks)
        for name, histogram in other.errors.items():
            mine = self.errors.get(name, [0] * len(histogram))
            self.errors[name] = [a + b for a, b in zip(mine, histogram, strict=True)]

    @property
    def ratio(self) -> float:
        """Raw bytes by stored bytes; 1 before anything was stored."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0
