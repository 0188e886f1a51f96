"""Which GPUs there are. That there is none, or no driver for it, is a value, never an error."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final, NamedTuple

_NVIDIA_PROC: Final = Path("/proc/driver/nvidia")


class Devices(NamedTuple):
    """What a look at this host finds, without creating a CUDA context.

    *driver* is the loaded driver's version line, empty without one; *models* names one GPU
    an item; *has_cupy* says whether kernels could be launched from here.
    """

    driver: str
    models: tuple[str, ...]
    has_cupy: bool

    @property
    def usable(self) -> bool:
        """Whether this process could run kernels."""
        return bool(self.models) and self.has_cupy


def find_devices(proc: Path = _NVIDIA_PROC) -> Devices:
    """Return the NVIDIA GPUs that the kernel driver under *proc* knows."""
    has_cupy = importlib.util.find_spec("cupy") is not None
    try:
        driver = proc.joinpath("version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return Devices("", (), has_cupy)
    found = sorted(proc.glob("gpus/*/information"))
    return Devices(driver, tuple(map(_model_of, found)), has_cupy)


def _model_of(information: Path) -> str:
    for line in information.read_text().splitlines():
        field, _, value = line.partition(":")
        if field.strip() == "Model":
            return value.strip()
    return "unknown"
