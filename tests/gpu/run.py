"""All that needs a GPU, in about ten minutes: kernels are built, tested and measured. `make gpu`.

It needs what kvstore needs, CuPy, pytest and hypothesis; PyTorch and transformers for all of it. A
part that fails stops no other: which did is said at the end, what they said is in gpu.log.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parents[2]
CONFIG: Final = "tests/gpu/pytest.ini"
PARTS: Final = {
    "kernels": ("-m", "kvstore.gpu.build", "build/kernels"),
    "tests": ("-m", "pytest", "-c", CONFIG, "--rootdir=.", "-q", "-m", "gpu", "tests/gpu"),
    "benchmark": ("-m", "kvstore", "bench", "gpu", "--budget", "240"),
}
TIMEOUT_SECONDS: Final = 400.0


def run(words: tuple[str, ...], log: Path) -> str:
    """Run one part, its words on the screen and in *log*; return how it ended."""
    command = (sys.executable, *words)
    with (
        log.open("ab") as file,
        subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        assert process.stdout is not None
        # Also of a part that hangs without a word there is an end.
        last = threading.Timer(TIMEOUT_SECONDS, process.kill)
        last.start()
        for line in process.stdout:
            file.write(line)
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
        last.cancel()
    return "passed" if process.returncode == 0 else f"failed with {process.returncode}"


def main() -> int:
    log = REPOSITORY / "gpu.log"
    log.write_bytes(b"")
    found = {}
    for name, words in PARTS.items():
        started_at = time.monotonic()
        ended = run(words, log)
        found[name] = f"{ended} ({time.monotonic() - started_at:.0f} s)"
    for name, ended in found.items():
        sys.stdout.write(f"{name:10} {ended}\n")
    return 0 if all(ended.startswith("passed") for ended in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
