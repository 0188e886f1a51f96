"""On a GPU the kernels give NumPy's bytes: the scenes of unit/test_kernels_on_host.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from kvstore.compression.shapes import CodecId, Kind, SourceType
from kvstore.gpu.batches import Places
from kvstore.gpu.kernels import Kernels, load
from tests.support.kernels import CODECS, SIZES, WIDE, Scene, check_kernels
from tests.support.variable_kernels import (
    CASES,
    DAMAGED,
    check_damage,
    check_every_bf16,
    check_variable,
)

pytestmark = pytest.mark.gpu

LARGE = [
    (codec, SourceType.BFLOAT16, kind, (8, 256, 128), "normal")
    for codec in (CodecId.EXP3, CodecId.RANS, CodecId.ECSQ)
    for kind in Kind
]


class GpuKernels:
    """Copies a scene to the device, runs kernels there, and copies back."""

    def __init__(self, cupy: Any, kernels: Kernels) -> None:
        self._cupy, self._kernels = cupy, kernels

    def launch(
        self, codec: str, side: str, direction: str, dtype: str, scene: Scene, reports: np.ndarray
    ) -> None:
        with self._on_device(scene, reports) as batch:
            self._kernels.launch(codec, side, direction, dtype, batch)

    def lay(self, scene: Scene, reports: np.ndarray) -> None:
        with self._on_device(scene, reports) as batch:
            self._kernels.lay(batch)

    @contextmanager
    def _on_device(self, scene: Scene, reports: np.ndarray) -> Iterator[np.ndarray]:
        """Give the argument of a kernel; what it changed is in the scene's arrays afterwards."""
        cupy = self._cupy
        changing = [scene.planes, scene.containers, reports, scene.spans, scene.scratch]
        planes, containers, found, spans, scratch = on_device = [
            cupy.asarray(array.view(np.uint8)) for array in changing
        ]
        records = scene.section_records()
        records["plane"] += np.uint64(planes.data.ptr)
        step = scene.containers.strides[0]
        starts = containers.data.ptr + step * np.arange(len(scene.containers))
        kept = [
            cupy.asarray(records.view(np.uint8)),
            cupy.asarray(scene.table),
            cupy.asarray(starts.astype(np.uint64)),
            cupy.asarray(scene.coding.view(np.uint8)),
        ]
        scene.coding_at = kept[3].data.ptr
        yield scene.batch(
            Places(
                sections=kept[0].data.ptr,
                pages=kept[1].data.ptr,
                containers=kept[2].data.ptr,
                reports=found.data.ptr,
                spans=spans.data.ptr,
                scratch=scratch.data.ptr,
            )
        )
        cupy.cuda.Device().synchronize()
        for array, copy in zip(changing, on_device, strict=True):
            array.view(np.uint8)[:] = copy.get()


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


@pytest.mark.parametrize(("codec", "source", "kind", "size", "flavour"), [*CASES, *LARGE], ids=str)
def test_kernels_of_variable_rate_give_the_bytes_of_numpy(
    kernels: GpuKernels,
    codec: CodecId,
    source: SourceType,
    kind: Kind,
    size: tuple[int, int, int],
    flavour: str,
) -> None:
    check_variable(kernels, codec, source, kind, size, flavour)


def test_exp3_kernels_give_back_every_bfloat16(kernels: GpuKernels) -> None:
    check_every_bf16(kernels)


@pytest.mark.parametrize(("codec", "kind"), DAMAGED, ids=str)
def test_damaged_sections_are_found_out(kernels: GpuKernels, codec: CodecId, kind: Kind) -> None:
    check_damage(kernels, codec, kind)
