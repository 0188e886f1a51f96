"""What transfers of one engine have done, and every way in which they had to do less."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class DeviceCounters:
    """Counts, each of one thing. Written by the threads that transfer; read at any time."""

    chunks_stored: int = 0
    chunks_loaded: int = 0
    direct_chunks: int = 0
    """Moved by the copy engine page by page, without staging."""
    bounced_chunks: int = 0
    """Moved through pinned memory, because the arena is not registered there."""
    encoded_chunks: int = 0
    """Encoded by the device while it gathered them."""
    decoded_chunks: int = 0
    """Decoded by the device while it scattered them."""
    host_encoded_chunks: int = 0
    """Encoded on the host, because the device has no kernels for them, or they are misfits."""
    host_decoded_chunks: int = 0
    """Put together or decoded on the host, because the device cannot."""
    misfit_chunks: int = 0
    """Encoded by the device with more error than is allowed: left to the host, and safer codecs."""
    damaged_chunks: int = 0
    """Loaded, and not what was stored: deleted and computed anew."""
    pools_refused: int = 0
    """The daemon has device memory, which cannot be mapped here: the host tier is used."""
    smaller_rings: int = 0
    """Less staging memory than asked for, because the device had no more."""
    registrations_failed: int = 0
    """Windows of the arena that could not be registered; from there on copies bounce."""
    failed_transfers: int = 0
    """Given up because a call to the device failed."""
    stuck_transfers: int = 0
    """Given up because the device did not get done in time."""
    lost_devices: int = 0
    """Contexts that broke for good; nothing is transferred behind that."""

    def values(self) -> dict[str, int]:
        """Return all of them by name."""
        return asdict(self)
