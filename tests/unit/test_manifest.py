"""Manifests: a namespace is its manifest, to the byte; what is absurd is refused by name."""

from __future__ import annotations

import hashlib
import json

import msgspec
import pytest
from hypothesis import given, strategies as st

from kvstore.errors import ManifestError
from kvstore.limits import (
    CHUNK_SIZE_MAX_BYTES,
    CHUNK_TOKENS_MAX,
    HEAD_DIM_MAX,
    KV_HEADS_MAX,
    LAYERS_MAX,
    MANIFEST_SIZE_MAX_BYTES,
)
from kvstore.protocol.manifest import DTYPE_SIZE_BYTES, decode_manifest
from kvstore.types import HeadRange
from tests.support.making import make_manifest, opaque_manifest

GOLDEN = {
    "model": "meta-llama/Llama-3.1-8B",
    "revision": "d04e592bb4f6",
    "dtype": "bfloat16",
    "layers": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "chunk_tokens": 256,
    "rope": "llama3:500000:8",
}
# Engines of every later version must reach what this one has stored.
GOLDEN_ID = "61648425e75b93c389523e3b417f176f"
DEFAULTS = {
    "layout": "canonical",
    "codec": "raw",
    "group": "",
    "values": "k|v",
    "opaque_bytes": 0,
    "format": 1,
}


def encoded(**fields: object) -> bytes:
    return json.dumps(GOLDEN | fields).encode()


def test_the_golden_manifest_keeps_its_namespace():
    assert decode_manifest(encoded()).namespace_id().hex() == GOLDEN_ID


def test_the_namespace_is_the_hash_of_sorted_json_without_spaces():
    canonical = json.dumps(GOLDEN | DEFAULTS, sort_keys=True, separators=(",", ":")).encode()
    manifest = decode_manifest(encoded())
    assert manifest.encode() == canonical
    assert manifest.namespace_id() == hashlib.sha256(canonical).digest()[:16]


def test_fields_left_out_and_their_defaults_are_the_same_namespace():
    spelled = decode_manifest(encoded(**DEFAULTS))
    assert spelled.namespace_id() == decode_manifest(encoded()).namespace_id()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "m"},
        {"revision": "2"},
        {"dtype": "float16"},
        {"layers": 31},
        {"kv_heads": 4},
        {"head_dim": 64},
        {"chunk_tokens": 128},
        {"rope": ""},
        {"group": "sliding"},
        {"values": "k"},
    ],
    ids=str,
)
def test_a_change_of_any_field_is_another_namespace(change):
    assert decode_manifest(encoded(**change)).namespace_id().hex() != GOLDEN_ID


@given(st.text(max_size=40), st.text(min_size=1, max_size=40))
def test_any_text_survives_encoding(group, model):
    manifest = make_manifest(model=model, group=group)
    assert decode_manifest(manifest.encode()) == manifest


def test_a_chunk_is_all_layers_sides_heads_tokens_and_dimensions():
    manifest = decode_manifest(encoded())
    assert manifest.chunk_bytes == 32 * 2 * 8 * 256 * 128 * 2
    assert manifest.all_heads == HeadRange(0, 8)
    assert manifest.shard_bytes(HeadRange(2, 4)) * 4 == manifest.chunk_bytes
    assert decode_manifest(encoded(values="k")).chunk_bytes * 2 == manifest.chunk_bytes


@pytest.mark.parametrize(("dtype", "size"), DTYPE_SIZE_BYTES.items())
def test_the_dtype_scales_the_chunk(dtype, size):
    assert decode_manifest(encoded(dtype=dtype)).chunk_bytes == 32 * 2 * 8 * 256 * 128 * size


def test_an_opaque_chunk_has_the_size_it_says():
    assert opaque_manifest(12_345).chunk_bytes == 12_345


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ("layers", LAYERS_MAX),
        ("kv_heads", KV_HEADS_MAX),
        ("head_dim", HEAD_DIM_MAX),
        ("chunk_tokens", CHUNK_TOKENS_MAX),
    ],
)
@pytest.mark.parametrize("beyond", ["zero", "negative", "above"])
def test_an_absurd_number_is_refused_with_its_field_and_limit(field, most, beyond):
    value = {"zero": 0, "negative": -1, "above": most + 1}[beyond]
    with pytest.raises(ManifestError, match=rf"manifest\.{field} is {value}, .* \[1, {most}\]"):
        decode_manifest(encoded(**{field: value}))


def test_a_chunk_beyond_the_limit_is_refused_though_every_field_is_within_its_own():
    huge = encoded(layers=LAYERS_MAX, kv_heads=KV_HEADS_MAX)
    with pytest.raises(ManifestError, match=rf"chunk size .* \[1, {CHUNK_SIZE_MAX_BYTES}\]"):
        decode_manifest(huge)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": ""}, "manifest.model is empty"),
        ({"dtype": "int3"}, "manifest.dtype 'int3' is unknown; known are float32"),
        ({"codec": "zip"}, "manifest.codec 'zip' is unknown; known are"),
        ({"layout": "opaque", "kv_heads": 1}, r"manifest.opaque_bytes is 0, must lie in \[1"),
        ({"layout": "opaque", "opaque_bytes": 5}, "manifest.kv_heads is 8; an opaque layout"),
        ({"opaque_bytes": 5}, "manifest.opaque_bytes is only for layout 'opaque'"),
        ({"layout": "tiled"}, r"Invalid enum value 'tiled' - at `\$.layout`"),
        ({"values": "v"}, r"at `\$.values`"),
        ({"format": 2}, r"at `\$.format`"),
        ({"layers": "many"}, r"Expected `int`, got `str` - at `\$.layers`"),
        ({"layers": 1.5}, r"Expected `int`, got `float` - at `\$.layers`"),
        ({"heads": 8}, "unknown field `heads`"),
    ],
    ids=str,
)
def test_what_contradicts_itself_or_is_unknown_is_refused_by_name(fields, said):
    with pytest.raises(ManifestError, match=said):
        decode_manifest(encoded(**fields))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 10_000,
        b'{"model":' * 1000,
        b'{"layers":' + b"9" * 5000 + b"}",
        b'{"model":"\\ud800"}',
        encoded()[:-1],
        encoded() + b"{}",
    ],
    ids=lambda raw: repr(raw[:8] + raw[-4:]),
)
def test_what_does_not_parse_is_a_manifest_error(raw):
    with pytest.raises(ManifestError, match="does not parse"):
        decode_manifest(raw)


def test_a_manifest_over_its_limit_is_refused_with_both_numbers():
    raw = encoded(model="m" * MANIFEST_SIZE_MAX_BYTES)
    with pytest.raises(ManifestError, match=f"{len(raw)} bytes, at most {MANIFEST_SIZE_MAX_BYTES}"):
        decode_manifest(raw)


@given(
    st.binary(max_size=200)
    | st.builds(
        msgspec.json.encode,
        st.dictionaries(
            st.sampled_from([*GOLDEN, *DEFAULTS, "other"]),
            st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just([[]]),
        ),
    )
)
def test_whatever_comes_is_a_manifest_or_a_manifest_error(raw):
    try:
        manifest = decode_manifest(raw)
    except ManifestError:
        return
    assert decode_manifest(manifest.encode()) == manifest
