"""On a GPU: what one process puts into a pool another reads, also when its owner is gone."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from kvstore.gpu.cupy_device import CupyDevice, open_device
from kvstore.gpu.device import Copy, Urgency, host_bytes, wait_for
from kvstore.gpu.pools import Exported, Pool
from kvstore.limits import MIB
from tests.support.daemon import REPOSITORY

pytestmark = pytest.mark.gpu

SIZE = 4 * MIB


@pytest.fixture(scope="module")
def device() -> CupyDevice:
    found = open_device()
    if not isinstance(found, CupyDevice):
        pytest.skip("no GPU, no CuPy, or no kernels")
    return found


def move(device: CupyDevice, pool: Pool, content: np.ndarray | None) -> np.ndarray:
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


def pattern(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8)


OTHER = """
import sys
from kvstore.gpu.cupy_device import open_device
from kvstore.gpu.pools import Exported
from tests.gpu.test_pools import SIZE, move, pattern
device = open_device()
pool = device.pools().open(SIZE, Exported(int(sys.argv[1]), bytes.fromhex(sys.argv[2])))
assert device.pools().reaches(sys.argv[3])
assert (move(device, pool, None) == pattern(1)).all()
move(device, pool, pattern(2))
pool.close()
"""


def test_two_processes_share_a_pool(device) -> None:
    pool = device.pools().make(SIZE)
    move(device, pool, pattern(1))
    fd, handle = pool.exported
    words = [str(fd), handle.hex(), pool.identity]
    passed = [fd] if fd >= 0 else []
    command = [sys.executable, "-c", OTHER, *words]
    subprocess.run(command, check=True, cwd=REPOSITORY, pass_fds=passed)
    assert (move(device, pool, None) == pattern(2)).all()
    pool.close()


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
