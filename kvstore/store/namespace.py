"""The chunks of one manifest, by digest."""

from __future__ import annotations

from array import array
from typing import Final

from kvstore.protocol.manifest import Manifest
from kvstore.types import NO_SLOT, Digest, NamespaceId

RUN_SLOTS: Final = 64
"""How many chunks a look-up compares at once."""


class Namespace:
    """The chunks of one manifest. *ready* ones have all their heads, *partial* ones do not.

    A namespace of a tenant is its own, whoever else has the same manifest. *entered* counts
    the sessions that are in it. *stamp* stands for it in 64 bits. *marks* says on a run of slots,
    the same on each, that they are ready in this namespace.
    """

    __slots__ = (
        "chunk_bytes",
        "entered",
        "head_bytes",
        "id",
        "manifest",
        "marks",
        "number",
        "partial",
        "ready",
        "stamp",
        "tenant",
    )

    def __init__(self, number: int, manifest: Manifest, tenant: str = "") -> None:
        self.number = number
        self.manifest = manifest
        self.chunk_bytes = manifest.chunk_bytes
        self.head_bytes = manifest.head_bytes
        self.tenant = tenant
        self.id: NamespaceId = manifest.namespace_id(tenant)
        self.stamp = int.from_bytes(self.id[:8], "little")
        self.marks = array("H", [number + 1]) * RUN_SLOTS
        self.entered = 0
        self.ready: dict[Digest, int] = {}
        self.partial: dict[Digest, int] = {}

    @property
    def is_unused(self) -> bool:
        """Whether nobody would miss it: no chunks, no sessions."""
        return not (self.ready or self.partial or self.entered)

    def find(self, digest: Digest) -> int:
        """Return the slot of *digest*, whole or partial, or `NO_SLOT`."""
        slot = self.ready.get(digest)
        return self.partial.get(digest, NO_SLOT) if slot is None else slot
