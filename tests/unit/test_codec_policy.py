"""Which codec a section gets by layer, tier and type; what is refused; codecs of others."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from kvstore.compression import registry
from kvstore.compression.chunks import ChunkCodec
from kvstore.compression.codecs import CODECS
from kvstore.compression.policy import CodecPolicies, CodecPolicy, fallbacks
from kvstore.compression.registry import CodecSpec, find_codec
from kvstore.compression.shapes import (
    CodecId,
    Kind,
    SectionShape,
    SourceType,
    head_layout,
    source_type,
)
from kvstore.errors import CodecError
from kvstore.types import HeadRange
from tests.support.codec_chunks import decoded, encode, kv_of, manifest_of

ALL = HeadRange(0, 2)


def codecs_of(policy: CodecPolicy, **geometry: object) -> list[str]:
    plan = ChunkCodec(manifest_of(**geometry), policy).plan(ALL)  # type: ignore[arg-type]
    return [codec.name.lower() for codec in plan.codecs]


def test_first_and_last_layers_are_gentler_unless_all_are() -> None:
    found = codecs_of(CodecPolicy(codec="int4kv"), layers=6)
    assert found == ["int8kv"] * 4 + ["int4kv"] * 4 + ["int8kv"] * 4
    for name in ("int8kv", "fp8", "rans", "exp3"):
        assert codecs_of(CodecPolicy(codec=name), layers=6) == [name] * 12


def test_the_default_is_int8_with_four_sinks() -> None:
    policy = CodecPolicy()
    assert (policy.codec, policy.sinks, policy.edge_layers) == ("int8kv", 4, 2)
    codec = ChunkCodec(manifest_of(), policy)
    assert codec.plan(ALL, first_position=0).header.sinks == 4
    assert codec.plan(ALL, first_position=64).header.sinks == 0


def test_a_layer_may_have_a_codec_of_its_own() -> None:
    policy = CodecPolicy(codec="k8v4", edge_layers=0, layers={1: "raw", 0: "hq4"})
    assert codecs_of(policy, layers=3) == ["hq4", "hq4", "raw", "raw", "int8kv", "int4kv"]


def test_sections_of_hq_read_their_own_table_in_any_container() -> None:
    manifest = manifest_of(layers=3)
    values = kv_of(manifest)
    policy = CodecPolicy(codec="ecsq-hi", edge_layers=0, layers={1: "hq3"})
    stored, report = encode(manifest, policy, values)
    assert report.sections[2].codec is CodecId.HQ3
    assert report.fallbacks == 0
    assert decoded(manifest, stored, values).shape == values.shape


def test_a_tier_may_have_a_stronger_codec() -> None:
    policy = CodecPolicy(tiers={"redis": "ecsq-mid"})
    assert policy.for_tier("redis").codec == "ecsq-mid"
    assert policy.for_tier("disk") is policy
    policies = CodecPolicies(models={"a": policy})
    assert policies.find("a", "redis").codec == "ecsq-mid"
    assert policies.find("a") is policy
    assert policies.find("b").codec == "int8kv"


def test_what_would_not_become_smaller_stays_raw() -> None:
    assert codecs_of(CodecPolicy(codec="int8kv"), dtype="float8_e4m3") == ["raw"] * 4
    assert codecs_of(CodecPolicy(codec="int8kv"), tokens=1)[0] == "raw"
    int4 = CodecPolicy(codec="int4kv", edge_layers=0)
    assert codecs_of(int4, dtype="float8_e4m3") == ["int4kv"] * 4


@pytest.mark.parametrize("dtype", ["float16", "float32", "float8_e4m3", "float8_e5m2"])
def test_exp3_is_rans_where_exponents_are_short(dtype: str) -> None:
    assert codecs_of(CodecPolicy(codec="exp3"), dtype=dtype) == ["rans"] * 4


def test_fallbacks_lead_to_raw() -> None:
    shape = SectionShape(Kind.K, SourceType.BFLOAT16, 2, 64, 64)
    assert fallbacks(CodecId.INT4KV, shape) == [CodecId.INT8KV, CodecId.RAW]
    assert fallbacks(CodecId.INT8KV, shape) == [CodecId.RAW]
    assert fallbacks(CodecId.RANS, shape) == [CodecId.RAW]
    assert fallbacks(CodecId.RAW, shape) == []
    bytes_only = SectionShape(Kind.K, SourceType.FLOAT8_E4M3, 2, 64, 64)
    assert fallbacks(CodecId.INT4KV, bytes_only) == [CodecId.RAW]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "zip"}, "codec 'zip' is unknown; known are raw, int8kv"),
        ({"tiers": {"disk": "zip"}}, "codec 'zip' is unknown"),
        ({"sinks": 65}, r"policy.sinks is 65, must lie in \[0, 64\]"),
        ({"edge_layers": -1}, "policy.edge_layers is -1"),
        ({"spare_sections": 9999}, "policy.spare_sections is 9999"),
        ({"bounds": {CodecId.FP8: 0.0}}, "policy.bounds"),
    ],
)
def test_a_policy_says_what_is_wrong_with_it(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        CodecPolicy(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "geometry", "message"),
    [
        ({"tail_channels": 64}, {}, "policy.tail_channels is 64, heads have 64 channels"),
        ({"layers": {1: "ecsq-hi"}}, {}, "ecsq-hi in one layer needs ecsq-hi as the codec"),
        ({"codec": "nvfp4-compat", "edge_layers": 0}, {"dim": 72}, "multiples of 16, not 72"),
    ],
)
def test_what_the_manifest_does_not_allow_is_refused(
    settings: dict[str, object], geometry: dict[str, int], message: str
) -> None:
    with pytest.raises(CodecError, match=message):
        ChunkCodec(manifest_of(**geometry), CodecPolicy(**settings))  # type: ignore[arg-type]


def test_types_and_parts_that_nobody_knows_are_refused() -> None:
    with pytest.raises(CodecError, match="no codec knows the type 'int8'"):
        source_type("int8")
    with pytest.raises(CodecError, match="RANS have no fixed size"):
        head_layout(CodecId.RANS, SectionShape(Kind.K, SourceType.BFLOAT16, 1, 64, 64))


# --- bits per value --------------------------------------------------------------------------

# At 256 tokens and 128 channels, K and V, sinks and header left out: the goals of the format.
BITS = {
    "raw": 16.0,
    "int8kv": 8.1,
    "fp8": 8.01,
    "k8v4": 6.29,
    "int4kv": 4.5,
    "nvfp4": 4.56,
    "nvfp4-compat": 4.51,
    "hq4": 4.2,
    "hq3": 3.2,
}


@pytest.mark.parametrize("name", BITS)
def test_fixed_rates_are_those_promised(name: str) -> None:
    manifest = manifest_of(dim=128, tokens=256, heads=8)
    policy = CodecPolicy(codec=name, edge_layers=0, sinks=0, spare_sections=0)
    plan = ChunkCodec(manifest, policy).plan(manifest.all_heads)
    payload = plan.size_bytes - plan.header.payload_offset
    assert 16 * payload / (8 * manifest.head_bytes) <= BITS[name]


# --- names -----------------------------------------------------------------------------------


def test_manifests_name_every_codec_that_comes_along() -> None:
    assert set(CODECS) == set(registry.BUILT_IN)
    assert CODECS["raw"].encoded_size_bytes(1000, 4) == 1000
    for name, codec in CODECS.items():
        assert codec.name == name
        assert codec.is_lossless == find_codec(name).is_lossless
        assert codec.encoded_size_bytes(1000, 4) >= 1000


@pytest.mark.parametrize("name", [name for name in registry.BUILT_IN if name != "raw"])
def test_no_container_is_larger_than_manifests_say(name: str) -> None:
    for tokens in (1, 70):
        manifest = manifest_of(tokens=tokens)
        policy = CodecPolicy(codec=name, spare_sections=0)
        size = ChunkCodec(manifest, policy).encoded_size(ALL)
        assert size <= CODECS[name].encoded_size_bytes(manifest.head_bytes * 2, manifest.sections)


OFFERED = CodecSpec("k4v3", CodecId.INT4KV, (CodecId.INT4KV, CodecId.HQ3))


def offer(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name, value, registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] * (group == point.group))
    registry._offered.cache_clear()


@pytest.fixture
def _forget_offers():
    yield
    registry._offered.cache_clear()


@pytest.mark.usefixtures("_forget_offers")
def test_a_package_offers_a_codec_that_all_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of()
    values = kv_of(manifest)
    with monkeypatch.context() as patch:
        offer(patch, "k4v3", f"{__name__}:OFFERED")
        stored, report = encode(manifest, CodecPolicy(codec="k4v3", edge_layers=0), values)
    registry._offered.cache_clear()
    assert [section.codec.name for section in report.sections] == ["INT4KV", "HQ3"] * 2
    assert decoded(manifest, stored, values).shape == values.shape


@pytest.mark.usefixtures("_forget_offers")
@pytest.mark.parametrize(
    ("name", "message"), [("other", "is no CodecSpec of that name"), ("rans", "takes the name")]
)
def test_an_offer_must_be_what_it_says(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    target = "OFFERED" if name == "other" else "TAKEN"
    offer(monkeypatch, name, f"{__name__}:{target}")
    with pytest.raises(CodecError, match=message):
        find_codec("unheard-of")


TAKEN = CodecSpec("rans", CodecId.RAW, (CodecId.RAW, CodecId.RAW))
