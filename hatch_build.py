"""Build the C helper of `transfer/` with the system compiler.

As a hatchling hook it runs for every wheel and editable install; `python hatch_build.py` builds
in place for a checkout. Without a compiler the package stays pure Python and copies are slower.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("transfer/_copy.c")
LIBRARY = Path("transfer/_copy.so")
# The baseline of the architecture: the library itself chooses wider instructions at run time.
FLAGS = ("-O3", "-shared", "-fPIC", "-Wall", "-Wextra")


def find_compiler() -> str | None:
    """Return the C compiler: $CC when set, else the system's cc."""
    return shutil.which(os.environ.get("CC", "cc"))


def build_library(root: Path) -> str | None:
    """Compile the library below *root*; return why not when that failed.

    A library that is in use stays intact: the new one replaces it by a rename.
    """
    compiler = find_compiler()
    if compiler is None:
        return "no C compiler found"
    target = root / LIBRARY
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        built = Path(folder) / target.name
        command = [compiler, *FLAGS, "-o", str(built), str(root / SOURCE)]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if outcome.returncode != 0:
            return outcome.stderr.strip()
        built.replace(target)
    return None


def wheel_tag() -> str:
    """Return the tag of a wheel with the library: any Python 3, this platform."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"py3-none-{platform}"


class CopyLibraryHook(BuildHookInterface[Any]):
    """Add the compiled library to the wheel, or leave the wheel pure."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before the wheel is packed; *version* is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        failure = build_library(Path(self.root))
        if failure is not None:
            self.app.display_warning(f"transfer/_copy.so was not built: {failure}")
            return
        build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")
        build_data["pure_python"] = False
        build_data["tag"] = wheel_tag()


if __name__ == "__main__":
    problem = build_library(Path(__file__).resolve().parent)
    if problem is not None:
        sys.exit(f"transfer/_copy.so was not built: {problem}")
