"""Codecs by name: those that come along, and those that installed packages offer.

A package offers a `CodecSpec` through an entry point of the group `kvstore.codecs`. It combines
section codecs in its own way under a name of its own; what it writes can be read without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Final

from kvstore.compression.shapes import FIXED_RATE, LOSSLESS, CodecId
from kvstore.compression.tables import HQ3, HQ4, PRESETS
from kvstore.errors import CodecError

GROUP: Final = "kvstore.codecs"


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """A codec as policies name it: what K and V sections are encoded with."""

    name: str
    codec: CodecId
    sections: tuple[CodecId, CodecId]
    table_id: int = 0

    @property
    def is_lossless(self) -> bool:
        """Whether decoding gives back every bit."""
        return LOSSLESS.issuperset(self.sections)

    @property
    def is_fixed_rate(self) -> bool:
        """Whether sizes are known before anything is encoded."""
        return FIXED_RATE.issuperset(self.sections)


def _alike(codec: CodecId, name: str | None = None, table_id: int = 0) -> CodecSpec:
    own_name = codec.name.lower().replace("_", "-")
    return CodecSpec(name or own_name, codec, (codec, codec), table_id)


BUILT_IN: Final = {
    spec.name: spec
    for spec in (
        _alike(CodecId.RAW),
        _alike(CodecId.INT8KV),
        _alike(CodecId.INT4KV),
        CodecSpec("k8v4", CodecId.K8V4, (CodecId.INT8KV, CodecId.INT4KV)),
        _alike(CodecId.FP8),
        _alike(CodecId.EXP3),
        _alike(CodecId.RANS),
        _alike(CodecId.LZ4),
        _alike(CodecId.NVFP4),
        _alike(CodecId.NVFP4_COMPAT),
        _alike(CodecId.HQ4, table_id=HQ4.table_id),
        _alike(CodecId.HQ3, table_id=HQ3.table_id),
        *(_alike(CodecId.ECSQ, preset.name, preset.table_id) for preset in PRESETS),
    )
}


@cache
def _offered() -> dict[str, CodecSpec]:
    """Return what installed packages offer; raises `CodecError` for what is no codec."""
    found = {}
    for point in entry_points(group=GROUP):
        spec = point.load()
        if not isinstance(spec, CodecSpec) or spec.name != point.name:
            raise CodecError(f"entry point {point.name!r} of {GROUP} is no CodecSpec of that name")
        if spec.name in BUILT_IN:
            raise CodecError(f"entry point {point.name!r} of {GROUP} takes the name of a codec")
        found[spec.name] = spec
    return found


def find_codec(name: str) -> CodecSpec:
    """Return the codec *name*; raises `CodecError` naming all there are."""
    spec = BUILT_IN.get(name) or _offered().get(name)
    if spec is None:
        known = ", ".join([*BUILT_IN, *_offered()])
        raise CodecError(f"codec {name!r} is unknown; known are {known}")
    return spec
