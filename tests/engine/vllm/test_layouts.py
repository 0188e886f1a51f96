"""Pages in every layout there is: what is stored from one is loaded into another, bit by bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deploy.demo.daemon import running_daemon
from kvstore.client.cache import PrefixCache
from kvstore.client.sync import StoreReport
from kvstore.compression.policy import CodecPolicy
from kvstore.connectors.vllm_backends import UnknownBackendError, backend_name, check_backends
from kvstore.connectors.vllm_layouts import KVGroup, groups_of
from kvstore.connectors.vllm_metadata import NOWHERE, LoadJob, Span, StepMetadata, StoreJob
from kvstore.connectors.vllm_movers import DeviceMover, HostMover
from kvstore.connectors.vllm_pages import GroupPages, self_test
from kvstore.connectors.vllm_settings import read_settings
from kvstore.connectors.vllm_shards import HeadShard
from kvstore.connectors.vllm_tilings import amx_tiles, rows, transposed_keys
from kvstore.connectors.vllm_worker import WorkerHalf
from kvstore.connectors.weights import UnsupportedError
from kvstore.errors import ConfigError
from kvstore.transfer.copies import Runs, gather, scatter
from kvstore.types import Digest, HeadRange
from tests.support.making import make_digests

LAYERS, BLOCKS, BLOCK, CHUNK, HEADS, DIM = 3, 12, 16, 64, 4, 32
EACH = CHUNK // BLOCK
# The axes of [L, B, H, N, C] in memory, outermost first, as vLLM names them.
LAYOUTS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
MOVERS = {"host": HostMover, "device": DeviceMover}


def group_of(**changes: object) -> KVGroup:
    fields = {
        "layer_names": tuple(f"layers.{number}.attn" for number in range(LAYERS)),
        "layers": tuple(range(LAYERS)),
        "block_tokens": BLOCK,
        "chunk_tokens": CHUNK,
        "shard": HeadShard(HEADS),
        "head_dim": DIM,
        "width": 2 * DIM,
        "sides": ("keys", "values"),
        "dtype": torch.bfloat16,
        "window_tokens": 0,
        "tiling": rows,
        "kernel": "test",
    }
    return KVGroup(**(fields | changes))


def pages_in(layout: str, group: KVGroup, seed: int) -> list[torch.Tensor]:
    """Return noise as the pages of all layers: views `[B, H, N, C]` of one allocation."""
    order = LAYOUTS[layout]
    shape = (len(group.layers), BLOCKS, group.heads, group.block_tokens, group.width)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn([shape[axis] for axis in order], generator=generator).to(group.dtype)
    return list(noise.permute([order.index(axis) for axis in range(5)]))


class Kept:
    """A namespace in memory."""

    def __init__(self) -> None:
        self.chunks: dict[Digest, np.ndarray] = {}

    def load(self, digests: Sequence[Digest], targets: Sequence[Runs]) -> int:
        for digest, target in zip(digests, targets, strict=True):
            scatter(target, self.chunks[digest], checksums=False)
        return len(digests)

    def store(
        self, digests: Sequence[Digest], sources: Sequence[Runs], *, parent: Digest | None = None
    ) -> StoreReport:
        for digest, source in zip(digests, sources, strict=True):
            self.chunks[digest] = np.empty(source.size_bytes, dtype=np.uint8)
            gather(self.chunks[digest], source, checksums=False)
        return StoreReport(len(digests), 0, 0, 0)

    def tensor(self, digest: Digest, group: KVGroup) -> torch.Tensor:
        shape = (LAYERS, len(group.sides), group.heads, CHUNK, group.head_dim)
        return torch.from_numpy(self.chunks[digest]).view(group.dtype).view(shape)


DIGESTS = make_digests(2)
FROM, TO = [7, 2, 9, 4, 1, 0, 3, 10], [3, 8, 1, 6, 11, 5, 2, 9]


def check_moved(source: list[torch.Tensor], target: list[torch.Tensor], old: list) -> None:
    """What was stored has arrived, and the rest is as it was."""
    for stored, loaded, before in zip(source, target, old, strict=True):
        expected = before.clone()
        expected[TO] = stored[FROM]
        assert torch.equal(loaded, expected)


@pytest.mark.parametrize(("writer", "reader"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_layout_serves_every_other(writer, reader):
    group, kept = group_of(), Kept()
    source, target = pages_in(writer, group, 1), pages_in(reader, group, 2)
    old = [layer.clone() for layer in target]
    GroupPages(group, source).store(kept, Span(0, DIGESTS, FROM))
    assert GroupPages(group, target).load(kept, Span(0, DIGESTS, TO)) == 2
    check_moved(source, target, old)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mover", MOVERS)
def test_a_chunk_is_canonical_whatever_the_pages_are(layout, mover):
    """Element by element, with no code of ours: `X[layer][k|v][head][token][dim]`."""
    group, kept = group_of(), Kept()
    source = pages_in(layout, group, 3)
    GroupPages(group, source, MOVERS[mover]).store(kept, Span(0, DIGESTS, FROM))
    found = kept.tensor(DIGESTS[1], group)
    for layer, side, head, token in itertools.product(range(LAYERS), (0, 1), (0, 3), (0, 15, 16)):
        block = FROM[EACH + token // BLOCK]
        row = source[layer][block, head, token % BLOCK]
        assert torch.equal(found[layer, side, head, token], row[side * DIM : (side + 1) * DIM])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("tiling", [rows, None], ids=["canonical", "opaque"])
def test_every_mover_passes_the_test_at_registration(layout, mover, tiling):
    group = group_of(tiling=tiling)
    self_test(group, pages_in(layout, group, 4), MOVERS[mover])


@pytest.mark.parametrize("tiling", [transposed_keys, amx_tiles])
def test_tilings_of_cpus_and_rows_share_chunks(tiling):
    group, kept = group_of(block_tokens=32), Kept()
    source = pages_in("LBHNC", group, 5)
    GroupPages(group_of(block_tokens=32, tiling=tiling), source).store(
        kept, Span(0, DIGESTS, FROM[:4])
    )
    target = pages_in("LBNHC", group, 6)
    GroupPages(group, target).load(kept, Span(0, DIGESTS, TO[:4]))
    back = Kept()
    GroupPages(group, target).store(back, Span(0, DIGESTS, TO[:4]))
    assert all(np.array_equal(kept.chunks[d], back.chunks[d]) for d in DIGESTS)


def test_a_tiling_that_needs_whole_heads_is_caught_at_registration():
    group = group_of(tiling=transposed_keys)
    half = WorkerHalf([group], [Kept()])
    half.register(dict(zip(group.layer_names, pages_in("LBNHC", group, 7), strict=True)))
    report = half.take_report()
    assert "test of its pages failed" in report.off
    half._transfers.close()


def test_a_mover_that_corrupts_is_caught():
    class Swapped(HostMover):
        def gather(self, chunks, blocks, after):
            super().gather(chunks, [list(reversed(each)) for each in blocks], after)

    group = group_of()
    with pytest.raises(UnsupportedError, match="did not come back as they were"):
        self_test(group, pages_in("LBHNC", group, 8), Swapped)


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("tiling", [rows, None], ids=["canonical", "opaque"])
def test_nothing_is_written_nowhere(mover, tiling):
    group, kept = group_of(tiling=tiling), Kept()
    source, target = pages_in("LHBNC", group, 9), pages_in("LHBNC", group, 10)
    before = [layer.clone() for layer in target]
    GroupPages(group, source, MOVERS[mover]).store(kept, Span(0, DIGESTS, FROM))
    some = [NOWHERE, NOWHERE, NOWHERE, NOWHERE, NOWHERE, 5, 2, NOWHERE]
    GroupPages(group, target, MOVERS[mover]).load(kept, Span(0, DIGESTS, some))
    for stored, loaded, old in zip(source, target, before, strict=True):
        old[[5, 2]] = stored[[FROM[5], FROM[6]]]
        assert torch.equal(loaded, old)


# --- latent vectors --------------------------------------------------------------------


def latent_group(**changes: object) -> KVGroup:
    return group_of(shard=HeadShard(1), head_dim=48, width=48, sides=("latent",), **changes)


def test_latent_vectors_are_keys_without_values():
    group = latent_group()
    manifest = group.manifest(model="mla", revision="1", rope="")
    assert (manifest.values, manifest.kv_heads, manifest.head_dim) == ("k", 1, 48)
    assert manifest.chunk_bytes == group.page_bytes * LAYERS * EACH
    assert "latent" in manifest.group


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("tiling", [rows, None], ids=["canonical", "opaque"])
def test_latent_vectors_come_back(mover, tiling):
    group, kept = latent_group(tiling=tiling), Kept()
    source = [layer.squeeze(1) for layer in pages_in("LBHNC", group, 11)]
    target = pages_in("BLHNC", group, 12)
    old = [layer.clone() for layer in target]
    self_test(group, source, MOVERS[mover])
    GroupPages(group, source, MOVERS[mover]).store(kept, Span(0, DIGESTS, FROM))
    GroupPages(group, target, MOVERS[mover]).load(kept, Span(0, DIGESTS, TO))
    check_moved([layer.unsqueeze(1) for layer in source], target, old)


# --- tensor parallel -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "ranks", "heads", "writers"),
    [
        (4, 1, [(0, 4)], [True]),
        (4, 2, [(0, 2), (2, 4)], [True, True]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)], [True, False, True, False]),
        (1, 2, [(0, 1), (0, 1)], [True, False]),
    ],
)
def test_ranks_share_out_heads(total, ranks, heads, writers):
    shards = [HeadShard(total, rank, ranks) for rank in range(ranks)]
    assert [tuple(shard.heads) for shard in shards] == heads
    assert [shard.is_writer for shard in shards] == writers


class Ranks:
    """The worker halves of one engine whose heads are *whole*'s, cut into *count* shares."""

    def __init__(
        self, socket, whole: list[torch.Tensor], count: int, tiling, codec: str = "raw"
    ) -> None:
        self.halves = []
        for rank in range(count):
            group = group_of(shard=HeadShard(HEADS, rank, count), tiling=tiling)
            first, stop = group.shard.heads
            manifest = group.manifest(model="tp", revision="1", rope="", codec=codec)
            cache = PrefixCache(
                manifest,
                heads=group.stored_heads,
                socket=socket,
                timeout_seconds=10,
                policy=CodecPolicy(codec=codec, edge_layers=0),
            )
            half = WorkerHalf([group], [cache])
            layers = [layer[:, first:stop] for layer in whole]
            half.register(dict(zip(group.layer_names, layers, strict=True)))
            self.halves.append(half)

    def store(self) -> None:
        job = StoreJob(1, (Span(0, DIGESTS, FROM),), held=True)
        for half in self.halves:
            half.start_stores(StepMetadata(stores=[job]))
        self.close()
        for half in self.halves:
            report = half.take_report()
            assert (report.off, report.finished_stores, report.incomplete) == ("", {1: 1}, set())

    def load(self) -> set[int]:
        """Load all chunks; return the blocks that did not come."""
        for half in self.halves:
            half.start_loads(StepMetadata(loads=[LoadJob("r", (Span(0, DIGESTS, TO),))]))
        self.close()
        received = [half.take_received() for half in self.halves]
        assert all(each.requests == {"r"} for each in received)
        return set().union(*(each.failed_blocks for each in received))

    def close(self) -> None:
        for half in self.halves:
            half.close()


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (4, 2), (2, 4), (1, 8), (8, 1)])
def test_engines_of_different_parallelism_share_canonical_chunks(writers, readers):
    source, target = (pages_in("LBNHC", group_of(), seed) for seed in (20, 21))
    old = [layer.clone() for layer in target]
    with running_daemon(["tiers.host.capacity=64MiB"]) as (socket, _):
        Ranks(socket, source, writers, rows).store()
        assert Ranks(socket, target, readers, rows).load() == set()
    check_moved(source, target, old)


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (4, 2)])
def test_engines_of_different_parallelism_share_what_a_codec_has_left(writers, readers):
    source = pages_in("LBNHC", group_of(), 24)
    targets = [pages_in("LBNHC", group_of(), 25) for _ in range(2)]
    for target, wrote, reads in zip(targets, (writers, 1), (readers, 1), strict=True):
        with running_daemon(["tiers.host.capacity=64MiB"]) as (socket, _):
            ranks = Ranks(socket, source, wrote, rows, "int4kv")
            ranks.store()
            figures = [half.figures for half in ranks.halves]
            assert Ranks(socket, target, reads, rows, "int4kv").load() == set()
        raw, stored = (sum(one[f"codec_{name}_bytes"] for one in figures) for name in BYTES)
        # A first chunk as short as these keeps a sixteenth of its tokens as they are.
        assert raw > 2.5 * stored
        assert sum(one["codec_sections:int4kv"] for one in figures) == 2 * wrote * len(source) * 2
    for found, alone, stored in zip(*targets, source, strict=True):
        assert torch.equal(found, alone)
        lost = (found[TO] - stored[FROM]).float().norm() / stored[FROM].float().norm()
        assert 0 < lost < 0.15


BYTES = ("raw", "stored")


def test_opaque_chunks_are_one_ranks_own():
    source, target = (pages_in("LBNHC", group_of(), seed) for seed in (22, 23))
    old = [layer.clone() for layer in target]
    with running_daemon(["tiers.host.capacity=64MiB"]) as (socket, _):
        Ranks(socket, source, 2, None).store()
        assert Ranks(socket, target, 1, None).load() == set(TO)
        assert Ranks(socket, target, 2, None).load() == set()
    check_moved(source, target, old)


# --- what an engine says of itself ---------------------------------------------------------


class FullAttentionSpec(SimpleNamespace):
    pass


class MLAAttentionSpec(SimpleNamespace):
    pass


class MambaSpec(SimpleNamespace):
    pass


def engine(spec: SimpleNamespace, *, device="cuda", total=8, backend=None, **parallel: int):
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(cache_dtype="auto", enable_prefix_caching=True),
        device_config=SimpleNamespace(device_type=device),
        attention_config=SimpleNamespace(backend=backend),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total),
    )
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layers.0.attn", "layers.1.attn"])
    return vllm_config, SimpleNamespace(kv_cache_groups=[group], kv_cache_layout="LBNHC")


def attention(**changes: object) -> FullAttentionSpec:
    fields = {"block_size": 16, "num_kv_heads": 4, "head_size": 64, "head_size_v": 64}
    return FullAttentionSpec(**({"dtype": torch.bfloat16} | fields | changes))


def test_a_codec_that_needs_values_has_pages_converted_or_is_refused():
    on_cpu = engine(attention(num_kv_heads=1, head_size=32, head_size_v=32), device="cpu")
    for codec, is_converted in (("rans", False), ("int4kv", True), ("exp3", True)):
        (group,) = groups_of(*on_cpu, read_settings({"codec": codec}))
        assert (group.tiling is not None) == is_converted
    unknown = engine(attention(), backend="SOMETHING_NEW")
    with pytest.raises(ConfigError, match=r"'int4kv', which must know .* rans, lz4 are for those"):
        groups_of(*unknown, read_settings({"codec": "int4kv"}))


def test_devices_convert_rows_whatever_the_type():
    (group,) = groups_of(*engine(attention()), read_settings({}))
    assert group.tiling is rows
    assert group.manifest(model="m", revision="r", rope="").layout == "canonical"


@pytest.mark.parametrize(
    ("here", "total", "ranks", "rank", "heads"),
    [(4, 8, 2, 1, (4, 8)), (1, 2, 4, 3, (1, 2)), (1, 4, 4, 3, (3, 4))],
)
def test_a_rank_knows_its_heads(here, total, ranks, rank, heads):
    config = engine(attention(num_kv_heads=here), total=total, tensor_parallel_size=ranks)
    (group,) = groups_of(*config, read_settings({}), rank)
    assert group.stored_heads == HeadRange(*heads)
    manifests = {group.on_rank(r).manifest(model="m", revision="r", rope="") for r in range(ranks)}
    assert [manifest.kv_heads for manifest in manifests] == [total]


def test_opaque_manifests_pin_the_heads_of_a_rank():
    config = engine(attention(), tensor_parallel_size=2)
    (group,) = groups_of(*config, read_settings({"layout": "opaque"}))
    names = [group.on_rank(r).manifest(model="m", revision="r", rope="").group for r in (0, 1)]
    assert "heads 0-3 of 8" in names[0]
    assert "heads 4-7 of 8" in names[1]


def test_latent_vectors_have_one_writer():
    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    config = engine(spec, device="cpu", total=128, tensor_parallel_size=4)
    groups = [groups_of(*config, read_settings({}), rank)[0] for rank in range(4)]
    assert [group.shard.is_writer for group in groups] == [True, False, False, False]
    assert {group.stored_heads for group in groups} == {HeadRange(0, 1)}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (MambaSpec(block_size=16), "MambaSpec"),
        (attention(dtype=torch.uint8), "packed.*--kv-cache-dtype auto"),
        (attention(state_content_bytes=80), "packed"),
        (attention(tokens_per_state=4), "several tokens"),
    ],
)
def test_state_that_is_not_understood_is_refused(spec, words):
    with pytest.raises(UnsupportedError, match=words):
        groups_of(*engine(spec), read_settings({}))


def test_values_of_another_width_are_kept_as_they_are():
    config = engine(attention(head_size_v=128))
    (group,) = groups_of(*config, read_settings({}))
    assert (group.tiling, group.width) == (None, 192)
    with pytest.raises(UnsupportedError, match="differ in width"):
        groups_of(*config, read_settings({"layout": "canonical"}))


def layer_of(backend: str) -> SimpleNamespace:
    named = SimpleNamespace(get_name=lambda: backend)
    return SimpleNamespace(get_attn_backend=lambda: named)


def test_only_backends_that_write_rows_are_converted():
    chosen, _ = engine(attention())
    assert backend_name(chosen) == "rows"
    check_backends(chosen, {"a": layer_of("FLASH_ATTN")}, ["a"], converted=True)
    with pytest.raises(UnknownBackendError, match="--attention-backend ROCM_ATTN"):
        check_backends(chosen, {"a": layer_of("ROCM_ATTN")}, ["a"], converted=True)
    asked, kv = engine(attention(), backend=SimpleNamespace(name="ROCM_ATTN"))
    (group,) = groups_of(asked, kv, read_settings({}))
    assert group.tiling is None
    assert "ROCM_ATTN" in group.kernel
    check_backends(asked, {"a": layer_of("ROCM_ATTN")}, ["a"], converted=False)
    with pytest.raises(UnsupportedError, match="not understood"):
        groups_of(asked, kv, read_settings({"layout": "canonical"}))
