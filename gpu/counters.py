"""What transfers of one engine have done, and every way in which they had to do less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Final

MEANINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "chunks_stored": "Chunks that the device has moved to host memory.",
        "chunks_loaded": "Chunks that the device has moved to pages.",
        "direct_chunks": "Moved by the copy engine page by page, without staging.",
        "bounced_chunks": "Moved through pinned memory: the arena is not registered there.",
        "encoded_chunks": "Encoded by the device while it gathered them.",
        "decoded_chunks": "Decoded by the device while it scattered them.",
        "host_encoded_chunks": "Encoded on the host: there are no kernels, or they are misfits.",
        "host_decoded_chunks": "Put together or decoded on the host: the device cannot.",
        "brought_chunks": "Of those, brought from the pool: the device has no form for them there.",
        "misfit_chunks": "Encoded with more error than is allowed: left to the host.",
        "damaged_chunks": "Loaded, and not what was stored: deleted and computed anew.",
        "pools_refused": "The daemon has device memory that cannot be mapped: host tier instead.",
        "smaller_rings": "Less staging memory than asked for: the device had no more.",
        "registrations_failed": "Windows of the arena not registered: copies bounce from there on.",
        "failed_transfers": "Transfers given up because a call to the device failed.",
        "stuck_transfers": "Transfers given up because the device did not get done in time.",
        "lost_devices": "Contexts that broke for good: nothing is transferred behind that.",
    }
)
"""What each counter counts."""


@dataclass(slots=True)
class DeviceCounters:
    """Counts, see `MEANINGS`. Written by the threads that transfer; read at any time."""

    chunks_stored: int = 0
    chunks_loaded: int = 0
    direct_chunks: int = 0
    bounced_chunks: int = 0
    encoded_chunks: int = 0
    decoded_chunks: int = 0
    host_encoded_chunks: int = 0
    host_decoded_chunks: int = 0
    brought_chunks: int = 0
    misfit_chunks: int = 0
    damaged_chunks: int = 0
    pools_refused: int = 0
    smaller_rings: int = 0
    registrations_failed: int = 0
    failed_transfers: int = 0
    stuck_transfers: int = 0
    lost_devices: int = 0

    def values(self) -> dict[str, int]:
        """Return all of them by name."""
        return asdict(self)
