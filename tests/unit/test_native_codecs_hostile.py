"""Hostile bytes and odd requests never make the C library touch what is not its own.

The library is built with AddressSanitizer and UndefinedBehaviorSanitizer and run in a process of
its own, where an access out of bounds ends the process. Needs a C compiler with both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hatch_build

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = (
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
ROUNDS = 12


def sanitizer_runtime() -> Path | None:
    """Return the library to load before Python, as the compiler names it."""
    compiler = hatch_build.find_compiler()
    if compiler is None:
        return None
    command = [compiler, "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return Path(found).resolve() if os.sep in found else None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_bytes_make_the_library_leave_its_arrays(tmp_path: Path) -> None:
    runtime = sanitizer_runtime()
    if runtime is None:
        pytest.skip("no C compiler with AddressSanitizer")
    library = tmp_path / "codecs.so"
    failure = hatch_build.compile_library(ROOT, hatch_build.CODECS, library, *SANITIZERS)
    if failure is not None:
        pytest.skip(f"no sanitizers: {failure.splitlines()[-1]}")
    settings = {
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.codec_fuzz", str(library), str(ROUNDS)],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert "sections decoded" in run.stdout
