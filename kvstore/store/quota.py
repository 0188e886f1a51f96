"""Whose chunk makes room: byte quotas and reserved floors of the tenants of one tier.

A namespace belongs to one tenant, so that no prefix has chunks of two. Tenants are numbers,
the positions of their shares; all bytes are those that chunks take up on the tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from kvstore.errors import ConfigError
from kvstore.limits import TENANTS_MAX
from kvstore.types import NO_SLOT
from kvstore.units import format_size

DEFAULT_TENANT: Final = 0
"""Who is no tenant by name is this one: the first share."""


class Share(NamedTuple):
    """What a tenant may take of a tier, and what others may not take from it.

    Without a quota a tenant may fill the tier; a floor of 0 reserves nothing.
    """

    tenant: str
    quota_bytes: int | None = None
    floor_bytes: int = 0


class Shares:
    """The accounts of all tenants on one tier, and the order in which they give.

    A tenant over its quota gives its own chunks. Otherwise whoever is furthest above its floor
    gives, and nobody is pushed below its floor by another: as floors fit the tier together,
    a tenant below its own always finds somebody above theirs, to within the size of a chunk.
    What is reserved and unused is lent to anybody; what is held (leased, pinned) stays.
    """

    def __init__(self, tier: str, capacity_bytes: int, shares: Sequence[Share]) -> None:
        """Open the accounts, the first that of the default tenant.

        Raises `ConfigError` naming *tier* when floors or quotas cannot be kept.
        """
        assert shares, "there is a default tenant"
        _check(tier, capacity_bytes, shares)
        self._tier = tier
        self.capacity_bytes = capacity_bytes
        self.shares = tuple(shares)
        self._used = [0] * len(shares)
        self._floor, self._quota = self._limits()

    def __len__(self) -> int:
        """Return the number of tenants."""
        return len(self._used)

    # --- the accounts -------------------------------------------------------------------

    def charge(self, tenant: int, size_bytes: int) -> None:
        """Count *size_bytes* that *tenant* takes up from now on, reserved or filled."""
        self._used[tenant] += size_bytes

    def refund(self, tenant: int, size_bytes: int) -> None:
        """Count *size_bytes* that *tenant* no longer takes up."""
        assert self._used[tenant] >= size_bytes, f"tenant {tenant} gives back what it took"
        self._used[tenant] -= size_bytes

    def used_bytes(self, tenant: int) -> int:
        """Return the bytes that *tenant* takes up."""
        return self._used[tenant]

    @property
    def sum_bytes(self) -> int:
        """The bytes that all tenants together take up."""
        return sum(self._used)

    def quota_bytes(self, tenant: int) -> int:
        """Return the most that *tenant* may take up: its quota, or the whole tier."""
        return self._quota[tenant]

    def floor_bytes(self, tenant: int) -> int:
        """Return what others may not take from *tenant*."""
        return self._floor[tenant]

    def spare_bytes(self, tenant: int) -> int:
        """Return how far *tenant* is above its floor; 0 below it."""
        return max(0, self._used[tenant] - self._floor[tenant])

    def change(
        self, tenant: int, *, quota_bytes: int | None = None, floor_bytes: int | None = None
    ) -> None:
        """Give *tenant* another quota (0: none) or floor; what is left out stays.

        Nothing is evicted by it: who is over a quota gives with its next chunk. Raises
        `ConfigError`, and changes nothing, when the floors or the quota cannot be kept.
        """
        share = self.shares[tenant]
        if quota_bytes is not None:
            share = share._replace(quota_bytes=quota_bytes or None)
        if floor_bytes is not None:
            share = share._replace(floor_bytes=floor_bytes)
        self.replace((*self.shares[:tenant], share, *self.shares[tenant + 1 :]))

    def judge(self, shares: Sequence[Share]) -> None:
        """Raise `ConfigError` when *shares* of the same tenants cannot be kept."""
        assert [one.tenant for one in shares] == [one.tenant for one in self.shares]
        _check(self._tier, self.capacity_bytes, shares)

    def replace(self, shares: Sequence[Share]) -> None:
        """Give all tenants other quotas and floors; see `change`."""
        self.judge(shares)
        self.shares = tuple(shares)
        self._floor, self._quota = self._limits()

    def _limits(self) -> tuple[list[int], list[int]]:
        floors = [share.floor_bytes for share in self.shares]
        given = [share.quota_bytes for share in self.shares]
        return floors, [self.capacity_bytes if quota is None else quota for quota in given]

    # --- the decision -------------------------------------------------------------------

    def fits(self, tenant: int, size_bytes: int) -> bool:
        """Return whether *tenant* could ever keep a chunk of *size_bytes*."""
        return size_bytes <= self._quota[tenant]

    def is_over(self, tenant: int, more_bytes: int) -> bool:
        """Return whether *more_bytes* would bring *tenant* above its quota."""
        return self._used[tenant] + more_bytes > self._quota[tenant]

    def givers(self, writer: int, need_bytes: int) -> list[int]:
        """Return who may be asked to give a chunk for *need_bytes* of *writer*, best first.

        The writer alone when it goes over its quota. Otherwise those furthest above their
        floors; the writer, who may go below its own, takes its turn among them.
        """
        used, floor = self._used, self._floor
        if len(used) == 1 or self.is_over(writer, need_bytes):
            return [writer] if used[writer] else []
        asked = [tenant for tenant in range(len(used)) if used[tenant] > floor[tenant]]
        if used[writer] and used[writer] <= floor[writer]:
            asked.append(writer)
        # Between equals the writer makes its own room.
        asked.sort(key=lambda tenant: (floor[tenant] - used[tenant], tenant != writer))
        return asked

    def may_take(self, writer: int, owner: int, size_bytes: int) -> bool:
        """Return whether *writer* may take a chunk of *size_bytes* from *owner*.

        From itself always; from another unless that would leave it below its floor.
        """
        return writer == owner or self._used[owner] - size_bytes >= self._floor[owner]

    def choose(
        self,
        writer: int,
        need_bytes: int,
        find: Callable[[int], int],
        size_of: Callable[[int], int],
    ) -> int:
        """Return the slot that leaves for *need_bytes* of *writer*, or `NO_SLOT` when none may.

        *find* names the next victim of one tenant (or `NO_SLOT`), *size_of* what it takes up.
        Each eviction asks again: every one changes who is furthest above its floor.
        """
        for owner in self.givers(writer, need_bytes):
            slot = find(owner)
            if slot != NO_SLOT and self.may_take(writer, owner, size_of(slot)):
                return slot
        return NO_SLOT

    # --- the law ------------------------------------------------------------------------

    def check(self, used: Iterable[int]) -> None:
        """Raise `AssertionError` unless the accounts are *used*, tenant by tenant."""
        assert self._used == list(used), "the accounts are what the tenants' chunks take up"


def _check(tier: str, capacity_bytes: int, shares: Sequence[Share]) -> None:
    if len(shares) > TENANTS_MAX:
        raise ConfigError(f"{len(shares)} tenants, at most {TENANTS_MAX} are allowed")
    capacity = format_size(capacity_bytes)
    for share in shares:
        quota, floor = share.quota_bytes, share.floor_bytes
        if quota is not None and quota <= 0:
            raise ConfigError(
                f"tenant {share.tenant!r}: a quota of {quota} bytes on the {tier} tier keeps "
                "nothing; leave it out for no quota"
            )
        if floor < 0:
            raise ConfigError(f"tenant {share.tenant!r}: its floor on the {tier} tier is negative")
        if quota is not None and floor > quota:
            raise ConfigError(
                f"tenant {share.tenant!r}: its floor of {format_size(floor)} on the {tier} tier "
                f"is above its quota of {format_size(quota)}"
            )
    floors = sum(share.floor_bytes for share in shares)
    if floors > capacity_bytes:
        named = ", ".join(
            f"{share.tenant} {format_size(share.floor_bytes)}"
            for share in shares
            if share.floor_bytes
        )
        raise ConfigError(
            f"the floors of all tenants on the {tier} tier are {format_size(floors)} ({named}), "
            f"its capacity is {capacity}: lower a floor or raise the capacity"
        )
