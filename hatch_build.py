"""Build the C libraries of `transfer/` and `compression/` with the system compiler.

As a hatchling hook it runs for every wheel and editable install; `python hatch_build.py` builds
in place for a checkout. Without a compiler the package stays pure Python: copies and codecs are
slower, and give the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The baseline of the architecture: each library itself chooses wider instructions at run time.
FLAGS = ("-O3", "-shared", "-fPIC", "-Wall", "-Wextra")


class Library(NamedTuple):
    """A shared library and what it is made of, relative to the root of the repository."""

    target: Path
    source: Path
    flags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Return the path of the target as build settings write it."""
        return self.target.as_posix()

    def is_built(self, root: Path) -> bool:
        """Return whether the target below *root* is younger than all that it is made of."""
        target = root / self.target
        folder = root / self.source.parent
        headers = (*folder.glob("*.[ch]"), *(root / "gpu" / "cuda").glob("*.cuh"), Path(__file__))
        return target.exists() and all(
            file.stat().st_mtime < target.stat().st_mtime for file in headers
        )


COPIES = Library(Path("transfer/_copy.so"), Path("transfer/_copy.c"))
# Every stored byte is the same on every machine, so no multiply-add is ever fused.
CODECS = Library(
    Path("compression/_codecs.so"),
    Path("compression/_codecs.c"),
    ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
LIBRARIES = (COPIES, CODECS)


def find_compiler() -> str | None:
    """Return the C compiler: $CC when set, else the system's cc."""
    return shutil.which(os.environ.get("CC", "cc"))


def compile_library(root: Path, library: Library, target: Path, *flags: str) -> str | None:
    """Compile *library* below *root* to *target*; return why not when that failed.

    A library that is in use stays intact: the new one replaces it by a rename.
    """
    compiler = find_compiler()
    if compiler is None:
        return "no C compiler found"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        built = Path(folder) / target.name
        options = (*FLAGS, *library.flags, *flags)
        command = [compiler, *options, "-o", str(built), str(root / library.source), "-lm"]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if outcome.returncode != 0:
            return outcome.stderr.strip()
        built.replace(target)
    return None


def build_libraries(root: Path) -> dict[str, str]:
    """Compile all libraries in place that changed; return why not for each that failed."""
    failures = {
        library.key: compile_library(root, library, root / library.target)
        for library in LIBRARIES
        if not library.is_built(root)
    }
    return {key: failure for key, failure in failures.items() if failure is not None}


def wheel_tag() -> str:
    """Return the tag of a wheel with a library: any Python 3, this platform."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"py3-none-{platform}"


class LibrariesHook(BuildHookInterface[Any]):
    """Add the compiled libraries to the wheel, or leave the wheel pure."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before the wheel is packed; *version* is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        failures = build_libraries(Path(self.root))
        for key, failure in failures.items():
            self.app.display_warning(f"{key} was not built: {failure}")
        built = [library.key for library in LIBRARIES if library.key not in failures]
        if built:
            build_data["artifacts"].extend(f"/{key}" for key in built)
            build_data["pure_python"] = False
            build_data["tag"] = wheel_tag()


if __name__ == "__main__":
    problems = build_libraries(Path(__file__).resolve().parent)
    if problems:
        sys.exit("\n".join(f"{key} was not built: {why}" for key, why in problems.items()))
