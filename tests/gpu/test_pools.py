"""On a GPU: what one process puts into a pool another reads, also when its owner is gone."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from kvstore.bench.gpu import QUICK
from kvstore.bench.gpu_pool import measure_pool
from kvstore.gpu.cuda_pools import CudaPools
from kvstore.gpu.cupy_device import CupyDevice, open_device
from kvstore.gpu.device import Copy, Memory, Urgency, host_bytes, wait_for
from kvstore.gpu.pools import Exported, Pool, Pools
from kvstore.limits import MIB
from tests.gpu.test_transfers import Bounce
from tests.support.daemon import REPOSITORY
from tests.support.device import World, settings
from tests.support.head_scenes import Pooled, fetch_scene, store_scene

pytestmark = pytest.mark.gpu

SIZE = 4 * MIB


@pytest.fixture(scope="module")
def device() -> CupyDevice:
    found = open_device()
    if not isinstance(found, CupyDevice):
        pytest.skip("no GPU, no CuPy, or no kernels")
    return found


def move(device: CupyDevice, pool: Pool | Memory, content: np.ndarray | None) -> np.ndarray:
    """Write *content* to *pool*, or read it."""
    pinned, stream = device.pin(SIZE), device.stream(Urgency.LOW)
    room = host_bytes(pinned.address, SIZE)
    if content is not None:
        room[:] = content
    ends = (pool.address, pinned.address)
    stream.copy([Copy(*(ends if content is not None else ends[::-1]), SIZE)])
    wait_for(stream.record())
    found = room.copy()
    pinned.free()
    return found


def beside(device: CupyDevice, pool: Pool) -> np.ndarray:
    """Copy *pool* to memory of *device*, and that to the host."""
    memory, stream = device.allocate(SIZE), device.stream(Urgency.LOW)
    stream.copy([Copy(memory.address, pool.address, SIZE)])
    wait_for(stream.record())
    found = move(device, memory, None)
    memory.free()
    return found


def pattern(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8)


OTHER = """
import sys
from kvstore.gpu.cupy_device import open_device
from kvstore.gpu.pools import Exported
from tests.gpu.test_pools import SIZE, beside, move, pattern
device = open_device(int(sys.argv[4]))
pool = device.pools().open(SIZE, Exported(int(sys.argv[1]), bytes.fromhex(sys.argv[2])))
assert device.pools().reaches(sys.argv[3])
assert (move(device, pool, None) == pattern(1)).all()
assert (beside(device, pool) == pattern(1)).all()
move(device, pool, pattern(2))
pool.close()
"""


def share(device: CupyDevice, pools: Pools, other: int) -> None:
    """Have a process on GPU number *other* read what is in a pool of *device*, and write to it."""
    pool = pools.make(SIZE)
    move(device, pool, pattern(1))
    fd, handle = pool.exported
    words = [str(fd), handle.hex(), pool.identity, str(other)]
    passed = [fd] if fd >= 0 else []
    command = [sys.executable, "-c", OTHER, *words]
    subprocess.run(command, check=True, cwd=REPOSITORY, pass_fds=passed)
    assert (move(device, pool, None) == pattern(2)).all()
    pool.close()


def test_two_processes_share_a_pool(device) -> None:
    share(device, device.pools(), 0)


@pytest.mark.parametrize("by", ["descriptor", "handle"])
def test_a_process_on_a_peer_shares_the_pool_too(device, by) -> None:
    peer = open_device(1)
    if not isinstance(peer, CupyDevice):
        pytest.skip("one GPU: a peer is another")
    pools = device.pools() if by == "descriptor" else CudaPools(device, None)
    if not peer.pools().reaches(pools.identity):
        pytest.skip("the second GPU does not work on memory of the first: no NVLink, no PCIe P2P")
    share(device, pools, 1)


def test_what_goes_by_descriptor_outlives_its_owner(device) -> None:
    pools = device.pools()
    pool = pools.make(SIZE)
    if pool.exported.fd < 0:
        pytest.skip("memory goes by handle here")
    move(device, pool, pattern(3))
    other = pools.open(pool.size_bytes, Exported(os.dup(pool.exported.fd)))
    pool.close()
    assert (move(device, other, None) == pattern(3)).all()
    other.close()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("codec", ["int4kv", "hq4"])
def test_heads_come_where_they_belong(device, codec: str, seed: int) -> None:
    bounce = Bounce(device)
    for scene in (store_scene, fetch_scene):
        world = World(device, seed, window_bytes=4096, put=bounce.put, get=bounce.get, codec=codec)
        pooled = Pooled(world, settings())
        assert scene(pooled)
        pooled.close()


@pytest.mark.parametrize("codec", ["raw", "int8kv", "int4kv"])
def test_what_is_stored_in_a_daemons_pool_is_loaded_from_it(device, codec: str) -> None:
    speeds = measure_pool(device, QUICK, 1, "0", codec)  # raises where bytes are wrong
    assert min(speeds) > 0
