"""Parts of SGLang out of its released wheel: what its storage is asked through, and its pools.

SGLang itself needs a GPU and much else. The modules named here are its own, unchanged; whatever
else they import is a stand-in that is never truly called.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

VERSION = "0.5.23"
FOLDER = Path(sys.prefix) / f"sglang-{VERSION}"
PARTS = (
    "sglang/srt/environ.py",
    "sglang/srt/mem_cache/hicache_storage.py",
    "sglang/srt/mem_cache/pool_host/base.py",
    "sglang/srt/mem_cache/pool_host/hisparse.py",
    "sglang/srt/mem_cache/pool_host/mha.py",
    "sglang/srt/mem_cache/pool_host/mla.py",
    "sglang/srt/mem_cache/pool_host/page_unified.py",
    "sglang/srt/mem_cache/storage/backend_factory.py",
    f"sglang-{VERSION}.dist-info/METADATA",
)
_DOWNLOAD_SECONDS_MAX = 240


def fetch() -> str:
    """Have the parts in `FOLDER`; return why they are not there, or nothing."""
    if all((FOLDER / part).is_file() for part in PARTS):
        return ""
    wheels = FOLDER / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
    command += ["--platform", "manylinux_2_34_x86_64", "--dest", str(wheels), f"sglang=={VERSION}"]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS_MAX
        )
    except subprocess.TimeoutExpired:
        return "the wheel does not come"
    if done.returncode:
        return f"no wheel: {done.stderr[-400:]}"
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for part in PARTS:
            archive.extract(part, FOLDER)
    return ""


class StandIn(type):
    """A class that stands for anything: calling it gives None, and so does what it is asked."""

    def __call__(cls, *arguments: object, **options: object) -> None:
        return None

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(name, (), {})


class StandInModule(ModuleType):
    """A module of which every name is a stand-in."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(name, (), {})


class StandIns(MetaPathFinder, Loader):
    """Finds what is not among the parts."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in ("sglang", "sgl_kernel"):
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is executed."""


def install() -> None:
    """Have `import sglang` find the parts, and stand-ins for the rest."""
    sys.path.append(str(FOLDER))
    sys.meta_path.append(StandIns())
