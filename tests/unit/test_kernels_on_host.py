"""The CUDA kernels themselves, run on the CPU thread by thread, give NumPy's bytes.

Pages are shuffled, chunks begin inside a page, heads and tokens lie in either order. Needs g++;
the same comparison on a GPU is tests/gpu/test_codec_kernels.py.
"""

from __future__ import annotations

import pytest

from kvstore.compression.shapes import CodecId, Kind, SourceType
from tests.support.kernels import (
    CODECS,
    SIZES,
    WIDE,
    HostKernels,
    Scene,
    check_kernels,
)
from tests.support.variable_kernels import (
    CASES,
    DAMAGED,
    check_damage,
    check_every_bf16,
    check_variable,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(tmp_path_factory)


@pytest.mark.parametrize("size", [*SIZES, *WIDE], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_kernels_give_the_bytes_of_numpy(
    kernels: HostKernels, codec: CodecId, size: tuple[int, int, int]
) -> None:
    check_kernels(kernels, codec, size)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("value", [0x7FC0, 0x7F80, 0xFF80])
def test_kernels_say_that_a_section_is_not_finite(
    kernels: HostKernels, codec: CodecId, value: int
) -> None:
    for kind in Kind:
        scene = Scene.by_chance(codec, kind, SourceType.BFLOAT16, (2, 70, 64), 0)
        scene.put(chunk=1, section=0, value=value)
        reports = scene.encode(kernels)
        assert (reports["broken"] != 0).tolist() == [[False, False], [True, False]]


def test_halves_that_are_rounded_up_stay_finite(kernels: HostKernels) -> None:
    scene = Scene.by_chance(CodecId.INT8KV, Kind.K, SourceType.FLOAT16, (1, 70, 64), 0)
    scene.planes[:] = 0x7BFF  # 127 times the scale that is stored is more than any half
    scene.check_encode(kernels)
    scene.check_decode(kernels)
    assert (scene.values(0, 0) == 0x7BFF).all()


@pytest.mark.parametrize(("codec", "source", "kind", "size", "flavour"), CASES, ids=str)
def test_kernels_of_variable_rate_give_the_bytes_of_numpy(
    kernels: HostKernels,
    codec: CodecId,
    source: SourceType,
    kind: Kind,
    size: tuple[int, int, int],
    flavour: str,
) -> None:
    check_variable(kernels, codec, source, kind, size, flavour)


def test_exp3_kernels_give_back_every_bfloat16(kernels: HostKernels) -> None:
    check_every_bf16(kernels)


@pytest.mark.parametrize(("codec", "kind"), DAMAGED, ids=str)
def test_damaged_sections_are_found_out(kernels: HostKernels, codec: CodecId, kind: Kind) -> None:
    check_damage(kernels, codec, kind)
