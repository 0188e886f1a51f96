"""The GPU for tests notices kernels that lack a barrier, or wait at different ones. Needs g++."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import pytest

from kvstore.gpu.batches import BATCH
from tests.support.daemon import REPOSITORY
from tests.support.kernels import build_host_library

# What thread 0, or lane 0 of each warp, says is read by the others: right behind a barrier alone.
KERNELS = """
#include "batch.cuh"

template <typename Wait>
KV_INLINE void say(const Batch &batch, uint32_t speaker, const Wait &wait) {
    __shared__ uint32_t said[KV_WARPS];
    for (uint32_t k = 0; k < 3; k++) {
        uint32_t word = 100 * blockIdx.x + k + 1, place = threadIdx.x / speaker;
        if (threadIdx.x % speaker == 0) {
            said[place] = word;
        }
        wait();
        if (said[place] != word) {
            atomicAdd(batch.scratch, 1u);
        }
        __syncthreads();
    }
}

extern "C" __global__ void block_waits(const Batch batch) {
    say(batch, KV_THREADS, [] { __syncthreads(); });
}
extern "C" __global__ void block_does_not(const Batch batch) { say(batch, KV_THREADS, [] {}); }
extern "C" __global__ void warp_waits(const Batch batch) { say(batch, 32, [] { __syncwarp(); }); }
extern "C" __global__ void warp_does_not(const Batch batch) { say(batch, 32, [] {}); }
extern "C" __global__ void waits_elsewhere(const Batch batch) {
    if (threadIdx.x < 32) {
        __syncthreads();
        batch.scratch[0] = 1;
    } else {
        __syncthreads();
    }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("barriers")
    (folder / "barriers.cu").write_text(KERNELS)
    return build_host_library("barriers", tmp_path_factory, folder)


def run(library: ctypes.CDLL, kernel: str) -> int:
    """Return how often a thread of three blocks has read what was not said yet."""
    wrong, batch = np.zeros(1, np.uint32), np.zeros(1, BATCH)
    batch["scratch"] = wrong.ctypes.data
    address = ctypes.cast(getattr(library, kernel), ctypes.c_void_p)
    library.host_launch(address, ctypes.c_uint(3), ctypes.c_void_p(batch.ctypes.data))
    return int(wrong[0])


@pytest.mark.parametrize("who", ["block", "warp"])
def test_a_barrier_that_is_missing_is_noticed(library: ctypes.CDLL, who: str) -> None:
    assert run(library, f"{who}_waits") == 0
    assert run(library, f"{who}_does_not") > 0


def test_threads_that_wait_at_different_barriers_are_stopped(library: ctypes.CDLL) -> None:
    words = [library._name, "waits_elsewhere"]
    code = "import ctypes, sys\nfrom tests.unit.test_host_gpu import run\n"
    code += "run(ctypes.CDLL(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code, *words]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "threads wait at different barriers" in ended.stderr
