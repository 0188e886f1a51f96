"""SGLang's own storage interface, factory and host pools drive the connector over a daemon."""

from __future__ import annotations

import inspect
import json
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import (
    STORAGE_BATCH_SIZE,
    HiCacheStorage,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)

from kvstore.connectors.sglang import KVStoreHiCache
from kvstore.connectors.sglang_launch import extra_config, launch_flags
from kvstore.connectors.sglang_manifests import model_of
from kvstore.connectors.sglang_settings import Settings, read_settings
from kvstore.connectors.weights import UnsupportedError
from kvstore.errors import ConfigError
from tests.engine.sglang import pools
from tests.engine.sglang.pools import PAGE, indices, page_of, some_keys, storage


def test_it_takes_what_the_interface_gives():
    for name, method in vars(HiCacheStorage).items():
        own = vars(KVStoreHiCache).get(name)
        assert own is not None or not getattr(method, "__isabstractmethod__", False), name
        if own is not None and inspect.isfunction(method) and name != "__init__":
            inspect.signature(own).bind(*inspect.signature(method).parameters)


@pytest.mark.parametrize("layout", pools.KEYS_VALUES_LAYOUTS)
def test_pages_are_the_same_chunks_in_every_layout(layout, socket, tiny):
    source = pools.keys_values(layout, groups=2)
    keys = some_keys(4, seed=pools.KEYS_VALUES_LAYOUTS.index(layout))
    with closing(storage(socket, tiny, source)) as writer:
        assert writer.batch_exists(keys) == 0
        assert writer.batch_set_v1(keys, indices([6, 1, 4, 2])) == [True] * 4
        assert writer.batch_exists(keys) == 4
        assert writer.batch_set_v1(keys, indices([6, 1, 4, 2])) == [True] * 4
    for other in pools.KEYS_VALUES_LAYOUTS:
        target = pools.keys_values(other, seed=2)
        untouched = page_of(target, 0)
        with closing(storage(socket, tiny, target)) as reader:
            assert reader.batch_get_v1(keys, indices([1, 5, 3, 7])) == [True] * 4
        for stored, loaded in zip((6, 1, 4, 2), (1, 5, 3, 7), strict=True):
            assert torch.equal(page_of(target, loaded), page_of(source, stored))
        assert torch.equal(page_of(target, 0), untouched)


@pytest.mark.parametrize("layout", pools.LATENT_LAYOUTS)
def test_latent_pages_are_stored_by_one_rank_and_read_by_all(layout, socket, tiny):
    source = pools.latent(layout)
    keys = some_keys(3, seed=10 + pools.LATENT_LAYOUTS.index(layout))
    ranks = {"is_mla": True, "tp_size": 4}
    with closing(storage(socket, tiny, source, **ranks, tp_rank=2)) as reader:
        assert reader.batch_set_v1(keys, indices([0, 1, 2])) == [True] * 3
        assert reader.batch_exists(keys) == 0
    with closing(storage(socket, tiny, source, **ranks, tp_rank=0)) as writer:
        assert writer.batch_set_v1(keys, indices([0, 1, 2])) == [True] * 3
    target = pools.latent("page_first", seed=2)
    with closing(storage(socket, tiny, target, **ranks, tp_rank=3)) as reader:
        assert reader.batch_get_v1(keys, indices([5, 4, 3])) == [True] * 3
    for stored, loaded in zip((0, 1, 2), (5, 4, 3), strict=True):
        assert torch.equal(page_of(target, loaded), page_of(source, stored))


def test_two_ranks_store_what_one_rank_reads(socket, tiny):
    keys = some_keys(2, seed=20)
    halves = [pools.keys_values("page_first", heads=1, seed=seed) for seed in (3, 4)]
    whole = pools.keys_values("page_first_direct", seed=5)
    with closing(storage(socket, tiny, whole)) as reader:
        for rank, half in enumerate(halves):
            assert reader.batch_exists(keys) == 0
            with closing(storage(socket, tiny, half, tp_rank=rank, tp_size=2)) as writer:
                assert writer.batch_set_v1(keys, indices([0, 1])) == [True] * 2
        assert reader.batch_get_v1(keys, indices([2, 3])) == [True] * 2
    for page in (0, 1):
        expected = torch.cat([page_of(half, page) for half in halves], dim=2)
        assert torch.equal(page_of(whole, page + 2), expected)


def test_a_full_batch_comes_whole_and_a_gap_ends_it(socket, tiny):
    count = STORAGE_BATCH_SIZE
    source = pools.keys_values("page_first", pages=count)
    keys = some_keys(count + 1, seed=21)
    target = pools.keys_values("layer_first", pages=count, seed=2)
    with (
        closing(storage(socket, tiny, source)) as writer,
        closing(storage(socket, tiny, target)) as reader,
    ):
        first, rest = keys[:100], keys[101:]
        assert all(writer.batch_set_v1(first, indices(range(100))))
        info = HiCacheStorageExtraInfo(prefix_keys=keys[:101])
        assert all(writer.batch_set_v1(rest, indices(range(100, 128)), info))
        assert reader.batch_exists(keys[:count]) == 100
        came = reader.batch_get_v1(keys[:count], indices(range(count)))
        assert came == [True] * 100 + [False] * 28
        assert all(writer.batch_set_v1(keys[100:101], indices([127])))
        assert reader.batch_exists(keys) == count + 1
        assert all(reader.batch_get_v1(keys[:count], indices(range(count))))
    for page in range(100):
        assert torch.equal(page_of(target, page), page_of(source, page))
    assert torch.equal(page_of(target, 100), page_of(source, 127))


@pytest.mark.parametrize("layout", pools.KEYS_VALUES_LAYOUTS[:4])
def test_flat_pages_meet_the_others(layout, socket, tiny):
    source, target = pools.keys_values(layout), pools.keys_values(layout, seed=2)
    keys = some_keys(3, seed=30 + pools.KEYS_VALUES_LAYOUTS.index(layout))
    with closing(storage(socket, tiny, source)) as made:
        assert made.set(keys[0], source.get_data_page(3 * PAGE))
        assert made.batch_set(keys[1:], [source.get_data_page(page * PAGE) for page in (4, 5)])
        assert made.exists(keys[2])
        assert not made.exists(some_keys(1, seed=99)[0])
        found = made.batch_get(keys, [target.get_dummy_flat_data_page() for _ in keys])
        alone = made.get(keys[0], target.get_dummy_flat_data_page())
        assert torch.equal(alone, found[0])
        assert made.get(some_keys(1, seed=99)[0], target.get_dummy_flat_data_page()) is None
    for page, flat in enumerate(found):
        target.set_from_flat_data_page(page * PAGE, flat)
        assert torch.equal(page_of(target, page), page_of(source, page + 3))
    with closing(storage(socket, tiny, target)) as made:
        assert all(made.batch_get_v1(keys, indices([6, 7, 0])))
    assert torch.equal(page_of(target, 0), page_of(source, 5))


def test_pools_beside_the_first_decide_how_far_a_prefix_reaches(socket, tiny):
    main, side = pools.keys_values("page_first"), pools.keys_values("page_first", seed=7)
    keys = some_keys(6, seed=40)
    full = PoolTransfer(PoolName.DRAFT, hit_policy=PoolHitPolicy.ALL_PAGES)
    window = PoolTransfer(PoolName.SWA, keys=keys[:2], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    with closing(storage(socket, tiny, main)) as made:
        for name in (PoolName.DRAFT, PoolName.SWA):
            made.register_mem_host_pool_v2(side, name)
        made.batch_set_v1(keys, indices(range(6)))
        for name, pages in ((PoolName.DRAFT, range(5)), (PoolName.SWA, (0, 1, 3, 4))):
            held = PoolTransfer(name, indices(pages), keys=[keys[page] for page in pages])
            assert made.batch_set_v2([held]) == {name: [True] * len(pages)}

        found = made.batch_exists_v2(keys, [full])
        assert (found.kv_hit_pages, found.restorable_prefix_pages) == (5, [1, 2, 3, 4, 5])
        found = made.batch_exists_v2(keys, [window])
        assert found.restorable_prefix_pages == [1, 2, 5]
        assert found.extra_pool_hit_pages == {PoolName.KV: 6, PoolName.SWA: 5}
        assert made.batch_exists_v2(keys[:4], [full, window]).kv_hit_pages == 2
        assert made.batch_exists_v2(some_keys(2, seed=41), [full]).kv_hit_pages == 0

        before = page_of(side, 3), page_of(side, 4)
        side.kv_buffer.zero_()
        back = PoolTransfer(PoolName.SWA, indices([0, 1]), keys=keys[3:5])
        assert made.batch_get_v2([back]) == {PoolName.SWA: [True, True]}
        assert torch.equal(
            torch.stack([page_of(side, page) for page in (0, 1)]), torch.stack(before)
        )
        gone = PoolTransfer(PoolName.SWA, indices([0, 1]), keys=keys[2:4])
        assert made.batch_get_v2([gone]) == {PoolName.SWA: [False, False]}
        assert made.batch_get_v2([PoolTransfer(PoolName.MAMBA, indices([0]), keys=keys[:1])]) == {
            PoolName.MAMBA: [False]
        }


def test_a_first_pool_without_memory_stands_for_the_others(socket, tiny):
    anchor, side = pools.keys_values("page_first"), pools.keys_values("page_first", seed=8)
    anchor.kv_buffer, anchor.layer_num = None, 0
    keys = some_keys(3, seed=50)
    held = PoolTransfer(PoolName.DEEPSEEK_V4_C4, indices([0, 1]), keys=keys[:2])
    with closing(storage(socket, tiny, anchor)) as made:
        made.register_mem_host_pool_v2(side, PoolName.DEEPSEEK_V4_C4)
        assert made.batch_set_v1(keys, indices([0, 1, 2])) == [True] * 3
        made.batch_set_v2([held])
        assert made.batch_exists(keys) == 3
        assert made.batch_exists_v2(keys, [held]).kv_hit_pages == 2


def test_what_is_not_understood_is_kept_as_it_is_by_each_rank(socket, tiny):
    ranks = {"tp_size": 2, "layout": "opaque"}
    source, target = pools.keys_values("page_head"), pools.keys_values("page_head", seed=2)
    keys = some_keys(2, seed=60)
    with closing(storage(socket, tiny, source, **ranks, tp_rank=0)) as writer:
        assert all(writer.batch_set_v1(keys, indices([0, 1])))
        # A page is in another order there than SGLang hands out elsewhere.
        assert not writer.batch_set(keys, [source.get_data_page(0), source.get_data_page(PAGE)])
    with closing(storage(socket, tiny, target, **ranks, tp_rank=1)) as other:
        assert other.batch_exists(keys) == 0
    with closing(storage(socket, tiny, target, layout="canonical")) as other:
        assert other.batch_exists(keys) == 0
    with closing(storage(socket, tiny, target, **ranks, tp_rank=0)) as reader:
        assert all(reader.batch_get_v1(keys, indices([3, 2])))
    assert torch.equal(page_of(target, 3), page_of(source, 0))


def test_pools_that_are_not_what_they_seem_are_not_kept_as_canonical(socket, tiny):
    keys = some_keys(2, seed=65)
    drafted = pools.keys_values("page_first", target_layer_num=3)
    short = pools.keys_values("page_first", layer_num=3, end_layer=3)
    gone = pools.keys_values("page_first")
    gone.kv_buffer = None
    for pool in (drafted, short, gone):
        with closing(storage(socket, tiny, pool, layout="canonical")) as made:
            assert made.batch_set_v1(keys, indices([0, 1])) == [False] * 2
            assert made.batch_exists(keys) == 0
    for pool in (drafted, short):
        with closing(storage(socket, tiny, pool)) as made:
            assert all(made.batch_set_v1(keys, indices([0, 1])))
            assert made._shelves["kv"].stored.manifest.layout == "opaque"


@pytest.mark.parametrize(
    "changed",
    [
        {"revision": "tests/tiny@2"},
        {"quantization": "fp8"},
        {"tenant": "other"},
    ],
)
def test_another_model_finds_nothing(changed, socket, tiny):
    pool, keys = pools.keys_values("page_first"), some_keys(2, seed=70)
    with closing(storage(socket, tiny, pool)) as writer:
        assert all(writer.batch_set_v1(keys, indices([0, 1])))
    with closing(storage(socket, tiny, pool, **changed)) as stranger:
        assert stranger.batch_exists(keys) == 0
    halves = pools.keys_values("page_first", dtype=torch.bfloat16)
    with closing(storage(socket, tiny, halves)) as stranger:
        assert stranger.batch_exists(keys) == 0


def test_a_model_that_sglang_was_told_to_change_is_another(tiny, tmp_path):
    settings, scales = Settings(revision="tests/tiny@1"), tmp_path / "scales.json"

    def revision(**said: object) -> str:
        return model_of(settings, None, SimpleNamespace(model_path=str(tiny), **said)).revision

    scales.write_text('{"scale": 1}')
    found = [
        revision(json_model_override_args="{}", quantization_param_path=None),
        revision(json_model_override_args='{"rope_parameters": {"rope_theta": 5e5}}'),
        revision(json_model_override_args='{"rope_parameters": {"rope_theta": 5e6}}'),
        revision(quantization_param_path=str(scales)),
    ]
    scales.write_text('{"scale": 2}')
    found.append(revision(quantization_param_path=str(scales)))
    assert len(set(found)) == 5
    assert found[0] == model_of(settings, str(tiny), None).revision
    for said in (
        {"json_model_override_args": '{"rope_scaling": {"type": "dynamic", "factor": 2}}'},
        {"quantization_param_path": str(tmp_path / "gone")},
    ):
        with pytest.raises(UnsupportedError):
            revision(**said)


def test_what_was_stored_before_a_clear_is_not_used_after_it(socket, tiny):
    pool, keys = pools.keys_values("page_first"), some_keys(2, seed=80)
    with closing(storage(socket, tiny, pool)) as made:
        assert all(made.batch_set_v1(keys, indices([0, 1])))
        made.clear()
        assert made.batch_exists(keys) == 0
        assert all(made.batch_set_v1(keys, indices([0, 1])))
        assert made.batch_exists(keys) == 2
    half = pools.keys_values("page_first", heads=1)
    with closing(storage(socket, tiny, half, tp_rank=0, tp_size=2)) as made:
        made.clear()
        assert made.batch_set_v1(keys, indices([0, 1])) == [False] * 2


def test_the_printed_words_are_what_is_read():
    settings = read_settings(json.loads(extra_config(None)) | {"prefetch_threshold": 64})
    assert settings.layout == "auto"
    assert launch_flags(None)[-1] == extra_config(None)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"sockets": "/x"}, "known are socket"),
        ({"timeout_seconds": 0}, "timeout_seconds must lie in"),
        ({"layout": "page_first"}, "layout"),
        ({"codec": "int4kv", "layout": "opaque"}, "must know what the bytes"),
    ],
)
def test_settings_that_make_no_sense_stop_the_engine(extra, says):
    with pytest.raises(ConfigError, match=says):
        read_settings(extra)
