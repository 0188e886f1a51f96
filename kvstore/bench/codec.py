"""`kvstore bench codec`: what codecs do to a small model, and how fast they are.

Model, weights and other systems' codecs are part of the repository and of no wheel; PyTorch is
needed here and nowhere else. This command finds them, or says what is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import kvstore

if TYPE_CHECKING:
    from collections.abc import Callable

_BENCH: Final = Path("tests", "bench", "quality")


def main(argv: list[str]) -> int:
    """Measure and print; return 0, whatever the figures, and 1 when something is missing."""
    root = Path(kvstore.__file__).resolve().parents[1]
    lacking = missing(root, has_torch=importlib.util.find_spec("torch") is not None)
    if lacking is not None:
        print(f"kvstore bench codec: {lacking}", file=sys.stderr)
        return 1
    sys.path.insert(0, str(root))
    run: Callable[[list[str]], int] = importlib.import_module("tests.bench.quality.bench").main
    return run(argv)


def missing(root: Path, *, has_torch: bool) -> str | None:
    """Return what keeps the bench from running with the sources at *root*, or None."""
    folder = root / _BENCH
    if not (folder / "weights.npz").is_file():
        return f"runs from a checkout only: the installed package has no {folder} and no weights"
    if not has_torch:
        return "needs PyTorch: pip install 'kvstore[torch]'"
    return None
