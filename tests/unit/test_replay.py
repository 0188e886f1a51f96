"""Traces are what they say, and the real store, replayed, keeps tenants and policies in order."""

from __future__ import annotations

from itertools import islice

import pytest

from kvstore.store.quota import Share
from tests.bench.replay import CHUNK_BYTES, Replay
from tests.bench.traces import CHUNK_TOKENS, CONTEXT_TOKENS_MAX, Request, digest_of, scan, trace

EVERYTHING = ("chat", "programs", "agents")


# --- traces -----------------------------------------------------------------------------


def test_equal_seeds_give_equal_traces_and_others_do_not():
    first, again, other = (list(trace(EVERYTHING, 50, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", EVERYTHING)
def test_requests_come_in_order_and_fit_the_context(kind):
    requests = list(trace((kind,), 400))
    times = [request.time_seconds for request in requests]
    assert times == sorted(times)
    longest = max(len(request.prompt) + len(request.answer) for request in requests)
    assert longest * CHUNK_TOKENS <= CONTEXT_TOKENS_MAX + 40 * CHUNK_TOKENS


def test_every_turn_continues_what_was_said_before():
    said: dict[int, list[bytes]] = {}
    continued = 0
    for request in trace(("chat",), 600):
        before = said.get(request.conversation, [])
        if request.turn > 0 and request.prompt[: len(before)] == before:
            continued += 1
        elif request.turn > 0:
            # Asked again, word for word.
            assert [*request.prompt, *request.answer] == before
        said[request.conversation] = [*request.prompt, *request.answer]
    assert continued > 50


@pytest.mark.parametrize(("kind", "low", "high"), [("chat", 0.4, 0.75), ("programs", 0.4, 0.7)])
def test_an_endless_cache_hits_about_as_often_as_published(kind, low, high):
    seen: set[bytes] = set()
    hits = asked = 0
    for request in trace((kind,), 6000, seed=1):
        here = [digest in seen for digest in request.prompt]
        hits += here.index(False) if False in here else len(here)
        asked += len(here)
        seen.update(request.prompt, request.answer)
    assert low < hits / asked < high


# --- replays ----------------------------------------------------------------------------


@pytest.fixture
def open_replay():
    opened: list[Replay] = []

    def open_one(**options) -> Replay:
        opened.append(Replay(**options))
        return opened[-1]

    yield open_one
    for replay in opened:
        replay.store.check()
        replay.close()


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
@pytest.mark.parametrize("admission", ["all", "second_touch", "tinylfu"])
def test_a_replay_counts_every_chunk_once_and_leaves_a_sound_store(
    open_replay, eviction, admission
):
    replay = open_replay(host_chunks=100, disk_chunks=400, eviction=eviction, admission=admission)
    requests = list(trace(("chat", "programs"), 60, seed=3))
    tally = replay.run(requests)
    assert tally.asked == sum(len(request.prompt) for request in requests)
    assert 0 < tally.host + tally.disk < tally.asked
    counters = replay.store.counters
    assert counters.lookup_chunks_ready == tally.host + tally.disk
    assert counters.lookup_chunks_ready + counters.lookup_chunks_miss == tally.asked
    disk = replay.store.slower.residents[4]
    assert disk.shares.used_bytes(0) <= 400 * CHUNK_BYTES


def test_what_fits_misses_only_once(open_replay):
    replay = open_replay(host_chunks=200)
    requests = list(scan(10, 10, gap_seconds=1.0))
    assert replay.run(requests).host == 0
    assert replay.run(requests).host == 100


@pytest.mark.parametrize("host_chunks", [400, 1000])
def test_s3fifo_hits_at_least_as_often_as_lru_on_mixed_traffic(open_replay, host_chunks):
    requests = list(trace(("chat", "programs"), 400, seed=1))
    lru, s3fifo = (
        open_replay(host_chunks=host_chunks, eviction=name).run(requests).rate
        for name in ("lru", "s3fifo")
    )
    assert s3fifo >= lru > 0


@pytest.mark.parametrize("admission", ["second_touch", "tinylfu"])
def test_a_selective_admission_writes_less(open_replay, admission):
    requests = list(trace(("programs",), 150, seed=1))
    written = {}
    for name in ("all", admission):
        replay = open_replay(host_chunks=100, disk_chunks=400, admission=name)
        replay.run(requests)
        written[name] = replay.disk.written_chunks
    assert written[admission] < written["all"] * 0.8


# --- tenants ----------------------------------------------------------------------------

HOST_CHUNKS = 120
FLOOR_CHUNKS = 60
ROUNDS = 30


def working_set(round_: int) -> list[Request]:
    """Return five prompts of ten chunks, the same every time."""
    return [
        Request(float(round_), number, 0, [digest_of(5, number, at) for at in range(10)], [])
        for number in range(5)
    ]


def play_with_hog(replay: Replay, *, is_watched: bool) -> tuple[float, float]:
    """Let a hog offer 20 times the capacity beside a modest tenant; return both hit rates."""
    hog = scan(10**9, 8, gap_seconds=0.1)
    per_round = 20 * HOST_CHUNKS // 8 // ROUNDS
    shares = replay.store.residents.shares
    for round_ in range(ROUNDS):
        for request in islice(hog, per_round):
            replay.play(request, 1)
            # What it asks for a second time is there: it has its share, too.
            replay.play(request, 1)
        replay.run(working_set(round_), 2)
        if is_watched:
            assert shares.used_bytes(2) == 50 * CHUNK_BYTES
            assert shares.used_bytes(0) + shares.used_bytes(1) <= 70 * CHUNK_BYTES
    assert replay.tallies[1].asked >= 2 * 20 * HOST_CHUNKS
    return replay.tallies[1].rate, replay.tallies[2].rate


def tenants(floor_chunks: int) -> list[Share]:
    return [
        Share("default"),
        Share("hog"),
        Share("modest", floor_bytes=floor_chunks * CHUNK_BYTES),
    ]


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
@pytest.mark.parametrize("disk_chunks", [0, 2 * HOST_CHUNKS])
def test_a_hog_that_offers_20_times_the_capacity_pushes_nobody_below_its_floor(
    open_replay, eviction, disk_chunks
):
    replay = open_replay(
        host_chunks=HOST_CHUNKS,
        disk_chunks=disk_chunks,
        eviction=eviction,
        tenants=tenants(FLOOR_CHUNKS),
    )
    hog, modest = play_with_hog(replay, is_watched=True)
    # All but the first round hits, and the hog's second requests do.
    assert modest == pytest.approx((ROUNDS - 1) / ROUNDS)
    assert hog == pytest.approx(0.5)
    assert replay.store.residents.chunks_of(2) == 50


def test_who_shares_an_account_with_a_hog_loses_what_it_had(open_replay):
    replay = open_replay(host_chunks=HOST_CHUNKS, eviction="lru")
    hog, tally = scan(10**9, 8, gap_seconds=0.1), replay.tallies[0]
    modest_hits = 0
    for round_ in range(5):
        replay.run(islice(hog, 15))
        before = tally.host
        replay.run(working_set(round_))
        modest_hits += tally.host - before
    assert modest_hits == 0


def test_a_hog_is_held_to_an_equal_share_where_nothing_is_reserved(open_replay):
    replay = open_replay(host_chunks=HOST_CHUNKS, eviction="lru", tenants=tenants(0))
    _, modest = play_with_hog(replay, is_watched=True)
    assert modest == pytest.approx((ROUNDS - 1) / ROUNDS)


def test_a_hog_with_a_quota_leaves_the_rest_to_others(open_replay):
    shares = [Share("default"), Share("hog", quota_bytes=40 * CHUNK_BYTES), Share("modest")]
    replay = open_replay(host_chunks=HOST_CHUNKS, eviction="lru", tenants=shares)
    _, modest = play_with_hog(replay, is_watched=False)
    assert modest == pytest.approx((ROUNDS - 1) / ROUNDS)
    assert replay.store.residents.shares.used_bytes(1) <= 40 * CHUNK_BYTES
