"""Which GPUs there are. That there is none, or no driver for it, is a value, never an error."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

_ROOT: Final = Path("/")


class Devices(NamedTuple):
    """The NVIDIA GPUs of a host, found without creating a CUDA context.

    *driver* is the loaded driver's version line, empty without one; *nodes* names the device
    nodes that this process's container has.
    """

    driver: str
    nodes: tuple[str, ...]

    @property
    def are_absent(self) -> bool:
        """Whether there is neither a driver nor a device."""
        return not self.driver and not self.nodes


def find_devices(root: Path = _ROOT) -> Devices:
    """Return the GPUs of the host whose /proc and /dev lie under *root*."""
    try:
        version = (root / "proc/driver/nvidia/version").read_text().strip()
    except OSError:
        version = ""
    nodes = sorted(path.name for path in (root / "dev").glob("nvidia[0-9]*"))
    return Devices(version.partition("\n")[0], tuple(nodes))
