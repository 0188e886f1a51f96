"""The parts of the connector that need no engine: keys, settings, tilings, holdings, order."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvstore.compression.guard import CodecCounters, EncodeReport, SectionReport
from kvstore.compression.shapes import CodecId
from kvstore.connectors import vllm_tilings
from kvstore.connectors.vllm_holdings import Holdings
from kvstore.connectors.vllm_keys import RequestKeys
from kvstore.connectors.vllm_lookups import Lookups
from kvstore.connectors.vllm_metadata import Span, WorkerReport
from kvstore.connectors.vllm_scheduler import _runs_of_whole
from kvstore.connectors.vllm_settings import read_settings
from kvstore.connectors.vllm_stats import StoreMetrics, codec_figures, stats_since
from kvstore.connectors.vllm_transfers import Transfers, Urgency
from kvstore.connectors.vllm_worker import TransferCounts
from kvstore.errors import ConfigError
from kvstore.hashing import chunk_digests
from tests.support.waiting import wait_until

CHUNK = 16


def request(**changes: object) -> SimpleNamespace:
    fields = {
        "all_token_ids": list(range(100)),
        "lora_request": None,
        "cache_salt": None,
        "mm_features": [],
        "prompt_embeds": None,
    }
    return SimpleNamespace(**(fields | changes))


def image(identifier: str, offset: int, length: int) -> SimpleNamespace:
    place = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(identifier=identifier, mm_position=place)


def digests(epoch: bytes = b"", **changes: object) -> list[bytes]:
    return RequestKeys(request(**changes), CHUNK, epoch).up_to(6)


# --- keys ------------------------------------------------------------------------------


def test_plain_text_has_the_plain_chain():
    assert digests() == chunk_digests(range(100), CHUNK)


def test_keys_are_extended_as_tokens_become_known():
    known = request(all_token_ids=list(range(40)))
    keys = RequestKeys(known, CHUNK, b"")
    assert keys.up_to(6) == chunk_digests(range(40), CHUNK)
    known.all_token_ids += range(40, 100)
    assert keys.up_to(6) == chunk_digests(range(100), CHUNK)
    assert keys.before(0) is None
    assert keys.before(3) == keys.up_to(3)[-1]


def test_whatever_changes_kv_changes_the_first_key(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    lora = SimpleNamespace(lora_name="poet", lora_path=str(tmp_path))
    first = [
        digests(**changes)[0]
        for changes in (
            {},
            {"cache_salt": "one"},
            {"cache_salt": "two"},
            {"lora_request": lora},
            {"lora_request": lora, "cache_salt": "one"},
            {"epoch": b"later"},
            {"epoch": b"later", "cache_salt": "one"},
            {"mm_features": [image("cat", 0, 4)]},
            {"mm_features": [image("dog", 0, 4)]},
            {"mm_features": [image("cat", 1, 4)]},
            {"prompt_embeds": torch.zeros(100, 8)},
            {"prompt_embeds": torch.ones(100, 8)},
        )
    ]
    assert len(set(first)) == len(first)


def test_an_adapter_with_other_weights_is_another(tmp_path):
    lora = SimpleNamespace(lora_name="poet", lora_path=str(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"one")
    one = digests(lora_request=lora)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"two")
    assert one[0] != digests(lora_request=lora)[0]


def test_an_image_changes_only_what_it_touches_and_what_follows():
    plain, pictured = digests(), digests(mm_features=[image("cat", 20, 30)])
    assert [a == b for a, b in zip(plain, pictured, strict=True)] == [True] + [False] * 5


# --- settings --------------------------------------------------------------------------


def test_chunks_are_whole_blocks():
    assert read_settings({}).chunk_for(128) == 256
    assert read_settings({}).chunk_for(528) == 528
    assert read_settings({"chunk_tokens": 384}).chunk_for(128) == 384


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"sockets": "/x"}, "sockets.*known are socket, chunk_tokens"),
        ({"chunk_tokens": -1}, "chunk_tokens must lie in"),
        ({"lookup_timeout_seconds": 0}, "lookup_timeout_seconds must lie in"),
        ({"gpu_staging_bytes": 1 << 40}, r"gpu_staging_bytes must lie in \[1, 8589934592\]"),
        ({"layout": "mine"}, "layout"),
        ({"codec": "int3"}, "codec 'int3' is unknown; known are raw"),
        ({"codec": {"name": "int4kv", "edges": 1}}, "unknown field `edges`; known are name"),
        ({"codec": "int4kv", "layout": "opaque"}, "'int4kv' must know what the bytes of pages are"),
    ],
)
def test_bad_settings_are_named(extra, words):
    with pytest.raises(ConfigError, match=words):
        read_settings(extra)


def test_a_block_that_does_not_divide_the_chunk_is_refused():
    with pytest.raises(
        ConfigError, match=r"200.*no multiple of the engine's block size 128; use 128"
    ):
        read_settings({"chunk_tokens": 200}).chunk_for(128)


# --- tilings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tiling", [vllm_tilings.rows, vllm_tilings.transposed_keys, vllm_tilings.amx_tiles]
)
def test_a_tiling_is_a_permutation(tiling):
    page = torch.arange(2 * 32 * 2 * 16, dtype=torch.float32).reshape(2, 32, 32)
    sides = torch.full((2, 2, 32, 16), -1.0)
    for source, target in tiling(page, sides):
        target.copy_(source)
    assert sorted(sides.flatten().tolist()) == sorted(page.flatten().tolist())
    back = torch.zeros_like(page)
    for target, source in tiling(back, sides):
        target.copy_(source)
    assert torch.equal(back, page)


def test_amx_tiles_lie_where_amx_wants_them():
    """Key element (token 17, dim 5) and value element (token 3, dim 20), found by hand."""
    sides = torch.zeros(2, 1, 32, 32)
    sides[0, 0, 17, 5], sides[1, 0, 3, 20] = 1, 2
    page = torch.zeros(1, 32, 64)
    for target, source in vllm_tilings.amx_tiles(page, sides):
        target.copy_(source)
    flat = page.flatten()
    assert flat[1 * 16 * 32 + 2 * 32 + 1 * 2 + 1] == 1
    assert flat[32 * 32 + 1 * 16 * 32 + 1 * 32 + 4 * 2 + 1] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_of_this_machine_is_recognised(dtype):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, 128, 64)
    assert vllm_tilings.find_cpu_tiling(2, 128, 64, dtype, isa) is not None


def test_an_unknown_kernel_is_not_guessed():
    assert vllm_tilings.find_cpu_tiling(2, 128, 64, torch.float32, "no such thing") is None


# --- what the halves are made of ---------------------------------------------------------


class Pool:
    def __init__(self, blocks: int) -> None:
        self.blocks = list(range(blocks))
        self.references = [0] * blocks

    def touch(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] += 1

    def free_blocks(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] -= 1


def span(*blocks: int) -> Span:
    return Span(0, [bytes(32)], list(blocks))


def test_blocks_are_held_until_all_ranks_are_done():
    pool, holdings = Pool(10), Holdings(ranks=2)
    assert not holdings.can_hold
    holdings.bind(pool)
    assert holdings.hold(1, [span(3, 4)])
    holdings.let_go({1: 1})
    assert pool.references[3:5] == [1, 1]
    holdings.let_go(WorkerReport({1: 1}).aggregate(WorkerReport({})).finished_stores)
    assert not any(pool.references)
    assert len(holdings) == 0


def test_stores_leave_blocks_to_the_engine():
    pool, holdings = Pool(10), Holdings(ranks=1)
    holdings.bind(pool)
    # One job always may, or small engines would never store.
    assert holdings.hold(1, [span(1, 2, 3, 4, 5, 6)])
    assert not holdings.hold(2, [span(7)])
    assert sum(pool.references) == 6
    holdings.let_go({1: 1})
    assert holdings.hold(2, [span(7)])


def test_reports_of_ranks_add_up():
    report = WorkerReport({1: 1, 2: 1}).aggregate(WorkerReport({2: 1, 3: 1}, off="why"))
    assert report == WorkerReport({1: 1, 2: 2, 3: 1}, off="why")


@pytest.mark.parametrize(
    ("blocks", "runs"),
    [
        ([1, 2, 3, 4, 5, 6], [(0, 3)]),
        ([0, 2, 3, 4, 5, 6], [(1, 3)]),
        ([1, 2, 3, 0, 5, 6], [(0, 1), (2, 3)]),
        ([0, 0, 0, 0, 0, 0], []),
    ],
)
def test_chunks_with_holes_are_not_stored(blocks, runs):
    assert list(_runs_of_whole(blocks, 0, 3, 2)) == runs


def test_counts_of_codecs_reach_prometheus_with_labels():
    counters = CodecCounters(raw_bytes=700, stored_bytes=200, refused=1)
    counters.record(
        EncodeReport(
            50,
            100,
            (
                SectionReport(CodecId.INT4KV, CodecId.INT4KV, 20, 0.07),
                SectionReport(CodecId.INT4KV, CodecId.INT8KV, 30, 0.004),
            ),
        )
    )
    reported: dict[str, float] = {}
    counts, figures = TransferCounts(chunks_stored=2), codec_figures(counters, 3)
    stats = stats_since(counts, reported, figures)
    assert stats is not None
    assert stats_since(counts, reported, figures) is None
    assert stats.reduce()["kvstore codec_stored_bytes"] == 250
    registry = CollectorRegistry()
    types = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    config = SimpleNamespace(kv_transfer_config=None)
    metrics = StoreMetrics(config, types, ["engine"], {0: ["0"]})
    for _ in range(2):
        metrics.observe(stats.data)
    for name, labels, expected in (
        ("chunks_stored", {}, 4),
        ("chunks_damaged", {}, 6),
        ("codec_raw_bytes", {}, 1600),
        ("codec_stored_bytes", {}, 500),
        ("codec_chunks_unfit", {}, 2),
        ("codec_sections", {"codec": "int4kv"}, 2),
        ("codec_fallbacks", {"codec": "int4kv", "taken": "int8kv"}, 2),
        ("codec_errors", {"codec": "int4kv", "at_most": "0.1"}, 2),
        ("codec_errors", {"codec": "int8kv", "at_most": "0.005"}, 2),
    ):
        found = registry.get_sample_value(f"vllm:kvstore_{name}_total", {"engine": "0"} | labels)
        assert found == expected, name


def test_loads_go_before_stores():
    transfers, seen, gate = Transfers(), [], threading.Event()
    transfers.submit(Urgency.STORE, gate.wait)
    for name in ("store 1", "store 2"):
        transfers.submit(Urgency.STORE, lambda name=name: seen.append(name))
    for name in ("load 1", "load 2"):
        transfers.submit(Urgency.LOAD, lambda name=name: seen.append(name))
    gate.set()
    transfers.close()
    assert seen == ["load 1", "load 2", "store 1", "store 2"]
    assert transfers.unfinished == 0


def test_a_failed_transfer_stops_nobody():
    transfers, seen = Transfers(), []
    transfers.submit(Urgency.LOAD, lambda: seen[0])
    transfers.submit(Urgency.LOAD, lambda: seen.append(1))
    transfers.close()
    assert seen == [1]


def test_a_look_up_that_fails_is_a_miss():
    lookups = Lookups([])
    keys = RequestKeys(request(all_token_ids=[2**40] * 64), CHUNK, b"")
    lookup = lookups.ask(keys, 4)
    wait_until(lambda: lookup.is_answered)
    lookups.close()
    assert lookup.hit == 0
