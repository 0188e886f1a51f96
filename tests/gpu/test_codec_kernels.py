"""On a GPU the kernels give NumPy's bytes: the scenes of unit/test_kernels_on_host.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore.compression.shapes import CodecId, Kind, SourceType
from kvstore.gpu.batches import Places
from kvstore.gpu.kernels import WIDTH_MAX, WIDTHS_MAX, Kernels, load
from tests.support.kernels import CODECS, Scene

pytestmark = pytest.mark.gpu

SIZES = ((2, 64, 64), (1, 70, 80), (3, 33, 96), (1, 65, 112), (8, 256, 128), (1, 300, 192))
WIDE = ((1, 20, 256), (1, 66, 576), (1, 1, 64))


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


@pytest.mark.parametrize("size", [*SIZES, *WIDE], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_kernels_give_the_bytes_of_numpy(
    kernels: GpuKernels, codec: CodecId, size: tuple[int, int, int]
) -> None:
    if size[2] > WIDTHS_MAX.get(CODECS[codec], WIDTH_MAX):
        pytest.skip("refused by gpu/kernels.py")
    for kind in Kind:
        for source in (SourceType.BFLOAT16, SourceType.FLOAT16):
            for sinks in (0, 4):
                scene = Scene.by_chance(codec, kind, source, size, sinks)
                scene.check_encode(kernels)
                scene.check_decode(kernels)
