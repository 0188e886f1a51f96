"""Quotas and floors: who gives, who never has to, and what no configuration can promise."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kvstore.errors import ConfigError
from kvstore.limits import TENANTS_MAX
from kvstore.store.policy import Columns, make_policy
from kvstore.store.quota import DEFAULT_TENANT, Share, Shares
from kvstore.types import NO_SLOT

CAPACITY_BYTES = 1000


def make_shares(*shares: Share) -> Shares:
    return Shares("host", CAPACITY_BYTES, [Share("default"), *shares])


def test_a_tenant_without_quota_may_fill_the_tier():
    shares = make_shares()
    assert shares.quota_bytes(DEFAULT_TENANT) == CAPACITY_BYTES
    assert shares.fits(DEFAULT_TENANT, CAPACITY_BYTES)
    assert not shares.fits(DEFAULT_TENANT, CAPACITY_BYTES + 1)


def test_accounts_add_up():
    shares = make_shares(Share("a", floor_bytes=100))
    shares.charge(1, 150)
    shares.refund(1, 30)
    assert shares.used_bytes(1) == 120
    assert shares.spare_bytes(1) == 20
    assert shares.spare_bytes(0) == 0
    shares.check([0, 120])
    with pytest.raises(AssertionError, match="accounts"):
        shares.check([0, 121])


def test_nobody_gives_back_what_it_never_took():
    shares = make_shares()
    with pytest.raises(AssertionError, match="gives back"):
        shares.refund(0, 1)


def test_a_tenant_over_its_quota_gives_its_own_first_and_alone():
    shares = make_shares(Share("a", quota_bytes=200), Share("b"))
    shares.charge(1, 200)
    shares.charge(2, 800)
    assert shares.is_over(1, 1)
    assert shares.givers(1, 1) == [1]


def test_a_tenant_that_could_never_fit_its_quota_has_nothing_to_give():
    shares = make_shares(Share("a", quota_bytes=10))
    assert shares.givers(1, 11) == []


def test_who_is_furthest_above_its_floor_gives_first():
    shares = make_shares(Share("a", floor_bytes=300), Share("b", floor_bytes=100))
    shares.charge(0, 150)
    shares.charge(1, 400)
    shares.charge(2, 450)
    assert shares.givers(0, 10) == [2, 0, 1]


def test_between_equals_the_writer_makes_its_own_room():
    shares = make_shares(Share("a"), Share("b"))
    for tenant in range(3):
        shares.charge(tenant, 300)
    assert shares.givers(2, 200)[0] == 2


def test_nobody_is_pushed_below_its_floor_but_by_itself():
    shares = make_shares(Share("a", floor_bytes=300), Share("b", floor_bytes=600))
    shares.charge(1, 300)
    shares.charge(2, 605)
    assert shares.givers(1, 100) == [2, 1]
    assert not shares.may_take(1, 2, 10)
    assert shares.may_take(1, 2, 5)
    assert shares.may_take(1, 1, 300)


def test_a_tenant_below_its_floor_takes_what_was_lent():
    shares = make_shares(Share("a", floor_bytes=500))
    shares.charge(0, CAPACITY_BYTES)
    assert shares.givers(1, 100) == [0]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([Share("a", floor_bytes=600), Share("b", floor_bytes=500)], "the floors of all tenants"),
        ([Share("a", quota_bytes=0)], "'a': a quota of 0 bytes"),
        ([Share("a", quota_bytes=-1)], "'a': a quota of -1 bytes"),
        ([Share("a", floor_bytes=-1)], "'a': its floor on the host tier is negative"),
        ([Share("a", quota_bytes=5, floor_bytes=6)], "above its quota"),
        ([Share(str(n)) for n in range(TENANTS_MAX + 1)], f"at most {TENANTS_MAX}"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(shares, message):
    with pytest.raises(ConfigError, match=message):
        Shares("host", CAPACITY_BYTES, shares)


def test_too_high_floors_name_tenants_tier_and_capacity():
    with pytest.raises(ConfigError, match=r"disk tier are 2KiB \(a 2KiB\), its capacity is 1000B"):
        Shares("disk", CAPACITY_BYTES, [Share("default"), Share("a", floor_bytes=2048)])


# --- quotas with policies: a tier in miniature --------------------------------------------


class Tier:
    """Slots of any size in a tier whose only bound is its capacity."""

    def __init__(self, shares: Shares, eviction: str) -> None:
        self.shares = shares
        columns = Columns()
        self.policies = [make_policy(eviction, columns) for _ in range(len(shares))]
        self.size: dict[int, int] = {}
        self.owner: dict[int, int] = {}
        self._next = 0

    def used(self) -> list[int]:
        return [
            sum(self.size[slot] for slot, owner in self.owner.items() if owner == tenant)
            for tenant in range(len(self.shares))
        ]

    def put(self, tenant: int, size_bytes: int) -> bool:
        shares = self.shares
        capacity = shares.capacity_bytes
        while shares.is_over(tenant, size_bytes) or sum(self.used()) + size_bytes > capacity:
            slot = shares.choose(
                tenant,
                size_bytes,
                lambda owner: self.policies[owner].candidate(),
                self.size.__getitem__,
            )
            if slot == NO_SLOT:
                return False
            self.policies[self.owner[slot]].forget(slot, slot, evicted=True)
            shares.refund(self.owner.pop(slot), self.size.pop(slot))
        self.policies[tenant].admit(self._next, size_bytes, self._next)
        self.size[self._next], self.owner[self._next] = size_bytes, tenant
        shares.charge(tenant, size_bytes)
        self._next += 1
        return True


puts = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 120)), max_size=60)
floors = st.tuples(st.integers(0, 500), st.integers(0, 500))
quotas = st.one_of(st.none(), st.integers(500, 1200))


@given(puts, floors, quotas, st.sampled_from(["lru", "s3fifo"]))
def test_whatever_is_written_quotas_hold_and_nobody_is_pushed_below_its_floor(
    writes, reserved, quota, eviction
):
    shares = make_shares(
        Share("a", quota_bytes=quota, floor_bytes=reserved[0]), Share("b", floor_bytes=reserved[1])
    )
    tier = Tier(shares, eviction)
    floor = [0, *reserved]
    for tenant, size_bytes in writes:
        before = tier.used()
        kept = tier.put(tenant, size_bytes)
        after = tier.used()
        shares.check(after)
        assert sum(after) <= CAPACITY_BYTES
        assert all(after[n] <= shares.quota_bytes(n) for n in range(3))
        for other in {0, 1, 2} - {tenant}:
            assert after[other] >= min(before[other], floor[other])
        if before[tenant] + size_bytes <= floor[tenant] and not kept:
            # Others hold no chunk that they could spare as a whole.
            assert all(
                after[n] - tier.size[tier.policies[n].candidate()] < floor[n]
                for n in {0, 1, 2} - {tenant}
                if after[n]
            )


@given(puts, st.sampled_from(["lru", "s3fifo"]))
def test_a_floor_is_reached_whatever_others_have_written(writes, eviction):
    shares = make_shares(Share("a", floor_bytes=400))
    tier = Tier(shares, eviction)
    for _, size_bytes in writes:
        tier.put(DEFAULT_TENANT, size_bytes)
    assert all(tier.put(1, 10) for _ in range(40))
    assert shares.used_bytes(1) == 400
