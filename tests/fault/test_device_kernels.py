"""Chunks that the kernels themselves encode and decode, run on the CPU thread by thread.

Elsewhere the stand-in runs their twins: here what a lane tells kernels is held against what they
read. Needs g++; on a GPU: tests/gpu/test_transfers.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.gpu.standin import Standin
from tests.support.coded_engine import (
    COUNT,
    POLICIES,
    assert_alike,
    by_host,
    decoded,
    engine_of,
    load,
    put,
    store,
    stored,
)
from tests.support.daemon import Daemon
from tests.support.host_twins import HostTwins
from tests.support.making import make_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CASES = [
    ("exp3", "bfloat16"),
    *(("rans", dtype) for dtype in ("bfloat16", "float16", "float32")),
    *((name, dtype) for name in ("ecsq-mid", "ecsq-lo") for dtype in ("bfloat16", "float16")),
    *(("nvfp4-compat", dtype) for dtype in ("bfloat16", "float16", "float32")),
    *((name, "bfloat16") for name in ("int4kv", "hq4 in a layer")),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with Daemon(tmp_path_factory.mktemp("kernels")) as started:
        yield started


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> HostTwins:
    return HostTwins(tmp_path_factory)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_kernels_store_and_load_what_the_host_would(daemon, twins, name: str, dtype: str) -> None:
    store_and_load(daemon, twins, name, dtype)


def test_kernels_do_so_in_a_pool_and_put_heads_there(twins, tmp_path) -> None:
    settings = {"tiers.device.gpu": "standin", "tiers.device.capacity": "16MiB"}
    with Daemon(tmp_path, settings) as daemon, daemon.connect() as client:
        for name in ("int4kv", "exp3"):
            store_and_load(daemon, twins, name, "bfloat16")
        (pool,) = [tier for tier in client.stats().tiers if tier.tier == "device"]
        assert pool.counters["stored_chunks"] == pool.counters["loaded_chunks"] == 2 * COUNT


def store_and_load(daemon: Daemon, twins: HostTwins, name: str, dtype: str) -> None:
    policy = POLICIES[name]
    manifest = make_manifest(model=f"{name} {dtype}", codec=policy.codec, dtype=dtype)
    device = Standin(np.random.default_rng(len(name)), twins=twins)
    with daemon.connect() as client:
        space = client.attach(manifest), policy
        with engine_of(daemon, space, device=device) as engine:
            chunks = put(engine)
            assert store(engine).stored == COUNT
            assert_alike(stored(space), by_host(space, chunks))
            assert load(engine) == decoded(space, stored(space), engine.layout.chunk_bytes)
            counters = engine.on_gpu.counters
            assert counters.encoded_chunks == counters.decoded_chunks == COUNT
            assert counters.host_encoded_chunks == 0
