"""What is compressed how: a policy per namespace, with exceptions by layer and by tier.

Policies decide what is written. What is read says itself what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from kvstore.compression.container import check_codec
from kvstore.compression.registry import CodecSpec, find_codec
from kvstore.compression.shapes import (
    LOSSLESS,
    CodecId,
    SectionShape,
    SourceType,
    fixed_section_bytes,
    section_cap_bytes,
    shape_for,
)
from kvstore.errors import CodecError
from kvstore.limits import LAYERS_MAX, SINKS_MAX

DEFAULT_BOUNDS: Final[Mapping[CodecId, float]] = MappingProxyType(
    {
        CodecId.INT8KV: 0.02,
        CodecId.FP8: 0.05,
        CodecId.INT4KV: 0.15,
        CodecId.NVFP4: 0.15,
        CodecId.NVFP4_COMPAT: 0.15,
        CodecId.HQ4: 0.15,
        CodecId.HQ3: 0.28,
        CodecId.ECSQ: 0.40,
    }
)
"""Relative error of a section above which it falls back, some 1.5 times what KV usually gives."""

GENTLE: Final = frozenset({CodecId.INT8KV, CodecId.FP8}) | LOSSLESS
"""What first and last layers keep when the policy says so for all."""


@dataclass(frozen=True, kw_only=True)
class CodecPolicy:
    """How the chunks of a namespace are encoded; raises `CodecError` naming what is wrong.

    The first and last *edge_layers* take *edge_codec* unless *codec* is as gentle anyway, and
    *layers* overrides both. The first *sinks* tokens of a sequence and the last *tail_channels*
    of every head stay as they are. *spare_sections* may fall back to int8kv within the reserved
    size. *tiers* names a stronger codec for slower tiers.
    """

    codec: str = "int8kv"
    edge_codec: str = "int8kv"
    edge_layers: int = 2
    layers: Mapping[int, str] = field(default_factory=dict)
    tiers: Mapping[str, str] = field(default_factory=dict)
    sinks: int = 4
    tail_channels: int = 0
    spare_sections: int = 1
    bounds: Mapping[CodecId, float] = field(default_factory=lambda: DEFAULT_BOUNDS)
    checksum: bool = False

    def __post_init__(self) -> None:
        for name in (self.codec, self.edge_codec, *self.layers.values(), *self.tiers.values()):
            find_codec(name)
        for what, value, most in (
            ("edge_layers", self.edge_layers, LAYERS_MAX),
            ("sinks", self.sinks, SINKS_MAX),
            ("tail_channels", self.tail_channels, 0xFFFF),
            ("spare_sections", self.spare_sections, 2 * LAYERS_MAX),
        ):
            if not 0 <= value <= most:
                raise CodecError(f"policy.{what} is {value}, must lie in [0, {most}]")
        if any(not bound > 0 for bound in self.bounds.values()):
            raise CodecError("policy.bounds: a relative error above which to fall back is above 0")

    @property
    def spec(self) -> CodecSpec:
        """The codec that the policy asks for."""
        return find_codec(self.codec)

    def for_tier(self, tier: str) -> CodecPolicy:
        """Return the policy for chunks that are kept in *tier*."""
        name = self.tiers.get(tier)
        return self if name is None else replace(self, codec=name)

    def section_codec(self, shape: SectionShape, layers: int) -> CodecId:
        """Return what a section of *shape* in a model of *layers* is encoded with at first.

        Raises `CodecError` for what the source does not allow.
        """
        spec = self.spec
        is_edge = min(shape.layer, layers - 1 - shape.layer) < self.edge_layers
        if shape.layer in self.layers:
            spec = find_codec(self.layers[shape.layer])
        elif is_edge and not GENTLE.issuperset(spec.sections):
            spec = find_codec(self.edge_codec)
        codec = spec.sections[shape.kind]
        if codec is CodecId.EXP3 and shape.source in _HAVE_NO_EXP3:
            codec = CodecId.RANS
        check_codec(codec, shape)
        if codec is CodecId.ECSQ and spec.table_id != shape.table:
            raise CodecError(f"policy: {spec.name} in one layer needs {spec.name} as the codec")
        return codec if codec in LOSSLESS or _is_smaller(codec, shape) else CodecId.RAW

    def bound(self, codec: CodecId) -> float:
        """Return the relative error that sections of *codec* may have."""
        return self.bounds.get(codec, float("inf"))


_HAVE_NO_EXP3: Final = frozenset(
    {
        SourceType.FLOAT16,
        SourceType.FLOAT32,
        SourceType.FLOAT8_E4M3,
        SourceType.FLOAT8_E5M2,
    }
)


def _is_smaller(codec: CodecId, shape: SectionShape) -> bool:
    return section_cap_bytes(codec, shape_for(codec, shape)) < shape.raw_bytes


def fallbacks(codec: CodecId, shape: SectionShape) -> list[CodecId]:
    """Return what a section of *shape* is encoded with after *codec* has failed, in order."""
    gentler = codec not in GENTLE and fixed_section_bytes(CodecId.INT8KV, shape) < shape.raw_bytes
    chain = [CodecId.INT8KV] if gentler else []
    return chain if codec is CodecId.RAW else [*chain, CodecId.RAW]


@dataclass(frozen=True)
class CodecPolicies:
    """The policies of all namespaces: by model name, else the default."""

    default: CodecPolicy = field(default_factory=CodecPolicy)
    models: Mapping[str, CodecPolicy] = field(default_factory=dict)

    def find(self, model: str, tier: str | None = None) -> CodecPolicy:
        """Return the policy for chunks of *model* in *tier*; None is where they come from."""
        policy = self.models.get(model, self.default)
        return policy if tier is None else policy.for_tier(tier)
