"""What engines tell of their GPUs: to which session, how often, and what the daemon makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvstore.cli.status import render
from kvstore.client import gpu_telling
from kvstore.client.gpu_telling import Telling
from kvstore.daemon.engines import EngineCounters
from kvstore.errors import UnavailableError
from kvstore.gpu.counters import DeviceCounters
from kvstore.limits import ENGINE_COUNT_MAX, ENGINE_COUNTERS_MAX, STATS_ENGINES_MAX
from kvstore.metrics import ENGINE_GPU_COUNTERS
from tests.unit.test_cli import make_stats


def test_every_counter_has_a_meaning_and_all_of_them_fit_one_message():
    assert list(DeviceCounters().values()) == list(ENGINE_GPU_COUNTERS)
    assert len(ENGINE_GPU_COUNTERS) <= ENGINE_COUNTERS_MAX


# --- the daemon -------------------------------------------------------------------------------


def test_counts_of_sessions_add_up_and_stay_when_these_have_ended():
    engines = EngineCounters()
    assert set(engines.totals().values()) == {0}
    engines.tell(1, {"chunks_loaded": 5, "chunks_stored": 2})
    engines.tell(2, {"chunks_loaded": 7})
    assert engines.totals()["chunks_loaded"] == 12
    engines.end(1)
    engines.end(3)
    engines.tell(2, {"chunks_loaded": 8})
    assert engines.totals()["chunks_loaded"] == 13
    assert engines.totals()["chunks_stored"] == 2
    (left,) = engines.latest({2: "vllm"})
    assert (left.session, left.client, left.counters) == (2, "vllm", {"chunks_loaded": 8})


def test_a_count_never_goes_back_and_names_that_are_not_known_say_nothing():
    engines = EngineCounters()
    engines.tell(1, {"chunks_loaded": 5, "stuck_transfers": 1})
    engines.tell(1, {"chunks_loaded": 3, "from the future": 9})
    engines.tell(2, {"from the future": 9})
    engines.tell(3, {})
    assert engines.totals()["chunks_loaded"] == 5
    assert engines.totals()["stuck_transfers"] == 1
    assert list(engines.totals()) == list(ENGINE_GPU_COUNTERS)
    assert [one.session for one in engines.latest({})] == [1]


def test_sums_fit_what_they_are_shown_in_whatever_is_made_up():
    engines = EngineCounters()
    for session in range(2000):
        engines.tell(session, {"chunks_loaded": ENGINE_COUNT_MAX})
    assert engines.totals()["chunks_loaded"] == 2**63 - 1
    shown = list(engines.latest({}))
    assert [one.session for one in shown] == [*range(1999, 1999 - STATS_ENGINES_MAX, -1)]


def test_status_shows_what_has_been_counted():
    shown = render(make_stats(engine_gpu={"chunks_loaded": 1234, "lost_devices": 0}))
    assert "gpu chunks_loaded" in shown
    assert "1,234" in shown
    assert "lost_devices" not in shown


# --- the engine -------------------------------------------------------------------------------


class Session:
    """A connection that takes down what it is sent; the space over it."""

    timeout_seconds = 1.0

    def __init__(self) -> None:
        self.told: list[dict[str, int]] = []
        self.is_broken = False
        self.connection = self

    def next_id(self) -> int:
        return 1

    def post(self, ping) -> None:
        if self.is_broken:
            raise UnavailableError("gone")
        self.told.append(ping.counters)


@pytest.fixture
def engine(monkeypatch):
    """A device cache's counters, its link to a daemon, and the timers that were made."""
    made = SimpleNamespace(counters=DeviceCounters(), link=Session(), timers=[])

    class Timer:
        def __init__(self, seconds, call) -> None:
            self.seconds, self.call, self.is_cancelled = seconds, call, False
            made.timers.append(self)

        def start(self) -> None:
            assert self.daemon

        def cancel(self) -> None:
            self.is_cancelled = True

    def ask(question, miss) -> None:
        if made.link is not None:
            try:
                question(made.link)
            except UnavailableError:
                made.link = None

    monkeypatch.setattr(gpu_telling.threading, "Timer", Timer)
    made.telling = Telling(made.counters, ask, seconds=3.0)
    return made


def test_what_is_counted_is_told_once_in_a_while_and_only_when_it_has_changed(engine):
    engine.counters.chunks_loaded = 4
    for _ in range(5):
        engine.telling.note()
    (timer,) = engine.timers
    assert (timer.seconds, engine.link.told) == (3.0, [])
    timer.call()
    engine.telling.note()
    engine.timers[1].call()
    assert engine.link.told == [{"chunks_loaded": 4}]
    engine.counters.chunks_loaded, engine.counters.chunks_stored = 6, 1
    engine.telling.note()
    engine.telling.close()
    engine.telling.close()
    assert engine.timers[2].is_cancelled
    assert engine.link.told[1:] == [{"chunks_loaded": 6, "chunks_stored": 1}]
    engine.telling.note()
    assert len(engine.timers) == 3


def test_the_next_session_is_told_what_none_before_it_was(engine):
    first, second = engine.link, Session()
    engine.counters.chunks_loaded = 4
    engine.telling.note()
    engine.timers[0].call()
    first.is_broken = True
    engine.counters.chunks_loaded = 5
    engine.telling.note()
    engine.timers[1].call()
    assert engine.link is None
    engine.counters.chunks_loaded = 7
    engine.telling.note()
    engine.timers[2].call()
    engine.link = second
    engine.telling.note()
    engine.timers[3].call()
    engine.counters.chunks_loaded = 8
    engine.telling.close()
    assert first.told == [{"chunks_loaded": 4}]
    assert second.told == [{"chunks_loaded": 3}, {"chunks_loaded": 4}]
