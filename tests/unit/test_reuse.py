"""Miss-ratio curves: sampling comes close to a full simulation, and stays small and cheap."""

from __future__ import annotations

from itertools import islice

from kvstore.limits import (
    DIGEST_SIZE_BYTES,
    MIB,
    REUSE_NOTED_MAX,
    REUSE_PENDING_MAX,
    REUSE_SAMPLES_MAX,
    REUSE_SAMPLES_MIN,
)
from kvstore.protocol import messages as m
from kvstore.protocol.framing import first_bytes
from kvstore.store.reuse import Reuse, Stack, points
from kvstore.types import Digest
from tests.bench.reuse import compare
from tests.bench.traces import trace
from tests.support.making import loose_digest

POINTS = 0.03


def test_sampling_comes_within_three_points_of_a_full_simulation():
    found = compare(islice(trace(("chat", "programs"), 6000, seed=5), 6000), chunks=4000)
    assert found.sampled_references < found.asked_chunks / 8
    assert found.worst < POINTS
    rates = [sampled for _, sampled, _ in found.curve]
    assert rates == sorted(rates)


def test_a_stack_without_sampling_is_exact():
    stack = Stack(64)
    stack.threshold = 1 << 24
    a, b, c = (loose_digest(number) for number in range(3))
    for digest in (a, b, c, a, a, b):
        stack.use([digest], 10, is_counted=True)
    stack.asked = 6
    # Distances: a behind b and c is 30 bytes, a again 10, b behind a and c 30.
    assert stack.hit_rate(9) == 0.0
    assert stack.hit_rate(11) == 1 / 6
    assert stack.hit_rate(32) == 3 / 6


def test_what_is_stored_counts_as_no_miss():
    stack = Stack(64)
    stack.threshold = 1 << 24
    stack.use([loose_digest(1)], 10, is_counted=False)
    stack.use([loose_digest(1)], 10, is_counted=True)
    stack.asked = 1
    assert stack.hit_rate(20) == 1.0


def test_samples_are_bounded_however_many_chunks_there_are():
    reuse = Reuse(tenants=2)
    reuse.is_on = True
    for number in range(0, 400_000, 64):
        digests = [loose_digest(number + at) for at in range(64)]
        reuse.looked_up(0, digests, MIB)
        if number % 6400 == 0:
            reuse.work()
    reuse.work()
    stack = reuse.stack(0)
    assert stack is not None
    assert REUSE_SAMPLES_MIN < len(stack) <= REUSE_SAMPLES_MAX
    assert stack.rate < 1 / 32
    assert stack.hit_rate(MIB << 40) < POINTS


def test_more_than_can_be_worked_on_lowers_the_rate():
    reuse = Reuse()
    reuse.is_on = True
    before = 1 / 16
    for number in range(0, 64 * REUSE_PENDING_MAX, 64):
        reuse.looked_up(0, [loose_digest(number + at) for at in range(64)], MIB)
        assert reuse._noted_chunks <= REUSE_NOTED_MAX
        if number == 640:
            reuse.work()
    reuse.work()
    stack = reuse.stack(0)
    assert stack is not None
    assert stack.rate < before


def test_times_that_run_out_are_dealt_out_anew_in_the_same_order():
    stack, order = Stack(8), list[Digest]()
    stack.threshold = 1 << 24
    for number in range(200):
        digest = loose_digest(number % 6)
        if digest in order:
            order.remove(digest)
        order.append(digest)
        stack.use([digest], number % 6 + 1, is_counted=True)
        behind = order[order.index(loose_digest(0)) + 1 :]
        expected = sum(next(n + 1 for n in range(6) if loose_digest(n) == one) for one in behind)
        assert stack._total_bytes - stack._sum(stack._used[loose_digest(0)][0]) == expected
    assert list(stack._used) == order


def test_a_tenant_has_a_curve_of_its_own_and_a_stranger_none():
    reuse = Reuse(tenants=2)
    sampled = next(d for n in range(10_000) if (d := loose_digest(n))[0] < 16)
    reuse.stored(1, sampled, MIB)  # nobody looks at curves yet
    reuse.is_on = True
    reuse.work()
    assert reuse.stack(1) is None
    reuse.stored(1, sampled, MIB)
    reuse.looked_up(1, [sampled], MIB)
    reuse.looked_up(1, [sampled], MIB)
    reuse.work(1)
    stack = reuse.stack(1)
    assert stack is not None
    assert (stack.references, stack.asked) == (0, 2)
    reuse.work()
    assert (stack.references, len(stack)) == (2, 1)
    assert reuse.stack(0) is None
    # One use stands for sixteen: beyond that all is as asked.
    assert points(stack, 64 * MIB, (0.5, 1.0), lambda size: size) == [
        (0.5, 32 * MIB, 1.0),
        (1.0, 64 * MIB, 1.0),
    ]
    assert stack.hit_rate(0) <= 1.0


def test_nothing_asked_is_no_hit():
    assert Stack(8).hit_rate(MIB) == 0.0


def test_when_little_is_sampled_the_second_byte_decides_as_well():
    reuse = Reuse()
    reuse.is_on = True
    stack = Stack(8)
    stack.threshold = 1 << 12
    reuse._stacks[0] = stack
    low, high = Digest(bytes([0, 1]) + bytes(30)), Digest(bytes([0, 200]) + bytes(30))
    far = Digest(bytes([9]) + bytes(31))
    reuse.looked_up(0, [far, low], MIB)
    reuse.work()
    for digests in ([far, high], [far], [far, low]):
        reuse.looked_up(0, digests, MIB)
    reuse._select()
    assert [uses.digests for uses in reuse._pending] == [[low]]


def test_the_first_bytes_of_digests_come_out_of_the_frame():
    for count in (1, 2, 15, 16, 256, 4096):
        digests = [loose_digest(number) for number in range(count)]
        body = m.encode(m.Lookup(1, 50, 0, digests, 0))
        assert first_bytes(body, digests) == bytes(digest[0] for digest in digests)
    # Somebody may write them otherwise: then there is nothing to be had so cheaply.
    odd = b"\xc4\x20" + digests[0] + b"\xc5\x00\x20" + digests[1]
    assert len(digests[0]) == DIGEST_SIZE_BYTES
    assert first_bytes(odd, digests[:2]) == b""
