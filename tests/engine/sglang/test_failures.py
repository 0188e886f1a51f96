"""Whatever becomes of the daemon, the connector answers, and what it says it loaded is right."""

from __future__ import annotations

import logging
import signal
from contextlib import closing

import pytest
import torch

from deploy.demo.daemon import running_daemon
from tests.engine.sglang import pools
from tests.engine.sglang.pools import indices, page_of, some_keys, storage
from tests.support.daemon import Daemon
from tests.support.waiting import wait_until


def misses(made, keys, count):
    assert made.batch_exists(keys) == 0
    assert made.batch_get_v1(keys, indices(range(count))) == [False] * count
    assert made.batch_set_v1(keys, indices(range(count))) == [False] * count
    assert made.batch_exists_v2(keys).kv_hit_pages == 0
    assert not made.exists(keys[0])


def test_without_a_daemon_everything_is_a_miss(tmp_path, tiny):
    pool, keys = pools.keys_values("page_first"), some_keys(3, seed=1)
    with closing(storage(tmp_path / "nobody.sock", tiny, pool)) as made:
        misses(made, keys, 3)


def test_a_daemon_that_is_killed_is_a_miss_and_its_successor_is_found(tiny, tmp_path):
    pool, keys = pools.keys_values("page_first"), some_keys(3, seed=2)
    before = pool.kv_buffer.clone()
    daemon = Daemon(tmp_path)
    with daemon, closing(storage(daemon.socket, tiny, pool)) as made:
        assert all(made.batch_set_v1(keys, indices(range(3))))
        daemon.kill()
        misses(made, keys, 3)
        assert torch.equal(pool.kv_buffer, before)
        daemon.launch()
        wait_until(
            lambda: all(made.batch_set_v1(keys, indices(range(3)))), what="it is found again"
        )
        assert made.batch_exists(keys) == 3


def test_a_daemon_that_hangs_is_a_miss(tiny):
    pool, keys = pools.keys_values("page_first"), some_keys(3, seed=3)
    with (
        running_daemon(["tiers.host.capacity=16MiB"]) as (socket, process),
        closing(storage(socket, tiny, pool, timeout_seconds=0.2)) as made,
    ):
        wait_until(lambda: all(made.batch_set_v1(keys, indices(range(3)))), what="stored")
        process.send_signal(signal.SIGSTOP)
        try:
            misses(made, keys, 3)
        finally:
            process.send_signal(signal.SIGCONT)


def test_what_is_asked_wrongly_is_a_miss(socket, tiny, caplog):
    pool, keys = pools.keys_values("page_first"), some_keys(2, seed=4)
    before = pool.kv_buffer.clone()
    with caplog.at_level(logging.WARNING), closing(storage(socket, tiny, pool)) as made:
        assert made.batch_set_v1(["not a hash", keys[0]], indices([0, 1])) == [False] * 2
        assert made.batch_set_v1(keys, indices([0])) == [False] * 2
        assert made.batch_set_v1(keys, indices([0, 1])[1:-3]) == [False] * 2
        assert made.batch_set_v1(keys, indices([0, 1]) + 3) == [False] * 2
        assert made.batch_set_v1(keys, indices([0, 99])) == [False] * 2
        assert not made.set(keys[0], pool.get_data_page(0)[:-1])
        assert made.batch_get(keys, [None]) == [None, None]
        assert made.batch_exists(keys) == 0
        assert all(made.batch_set_v1(keys, indices([0, 1])))
    assert "is no SHA-256" in caplog.text
    assert "not whole pages of 8 tokens" in caplog.text
    assert torch.equal(pool.kv_buffer, before)


def test_a_model_that_is_not_known_is_served_without(socket, tmp_path, caplog):
    pool, keys = pools.keys_values("page_first"), some_keys(2, seed=5)
    with caplog.at_level(logging.WARNING), closing(storage(socket, tmp_path, pool)) as made:
        misses(made, keys, 2)
    assert "no configuration is found" in caplog.text


def test_injected_failures_are_misses_and_nothing_is_wrong(socket, tiny, monkeypatch):
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.3")
    source, target = pools.keys_values("page_first"), pools.keys_values("page_head", seed=2)
    with (
        closing(storage(socket, tiny, source)) as writer,
        closing(storage(socket, tiny, target)) as reader,
    ):
        assert type(writer).__name__ == "HiCacheStorageFailureInjector"
        for turn in range(40):
            keys, pages = some_keys(4, seed=100 + turn), range(turn % 2 * 4, turn % 2 * 4 + 4)
            writer.batch_set_v1(keys, indices(pages))
            target.kv_buffer.zero_()
            came = reader.batch_get_v1(keys, indices(pages))
            assert came in ([True] * 4, [False] * 4)
            for page in pages if all(came) else ():
                assert torch.equal(page_of(target, page), page_of(source, page))


@pytest.mark.parametrize("codec", ["lz4", "int8kv"])
def test_pages_are_encoded_as_the_settings_say(codec, socket, tiny):
    fields = {"dtype": torch.bfloat16}
    source = pools.keys_values("page_first", **fields)
    target = pools.keys_values("page_head", seed=2, **fields)
    keys = some_keys(2, seed=90)
    with closing(storage(socket, tiny, source, codec=codec)) as writer:
        assert all(writer.batch_set_v1(keys, indices([0, 1])))
    with closing(storage(socket, tiny, target, codec=codec)) as reader:
        assert all(reader.batch_get_v1(keys, indices([4, 5])))
    for page in (0, 1):
        torch.testing.assert_close(
            page_of(target, page + 4), page_of(source, page), atol=0.1, rtol=0.1
        )
