"""Containers of version 1 are read as they were on the day they were written, and written alike.

`tests/golden/codecs` has one chunk of KV and what every codec made of it. A golden file never
changes: another format is another version beside it. `decoded` below are digests of what they
decode to, the same with compiled code and without.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvstore.compression import native, reference
from kvstore.compression.container import HEADER_BYTES, Container, open_container
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.registry import BUILT_IN
from tests.support.codec_chunks import decoded, encode, manifest_of

GOLDEN = Path(__file__).parents[1] / "golden" / "codecs"
MANIFEST = manifest_of(layers=1, heads=1, tokens=70, dim=48)
LATENT = manifest_of(layers=1, heads=1, tokens=70, dim=96, values="k")

DECODED = {
    "raw": "b5d3ab1cde5a7357",
    "int8kv": "244c828a96d1f1d4",
    "int4kv": "5fefcf32486a5739",
    "k8v4": "4f4527e366d0bf18",
    "fp8": "66181653ca7bd500",
    "exp3": "b5d3ab1cde5a7357",
    "rans": "b5d3ab1cde5a7357",
    "lz4": "b5d3ab1cde5a7357",
    "nvfp4": "d57e0070be4f3e0d",
    "nvfp4-compat": "f906a8b1cb523d9a",
    "hq4": "31a0bb2c638724d5",
    "hq3": "aa785147a7401a10",
    "ecsq-hi": "aa97aeecb026de40",
    "ecsq-mid": "4c78729bc69673d5",
    "ecsq-lo": "4699523b314487be",
    "latent": "96d4a919e245423c",
}


@pytest.fixture(params=["numpy", "compiled"], autouse=True)
def _coders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(reference.native, "find", lambda codec, shape: None)
    elif native.KERNEL == "numpy":
        pytest.skip("the C library was not built")


def kept_values() -> np.ndarray:
    """The chunk that was encoded: with outliers, zeros and subnormals, without NaN."""
    bits = np.frombuffer((GOLDEN / "values.bf16").read_bytes(), dtype=np.uint16)
    return bits.reshape(1, 2, 1, 70, 48)


def policy_of(name: str) -> CodecPolicy:
    if name == "latent":
        return CodecPolicy(codec="int4kv", edge_layers=0, spare_sections=0, tail_channels=32)
    return CodecPolicy(codec=name, edge_layers=0, spare_sections=0)


def case(name: str) -> tuple[object, np.ndarray]:
    if name == "latent":
        return LATENT, kept_values().reshape(1, 1, 1, 70, 96)
    return MANIFEST, kept_values()


def payload(container: Container) -> bytes:
    return container.octets[container.header.payload_offset :].tobytes()


@pytest.mark.parametrize("name", [*BUILT_IN, "latent"])
def test_a_golden_container_decodes_to_what_it_did(name: str) -> None:
    manifest, values = case(name)
    stored = (GOLDEN / f"{name}.v1.kvx").read_bytes()
    found = decoded(manifest, stored, values)  # type: ignore[arg-type]
    assert xxhash.xxh64_hexdigest(found.tobytes()) == DECODED[name]
    if name in BUILT_IN and BUILT_IN[name].is_lossless:
        assert np.array_equal(found, values)


@pytest.mark.parametrize("name", [*(name for name in BUILT_IN if name != "lz4"), "latent"])
def test_a_chunk_becomes_the_golden_container(name: str) -> None:
    manifest, values = case(name)
    kept = open_container((GOLDEN / f"{name}.v1.kvx").read_bytes())
    stored, _ = encode(manifest, policy_of(name), values, first_position=0)  # type: ignore[arg-type]
    container = open_container(stored)
    assert payload(container) == payload(kept)
    assert container.header == kept.header
    for section, other in zip(container.sections, kept.sections, strict=True):
        assert section.relative_error == pytest.approx(other.relative_error, rel=1e-4)
        assert section.codec is other.codec
        assert (section.offset, section.size_bytes) == (other.offset, other.size_bytes)
    assert len(kept.octets) >= HEADER_BYTES
