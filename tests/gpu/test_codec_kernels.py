"""On a GPU the kernels give NumPy's bytes: the scenes of unit/test_kernels_on_host.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore.compression.shapes import CodecId
from kvstore.gpu.batches import Places
from kvstore.gpu.kernels import Kernels, load
from tests.support.kernels import CODECS, SIZES, WIDE, Scene, check_kernels

pytestmark = pytest.mark.gpu


class GpuKernels:
    """Copies a scene to the device, runs a kernel there, and copies back."""

    def __init__(self, cupy: Any, kernels: Kernels) -> None:
        self._cupy, self._kernels = cupy, kernels

    def run(self, source: str, name: str, grid: int, scene: Scene, reports: np.ndarray) -> None:
        del source, grid
        cupy = self._cupy
        planes, containers = cupy.asarray(scene.planes), cupy.asarray(scene.containers)
        found = cupy.asarray(reports.view(np.uint8))
        records = scene.section_records()
        records["plane"] += np.uint64(planes.data.ptr)
        step = scene.containers.strides[0]
        starts = containers.data.ptr + step * np.arange(len(scene.containers))
        kept = [
            cupy.asarray(records.view(np.uint8)),
            cupy.asarray(scene.table),
            cupy.asarray(starts.astype(np.uint64)),
        ]
        places = Places(
            sections=kept[0].data.ptr,
            pages=kept[1].data.ptr,
            containers=kept[2].data.ptr,
            reports=found.data.ptr,
        )
        codec, side, direction, dtype = name.split("_")
        self._kernels.launch(codec, side, direction, dtype, scene.batch(places))
        cupy.cuda.Device().synchronize()
        scene.planes[:] = planes.get()
        scene.containers[:] = containers.get()
        reports.view(np.uint8)[:] = found.get()


@pytest.fixture(scope="module")
def kernels() -> GpuKernels:
    cupy = pytest.importorskip("cupy")
    found = load()
    if found is None:
        pytest.skip("no GPU, or no kernels for it")
    return GpuKernels(cupy, found)


@pytest.mark.parametrize("size", [*SIZES, (8, 256, 128), *WIDE], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_kernels_give_the_bytes_of_numpy(
    kernels: GpuKernels, codec: CodecId, size: tuple[int, int, int]
) -> None:
    check_kernels(kernels, codec, size)
