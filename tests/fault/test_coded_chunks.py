"""Chunks that a codec makes smaller, with a live daemon: sizes, heads, damage, refusals."""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import numpy as np
import pytest

from kvstore.client.cache import PrefixCache
from kvstore.client.coding import sections_at
from kvstore.client.sync import Client
from kvstore.compression.chunks import ChunkCodec, chunk_header, decode
from kvstore.compression.floats import narrow
from kvstore.compression.policy import DEFAULT_BOUNDS, CodecPolicy
from kvstore.compression.shapes import CodecId, SourceType
from kvstore.errors import CodecError, ManifestError, RequestError
from kvstore.transfer.copies import Runs
from kvstore.types import HeadRange
from tests.support.codec_chunks import kv_of
from tests.support.daemon import Daemon
from tests.support.making import make_digests, make_manifest, make_payload, opaque_manifest, runs_of

LAYERS, HEADS, TOKENS, DIM = 3, 4, 64, 64
DIGESTS = make_digests(3)
ALL, LOWER, UPPER = HeadRange(0, 4), HeadRange(0, 2), HeadRange(2, 4)
QUARTERS = [HeadRange(head, head + 1) for head in range(HEADS)]
CUTS = {"whole": [ALL], "halves": [LOWER, UPPER], "quarters": QUARTERS}
CODECS = ("int4kv", "ecsq-mid", "exp3")
"""One of a fixed rate, one of a variable one, and one that loses nothing."""
NONE_SPARED = {"edge_layers": 0, "spare_sections": 0}
_revisions = itertools.count(1)


def manifest_of(codec: str, **fields: object):
    """Return a manifest that no other test has."""
    shape = {"layers": LAYERS, "kv_heads": HEADS, "head_dim": DIM, "chunk_tokens": TOKENS}
    return make_manifest(revision=str(next(_revisions)), codec=codec, **(shape | fields))


def values_of(number: int):
    """Return chunk *number*: `[layer][kind][head][token][dim]`."""
    return kv_of(manifest_of("raw"), seed=number)


def heads_of(values, heads: HeadRange):
    return np.ascontiguousarray(values[:, :, slice(*heads)])


def after_codec(manifest, values, policy: CodecPolicy, number: int):
    """Return what is left of chunk *number*: the codec alone, without client and daemon."""
    coder = ChunkCodec(manifest, policy)
    room = bytearray(coder.encoded_size(ALL, first_position=number))
    report = coder.encode(values, memoryview(room), ALL, first_position=number)
    found = np.empty_like(values)
    decode(manifest, bytes(room[: report.size_bytes]), found, ALL)
    return found


class Ranks:
    """The caches of an engine whose ranks have *shares* of the heads."""

    def __init__(self, stack: ExitStack, daemon, manifest, shares, policy=None) -> None:
        self.caches = [
            stack.enter_context(
                PrefixCache(
                    manifest, heads=heads, socket=daemon.socket, timeout_seconds=5, policy=policy
                )
            )
            for heads in shares
        ]

    def store(self, chunks) -> list:
        return [
            cache.store(DIGESTS, runs_of([heads_of(chunk, cache.heads) for chunk in chunks]))
            for cache in self.caches
        ]

    def load(self, count: int):
        """Return the chunks, put together from what every rank has loaded."""
        parts = []
        for cache in self.caches:
            shape = (count, LAYERS, 2, cache.heads.width, TOKENS, DIM)
            rooms = np.zeros(shape, dtype=np.uint16)
            assert cache.load(DIGESTS[:count], runs_of(list(rooms))) == count
            parts.append(rooms)
        return np.concatenate(parts, axis=3)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("written", "read"), list(itertools.product(CUTS, CUTS)))
def test_heads_are_decoded_however_they_were_cut(shared_daemon, codec, written, read):
    manifest, policy = manifest_of(codec), CodecPolicy(codec=codec)
    chunks = [values_of(number) for number in range(3)]
    with ExitStack() as stack:
        for report in Ranks(stack, shared_daemon, manifest, CUTS[written]).store(chunks):
            assert (report.stored, report.refused) == (3, 0)
        found = Ranks(stack, shared_daemon, manifest, CUTS[read]).load(3)
    for number, chunk in enumerate(chunks):
        left = after_codec(manifest, chunk, policy, number)
        assert np.array_equal(found[number], left)
        assert np.array_equal(left, chunk) == (codec == "exp3")


def test_what_was_stored_says_how_it_is_decoded_and_not_who_reads(shared_daemon):
    manifest = manifest_of("int4kv")
    chunks = [values_of(number) for number in range(3)]
    policy = CodecPolicy(codec="int4kv", sinks=0, **NONE_SPARED)
    with ExitStack() as stack:
        (report,) = Ranks(stack, shared_daemon, manifest, [ALL], policy).store(chunks)
        found = Ranks(stack, shared_daemon, manifest, [ALL]).load(3)
    assert report.bytes_stored * 3.4 < 3 * manifest.plain_bytes(ALL)
    for number, chunk in enumerate(chunks):
        assert np.array_equal(found[number], after_codec(manifest, chunk, policy, number))


def test_a_chunk_that_does_not_fit_is_not_stored_and_the_others_are(shared_daemon):
    for codec in ("int4kv", "ecsq-mid"):
        chunks = [values_of(number) for number in range(3)]
        chunks[1][1, 0] = 0x7FC0  # NaN: for lossy codecs only raw is left, and that is too large
        with ExitStack() as stack:
            ranks = Ranks(stack, shared_daemon, manifest_of(codec), [ALL])
            (report,) = ranks.store(chunks)
            (cache,) = ranks.caches
            assert (report.stored, report.present, report.refused) == (2, 0, 1)
            assert cache.codec_counters.refused == 1
            assert [cache.lookup([digest]) for digest in DIGESTS] == [1, 0, 1]
            # Nothing of it is left behind: it can be stored when it fits.
            (again,) = ranks.store([values_of(number) for number in range(3)])
            assert (again.stored, again.present, again.refused) == (1, 2, 0)


def test_a_section_above_its_bound_takes_more_room(shared_daemon):
    """What a fixed rate takes is known beforehand, but for what falls back."""
    manifest = manifest_of("int4kv")
    bounds = {**DEFAULT_BOUNDS, CodecId.INT4KV: 0.14}
    policy = CodecPolicy(codec="int4kv", edge_layers=0, sinks=0, bounds=bounds)
    chunks = [values_of(number) for number in range(3)]
    # One large value among such that lie between the codes that it leaves them.
    spiky = np.random.default_rng(1).uniform(-3.3, 3.3, (HEADS, TOKENS, DIM)).astype(np.float32)
    spiky[..., 5] = 100.0
    chunks[1][1, 1] = narrow(spiky, SourceType.BFLOAT16)
    with ExitStack() as stack:
        ranks = Ranks(stack, shared_daemon, manifest, [ALL], policy)
        (report,) = ranks.store(chunks)
        counters, found = ranks.caches[0].codec_counters, ranks.load(3)
    assert (report.stored, report.refused, counters.refused) == (3, 0, 0)
    assert dict(counters.fallbacks) == {("int4kv", "int8kv"): 1}
    assert (counters.raw_bytes, counters.stored_bytes) == (
        3 * manifest.plain_bytes(ALL),
        report.bytes_stored,
    )
    for number, chunk in enumerate(chunks):
        assert np.array_equal(found[number], after_codec(manifest, chunk, policy, number))


def test_a_container_that_does_not_parse_is_damage_whatever_its_checksum(shared_daemon):
    manifest = manifest_of("int4kv")
    with ExitStack() as stack:
        client = stack.enter_context(Client.connect(shared_daemon.socket))
        space = client.attach(manifest)
        with space.reserve(DIGESTS[:1], sizes=[70_000]) as (vacancy,):
            vacancy.fill(Runs.of_buffer(make_payload(DIGESTS[0], 70_000)))
        ranks = Ranks(stack, shared_daemon, manifest, [ALL])
        (cache,) = ranks.caches
        assert cache.lookup(DIGESTS) == 1
        assert cache.load(DIGESTS[:1], runs_of([bytearray(manifest.plain_bytes(ALL))])) == 0
        assert (cache.damaged_chunks, cache.lookup(DIGESTS)) == (1, 0)
        (report,) = ranks.store([values_of(number) for number in range(3)])
        assert report.stored == 3


def test_sizes_that_no_codec_makes_are_refused(shared_daemon):
    raw, coded = manifest_of("raw"), manifest_of("int8kv")
    with Client.connect(shared_daemon.socket) as client:
        for manifest, size in (
            (raw, raw.chunk_bytes - 1),
            (raw, raw.chunk_bytes + 1),
            (coded, 255),
            (coded, coded.chunk_bytes + 1),
        ):
            space = client.attach(manifest)
            refusal = pytest.raises(RequestError, match=f"{size} bytes for heads .* which takes")
            with refusal, space.reserve(DIGESTS[:1], sizes=[size]):
                pass
            assert space.lookup(DIGESTS).hits == 0


def test_a_tier_keeps_less_and_engines_decode_what_comes_up(start_daemon, tmp_path):
    """In a namespace of plain bytes, whose engines know of no codec."""
    manifest, count = manifest_of("raw"), 8
    daemon = start_daemon(
        {
            "tiers.host.capacity": "1MiB",
            "tiers.disk.path": tmp_path / "disk",
            "tiers.disk.capacity": "64MiB",
            "tiers.disk.write": "through",
            "tiers.disk.codec": "int8kv",
        }
    )
    digests = make_digests(count)
    chunks = [values_of(number) for number in range(count)]
    with PrefixCache(manifest, socket=daemon.socket, timeout_seconds=5) as cache:
        for number, (digest, chunk) in enumerate(zip(digests, chunks, strict=True)):
            parent = digests[number - 1] if number else None
            assert cache.store([digest], runs_of([chunk]), parent=parent).stored == 1
        rooms = np.zeros((count, *chunks[0].shape), dtype=np.uint16)
        halves = np.zeros((count, LAYERS, 2, 2, TOKENS, DIM), dtype=np.uint16)
        with PrefixCache(manifest, heads=UPPER, socket=daemon.socket, timeout_seconds=5) as upper:
            for digest, room, half in zip(digests, rooms, halves, strict=True):
                assert cache.load([digest], runs_of([room])) == 1
                assert upper.load([digest], runs_of([half])) == 1
    policy, changed = CodecPolicy(codec="int8kv"), 0
    for number, chunk in enumerate(chunks):
        left = after_codec(manifest_of("int8kv"), chunk, policy, number)
        is_plain = np.array_equal(rooms[number], chunk)
        changed += not is_plain
        assert is_plain or np.array_equal(rooms[number], left)
        assert np.array_equal(halves[number], heads_of(rooms[number], UPPER))
    assert changed > 0
    with Client.connect(daemon.socket) as client:
        stats = client.stats()
    (disk,) = [one for one in stats.codecs if one.tier == "disk"]
    assert (disk.codec, disk.raw_bytes) == ("raw", count * manifest.chunk_bytes)
    assert disk.raw_bytes > 1.9 * disk.stored_bytes
    assert stats.counters["transcode_chunks"] == count
    assert [tier.codec for tier in stats.tiers] == ["", "int8kv"]


def test_what_a_codec_cannot_do_is_refused_at_once(tmp_path):
    with pytest.raises(ManifestError, match="raw, rans, lz4 are for those"):
        opaque_manifest(4096, codec="int4kv")
    with pytest.raises(CodecError, match="policy for codec 'exp3' in a namespace of codec 'raw'"):
        PrefixCache(manifest_of("raw"), socket=tmp_path / "none", policy=CodecPolicy(codec="exp3"))
    settings = {"tiers.disk.path": tmp_path / "disk", "tiers.disk.codec": "int3"}
    status, log = Daemon(tmp_path, settings).run_to_end()
    assert (status, "tiers.disk.codec: codec 'int3' is unknown; known are raw" in log) == (2, True)


def test_opaque_bytes_come_back_through_lossless_codecs(shared_daemon):
    payload = (make_payload(DIGESTS[0], 64) * 1024) + bytes(7)
    for codec in ("rans", "lz4"):
        manifest = opaque_manifest(len(payload), codec=codec, revision=f"opaque {codec}")
        with PrefixCache(manifest, socket=shared_daemon.socket, timeout_seconds=5) as cache:
            report = cache.store(DIGESTS[:1], runs_of([payload]))
            room = bytearray(len(payload))
            assert cache.load(DIGESTS[:1], runs_of([room])) == 1
        assert bytes(room) == payload
        assert report.bytes_stored < len(payload)


def test_values_are_taken_from_and_put_where_an_engine_has_them(shared_daemon):
    """Heads apart, tokens before heads, and pages of a few tokens, which lie like no section."""
    manifest = manifest_of("exp3")
    chunk, header = values_of(0), chunk_header(manifest, ALL)
    planes = LAYERS * 2
    with PrefixCache(manifest, socket=shared_daemon.socket, timeout_seconds=5) as cache:
        cache.store(DIGESTS[:1], runs_of([chunk]))
        apart = np.zeros((planes, HEADS, TOKENS + 7, DIM), dtype=np.uint16)
        rows = np.zeros((planes, TOKENS, HEADS, DIM), dtype=np.uint16)
        pages = np.zeros((planes, HEADS, TOKENS // 16, 16, DIM), dtype=np.uint16)
        layouts = [
            (runs_at(apart[:, :, :TOKENS], 2), apart[:, :, :TOKENS], True),
            (runs_at(rows.transpose(0, 2, 1, 3), 3), rows.transpose(0, 2, 1, 3), True),
            (runs_at(pages, 3), pages.reshape(planes, HEADS, TOKENS, DIM), False),
        ]
        for number, (runs, values, in_place) in enumerate(layouts):
            assert (sections_at(runs, header) is not None) == in_place
            assert cache.load(DIGESTS[:1], [runs]) == 1
            assert np.array_equal(values.reshape(chunk.shape), chunk)
            if number:
                cache.store(DIGESTS[number : number + 1], [runs])
                room = np.zeros_like(chunk)
                assert cache.load(DIGESTS[number : number + 1], runs_of([room])) == 1
                assert np.array_equal(room, chunk)
        assert not apart[:, :, TOKENS:].any()


def runs_at(values, depth: int) -> Runs:
    """Return *values* as runs: an address for each of its first *depth* axes, pieces below."""
    shape, strides = values.shape[:depth], values.strides[:depth]
    offsets = sum(
        np.arange(n).reshape([-1 if at == axis else 1 for at in range(depth)]) * stride
        for axis, (n, stride) in enumerate(zip(shape, strides, strict=True))
    )
    addresses = (values.ctypes.data + offsets).astype(np.uint64).ravel()
    below = values.shape[depth:]
    if values.ndim == 4 and depth == 3 and values.strides[2] != DIM * 2:
        # Tokens lie apart from each other: they are pieces of one run for each head.
        heads = addresses.reshape(*shape[:2], -1)[:, :, 0].ravel().copy()
        return Runs(heads, DIM * 2, TOKENS, values.strides[2], owner=values)
    return Runs(addresses, int(np.prod(below)) * 2, owner=values)
