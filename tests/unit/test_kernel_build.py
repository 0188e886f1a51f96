"""The kernels compile for every GPU we name, without one, and stay within their budgets.

Needs NVRTC: the dependency group `cuda-test`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvstore.errors import RequestError
from kvstore.gpu import build, kernels
from kvstore.gpu.batches import Chunks, Pages, Places
from kvstore.gpu.nvrtc import CompileError, Compiler, find_compiler

# Registers: two blocks of 256 threads a multiprocessor need 128 or fewer.
REGISTERS_MAX = 128
# On sm_100 the compiler prepares all values of a thread at once: 64 of int8, two codings of nvfp4.
REGISTERS_MAX_OF = {"int8": 160, "nvfp4": 168}
SHARED_MAX_BYTES = 48 * 1024
SPILLED_MAX_BYTES = 16  # a counter outside of the loops
SPILLED_MAX_BYTES_OF = {"nvfp4": 48, "int8": 32, "rans": 32, "ecsq": 48}
# Machine instructions of a whole kernel, all paths and unrolled loops: what a change may not
# exceed without being looked at.
INSTRUCTIONS_MAX = {
    "raw": 400,
    "whole": 3200,
    "xxh3": 2600,
    "fp8": 1400,
    "int8": 3200,
    "int4": 2600,
    "nvfp4": 7000,
    "hadamard": 5000,
    "compat": 1600,
    "spans": 320,
    "exp3": 2200,
    "rans": 1800,
    "ecsq": 2200,
}
# An sm_89 has no instruction that these sources use and an sm_80 has not, and kernels need as much
# there as elsewhere, within a few hundredths: compiling for it, too, tells nothing and takes as
# long. A build compiles everything for it.
LIKE_80 = 89


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    found = find_compiler()
    if found is None:
        pytest.skip("no NVRTC: pip install --group cuda-test")
    return found


OTHERS = {
    "raw": {"raw_gather", "raw_scatter"},
    "whole": {"whole_gather", "whole_scatter"},
    "xxh3": {"xxh3_blocks"},
    "spans": {"spans_lay"},
}
"""The kernels of sources that are for no codec."""


def names_of(source: str) -> set[str]:
    """Return the kernels of *source* that can be launched."""
    found = set(OTHERS.get(source, ()))
    for codec in (codec for codec, other in kernels.CODECS.items() if other == source):
        directions = ("measure", "place") if codec in kernels.VARIABLE else ("encode",)
        for side, direction, dtype in product(
            kernels.SIDES, (*directions, "decode"), kernels.DTYPES_OF.get(codec, kernels.DTYPES)
        ):
            found.update(kernels.kernel_names(codec, side, direction, dtype))
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("source", build.source_names())
def test_all_kernels_are_there_and_stay_within_their_budget(
    compiler: Compiler, source: str
) -> None:
    for architecture in build.ARCHITECTURES:
        if architecture == LIKE_80:
            continue
        code, uses = build.compile_cubin(compiler, source, architecture)
        assert code.startswith(b"\x7fELF")
        assert all(use.kernel.encode() in code for use in uses)
        assert {use.kernel for use in uses} == names_of(source)
        for use in uses:
            assert use.registers <= REGISTERS_MAX_OF.get(source, REGISTERS_MAX), use
            assert use.shared_bytes <= SHARED_MAX_BYTES, use
            spilled_max = SPILLED_MAX_BYTES_OF.get(source, SPILLED_MAX_BYTES)
            assert use.spilled_bytes <= spilled_max, use
            assert 0 < use.instructions <= INSTRUCTIONS_MAX[source], use


def test_ptx_names_the_architecture_that_every_gpu_since_can_run(compiler: Compiler) -> None:
    assert b".target sm_80" in build.compile_ptx(compiler, "raw")


def test_a_kernel_that_is_wrong_is_refused_with_the_words_of_the_compiler(
    compiler: Compiler,
) -> None:
    with pytest.raises(CompileError, match="undefined_name"):
        compiler.compile("int x = undefined_name;", "wrong.cu", [], to_ptx=True)


# --- without a compiler -----------------------------------------------------------------


def test_every_codec_has_its_source() -> None:
    assert {*kernels.CODECS.values(), "raw", "spans", "whole", "xxh3"} == set(build.source_names())


def test_the_fingerprint_follows_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build.fingerprint()
    for path in build.SOURCES.glob("*.cu*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.fingerprint() == before
    (tmp_path / "int8.cuh").write_text("/* another */")
    assert build.fingerprint() != before


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [(80, "sm_80.cubin"), (86, "sm_80.cubin"), (90, "sm_90.cubin"), (75, "ptx"), (120, "ptx")],
)
def test_a_gpu_takes_code_of_its_own_major_number(
    tmp_path: Path, architecture: int, expected: str
) -> None:
    for known in (80, 90):
        (tmp_path / build.cubin_name("raw", known)).touch()
    assert build.find_code(tmp_path, "raw", architecture).name.endswith(expected)


@pytest.mark.parametrize("is_late", [False, True])
def test_kernels_are_there_when_all_of_them_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    def make(_: object, folder: Path, architecture: int) -> None:
        assert architecture == 90
        folder.mkdir()
        (folder / "raw.ptx").write_text("ours")
        assert not cached.exists()
        if is_late:
            cached.mkdir()
            (cached / "raw.ptx").write_text("another's")

    cached = tmp_path / "kvstore" / "kernels" / f"{build.fingerprint()}.sm_90"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "find_compiler", object)
    monkeypatch.setattr(kernels, "build_for", make)
    assert kernels.find_built(90) == cached
    assert (cached / "raw.ptx").read_text() == ("another's" if is_late else "ours")
    assert list(cached.parent.iterdir()) == [cached]


def test_kernels_that_cannot_be_built_are_no_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise CompileError("raw.cu does not compile")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "find_compiler", object)
    monkeypatch.setattr(kernels, "build_for", refuse)
    assert kernels.find_built(90) is None
    assert "raw.cu does not compile" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert kernels.find_built(90) is None
    assert "Not a directory" in caplog.text


def test_an_older_compiler_leaves_out_what_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def compile_cubin(_: object, source: str, architecture: int) -> tuple[bytes, list[object]]:
        asked.append(architecture)
        return b"", []

    monkeypatch.setattr(build, "compile_cubin", compile_cubin)
    monkeypatch.setattr(build, "compile_ptx", lambda *_: b"")
    monkeypatch.setattr(build, "source_names", lambda: ["raw"])
    build.build(SimpleNamespace(architectures=lambda: [75, 80, 90, 89]), tmp_path)
    assert sorted(asked) == [80, 89, 90]

    for architecture, expected in ((90, "raw.sm_90.cubin"), (120, "raw.compute_80.ptx")):
        folder = tmp_path / str(architecture)
        build.build_for(SimpleNamespace(architectures=lambda: [80, 90]), folder, architecture)
        assert [path.name for path in folder.iterdir()] == [expected]


def test_a_codec_of_variable_rate_needs_more_than_others() -> None:
    chunks = Chunks(chunk_count=2, section_count=3, heads=2, tokens=70, width=64, span_count=6)
    pages = Pages(page_tokens=16, page_count=5, page_stride=4096, token_stride=128, head_stride=256)
    places = Places(sections=16, pages=16, containers=16, reports=16)
    assert kernels.scratch_bytes("exp3", chunks) == 2 * 3 * 4 * 4
    assert kernels.scratch_bytes("int8", chunks) == 0
    with pytest.raises(RequestError, match="need spans"):
        kernels.checked_batch("exp3", chunks, pages, places)
    placed = replace(places, spans=16, scratch=16)
    assert kernels.checked_batch("exp3", chunks, pages, placed)["span_count"] == 6
    large = replace(chunks, heads=1 << 20)
    with pytest.raises(RequestError, match="below 2147483648 bytes"):
        kernels.checked_batch("rans", large, pages, placed)
    with pytest.raises(RequestError, match="exp3 kernels take bf16, not fp16"):
        kernels.kernel_names("exp3", "keys", "measure", "fp16")


def test_no_gpu_is_a_value() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert kernels.load() is None
