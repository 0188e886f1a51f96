"""What transfers of one engine have done, and every way in which they had to do less."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from kvstore.metrics import ENGINE_GPU_COUNTERS

MEANINGS: Final = ENGINE_GPU_COUNTERS
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
