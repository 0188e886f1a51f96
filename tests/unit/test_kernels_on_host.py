"""The CUDA kernels themselves, run on the CPU thread by thread, give NumPy's bytes.

Pages are shuffled, chunks begin inside a page, heads and tokens lie in either order. Needs g++;
the same comparison on a GPU is tests/gpu/test_codec_kernels.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.compression.shapes import CodecId, Kind, SourceType
from kvstore.gpu.kernels import WIDTH_MAX, WIDTHS_MAX
from tests.support.kernels import CODECS, HostKernels, Scene, build_host_kernels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHAPES = ((2, 64, 64), (1, 70, 80), (3, 33, 96), (1, 65, 112), (2, 128, 128), (1, 300, 192))
WIDE = ((1, 20, 256), (1, 66, 576), (1, 1, 64))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return build_host_kernels(Path(tmp_path_factory.mktemp("kernels")))


@pytest.mark.parametrize("size", [*SHAPES, *WIDE], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_kernels_give_the_bytes_of_numpy(
    kernels: HostKernels, codec: CodecId, size: tuple[int, int, int]
) -> None:
    if size[2] > WIDTHS_MAX.get(CODECS[codec], WIDTH_MAX):
        pytest.skip("refused by gpu/kernels.py")
    for kind in Kind:
        for source in (SourceType.BFLOAT16, SourceType.FLOAT16):
            for sinks in (0, 4):
                scene = Scene.by_chance(codec, kind, source, size, sinks)
                scene.check_encode(kernels)
                scene.check_decode(kernels)


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
