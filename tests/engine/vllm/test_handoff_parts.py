"""Both sides of a hand-off in the vLLM connector, each with the other side played by the test."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from kvstore.client.handoff import NOTHING_AWAITED, Awaited, Opened
from kvstore.connectors.vllm_handoff import Arrivals, HandoffGroup, SchedulerHandoffs, read_terms
from kvstore.connectors.vllm_metadata import HandedOver, LoadJob, Span
from kvstore.connectors.vllm_transfers import Transfers
from kvstore.limits import HANDOFF_NAME_MAX_CHARS
from kvstore.types import Digest, HandoffState
from tests.support.waiting import DEADLINE_SECONDS

PREFILL = read_terms({"do_remote_decode": True})


def digests(count: int) -> list[Digest]:
    return [Digest(bytes([number]) * 32) for number in range(1, count + 1)]


class Keys:
    def up_to(self, chunks: int) -> list[Digest]:
        return digests(chunks)


@dataclass
class Calls:
    """The hand-offs of a daemon that says what the test wants, and notes what it is told."""

    host: str | None = "here"
    publishes: bool = True
    told: queue.SimpleQueue[tuple[object, ...]] = field(default_factory=queue.SimpleQueue)
    asked: list[tuple[str, str, bool]] = field(default_factory=list)
    answers: queue.SimpleQueue[Awaited] = field(default_factory=queue.SimpleQueue)

    def open(self, name: str, *, consumers: int = 1, ttl_seconds: float = 0.0) -> Opened | None:
        self.told.put(("open", name))
        return None if self.host is None else Opened(self.host)

    def publish(self, name: str, first: int, digests: list[Digest]) -> bool:
        self.told.put(("publish", first, len(digests)))
        return self.publishes

    def close(self, name: str, payload: bytes = b"") -> bool:
        self.told.put(("close", name))
        return True

    def abort(self, name: str) -> None:
        self.told.put(("abort", name))

    def wait(
        self, name: str, first: int, *, timeout_seconds: float, peer: str = "", early: bool = False
    ) -> Awaited:
        self.told.put(("wait", first))
        self.asked.append((name, peer, early))
        try:
            return self.answers.get(timeout=timeout_seconds)
        except queue.Empty:
            return Awaited(HandoffState.OPEN, [], is_last=False, published=0)

    def leave(self, name: str, *, peer: str = "") -> None:
        self.told.put(("leave", name, peer))

    def next(self) -> tuple[object, ...]:
        return self.told.get(timeout=DEADLINE_SECONDS)


# --- the scheduler's side -------------------------------------------------------------------


@pytest.fixture
def calls() -> Calls:
    return Calls()


def test_a_hand_off_is_closed_when_its_last_store_has_ended(calls):
    side = SchedulerHandoffs([HandoffGroup([calls])], engine_id="e")
    assert side.begin("r", PREFILL, 5)
    assert not side.begin("r", PREFILL, 5), "once"
    side.publish("r", Keys(), 2)
    side.storing("r", 7)
    side.publish("r", Keys(), 2)
    side.publish("r", Keys(), 5)
    side.storing("r", 8)
    side.stored([7])
    params = side.finish("r", 90, is_aborted=False)
    assert params is not None
    assert params["remote_host"] == "here"
    assert (params["remote_num_tokens"], params["remote_engine_id"]) == (90, "e")
    name = params["transfer_id"]
    assert name.startswith("r-")
    assert [calls.next() for _ in range(3)] == [
        ("open", name),
        ("publish", 0, 2),
        ("publish", 2, 3),
    ]
    assert calls.told.empty()
    side.stored([8, 99])
    assert calls.next() == ("close", name)
    side.close()


def test_a_request_that_is_aborted_gives_its_hand_off_up(calls):
    side = SchedulerHandoffs([HandoffGroup([calls])])
    side.begin("r", read_terms({"do_remote_decode": True, "transfer_id": "chosen"}), 5)
    assert side.finish("r", 90, is_aborted=True) is None
    assert [calls.next() for _ in range(2)] == [("open", "chosen"), ("abort", "chosen")]
    side.begin("other", PREFILL, 5)
    side.close()
    assert [calls.next()[0] for _ in range(2)] == ["open", "abort"]
    side.close()


def test_without_a_hand_off_there_is_nothing_to_carry():
    away = Calls(host=None)
    side = SchedulerHandoffs([HandoffGroup([away])])
    side.begin("r", PREFILL, 5)
    side.publish("r", Keys(), 2)
    assert side.finish("r", 90, is_aborted=False) is None
    assert side.finish("unknown", 90, is_aborted=False) is None
    side.close()
    assert away.next()[0] == "open"
    assert away.told.empty(), "neither published nor aborted"
    nobody = SchedulerHandoffs([])
    assert not nobody.begin("r", PREFILL, 5)
    assert nobody.promised(read_terms({"do_remote_prefill": True, "transfer_id": "x"})) is None
    nobody.close()


def test_what_breaks_is_published_no_more(calls):
    calls.publishes = False
    side = SchedulerHandoffs([HandoffGroup([calls])])
    side.begin("r" * 500, PREFILL, 5)
    for chunks in (1, 2, 3):
        side.publish("r" * 500, Keys(), chunks)
    side.close()
    _, name = calls.next()
    assert len(name) <= HANDOFF_NAME_MAX_CHARS
    assert [calls.next() for _ in range(2)] == [("publish", 0, 1), ("abort", name)]


def test_of_a_window_only_what_the_end_needs_is_published_and_counted_from_there(calls):
    sliding = Calls()
    side = SchedulerHandoffs([HandoffGroup([calls]), HandoffGroup([sliding], window=2)])
    side.begin("r", PREFILL, 5)
    for chunks in (2, 4, 5):
        side.publish("r", Keys(), chunks)
    side.close()
    told = [[each.next() for _ in range(each.told.qsize())][1:-1] for each in (calls, sliding)]
    assert told[0] == [("publish", 0, 2), ("publish", 2, 2), ("publish", 4, 1)]
    assert told[1] == [("publish", 0, 1), ("publish", 1, 1)]


def test_a_decode_engine_asks_the_daemon_that_it_is_told_of_and_leaves_it(calls):
    side = SchedulerHandoffs([HandoffGroup([calls])], seconds=9.0)
    carried = {"do_remote_prefill": True, "transfer_id": "x", "remote_host": "host-a"}
    source = side.promised(read_terms(carried | {"remote_num_tokens": 70}))
    assert source == HandedOver("x", "host-a", 70, early=False, seconds=9.0)
    side.leave(source)
    side.leave(None)
    side.close()
    assert calls.next() == ("leave", "x", "host-a")
    assert calls.told.empty()


@pytest.mark.parametrize(
    "params",
    [
        {"transfer_id": "x" * 129},
        {"transfer_id": 5},
        {"remote_num_tokens": -1},
        {"remote_host": "h" * 256},
        {"do_remote_decode": "yes"},
        ["a list"],
    ],
)
def test_terms_that_make_no_sense_are_none(params):
    assert read_terms(params) == read_terms(None)


def test_what_other_connectors_carry_does_not_matter():
    terms = read_terms({"do_remote_prefill": True, "remote_block_ids": [[1]], "tp_size": 2})
    assert terms.do_remote_prefill


# --- the worker's side ----------------------------------------------------------------------


class Worker:
    """Loads what it is told, of which the first *good* chunks of each span come."""

    def __init__(self, calls: Calls, good: int = 99) -> None:
        self.reports: queue.SimpleQueue[tuple[str | int, ...]] = queue.SimpleQueue()
        self.loaded: list[tuple[list[Digest], list[int], Digest | None]] = []
        self.good = good
        self.transfers = Transfers()
        self.arrivals = Arrivals([calls], self.transfers, self.load, self.report)

    def load(self, span: Span, _: object) -> int:
        self.loaded.append((span.digests, span.blocks, span.parent))
        return min(self.good, len(span.digests))

    def report(self, job: LoadJob, done: Sequence[int], _: float) -> None:
        self.reports.put((job.request_id, *done))

    def begin(
        self, name: str, chunks: int, *, first: int = 0, seconds: float = 60.0, early: bool = True
    ) -> None:
        source = HandedOver(name, "host-a", None, early=early, seconds=seconds, firsts=(first,))
        ours = digests(first + chunks)[first:]
        span = Span(0, ours, list(range(2 * chunks)), digests(first)[-1] if first else None)
        self.arrivals.begin(LoadJob(name, (span,), source=source), source, [])

    def ended(self) -> tuple[str | int, ...]:
        return self.reports.get(timeout=DEADLINE_SECONDS)

    def close(self) -> None:
        self.arrivals.close()
        self.transfers.close()
        assert self.reports.empty(), "every load is reported once"
        assert len(self.arrivals) == 0


def ready(first: int, stop: int, *, is_last: bool = False) -> Awaited:
    return Awaited(HandoffState.OPEN, digests(stop)[first:], is_last, stop)


def unknown() -> Awaited:
    """Return what the daemon says, in the end, of a hand-off that nobody has opened."""
    return Awaited(HandoffState.ABSENT, [], is_last=True, published=0)


def test_chunks_are_loaded_as_they_come_and_in_order(calls):
    worker = Worker(calls)
    worker.begin("r", 5, first=2)
    for answer in (ready(2, 4), ready(4, 5), ready(5, 7)):
        calls.answers.put(answer)
    assert worker.ended() == ("r", 5)
    assert [calls.next() for _ in range(3)] == [("wait", 2), ("wait", 4), ("wait", 5)]
    assert set(calls.asked) == {("r", "host-a", True)}
    chain = digests(7)
    assert worker.loaded == [
        (chain[2:4], [0, 1, 2, 3], chain[1]),
        (chain[4:5], [4, 5], chain[3]),
        (chain[5:7], [6, 7, 8, 9], chain[4]),
    ]
    worker.close()


@pytest.mark.parametrize(
    ("answer", "good", "done"),
    [
        (NOTHING_AWAITED, 2, 2),
        (Awaited(HandoffState.OPEN, [Digest(b"x" * 32)], is_last=False, published=1), 0, 0),
        (ready(0, 3), 1, 1),
    ],
)
def test_what_does_not_come_is_looked_for_once_and_then_computed(answer, good, done, calls):
    worker = Worker(calls, good)
    worker.begin("r", 3)
    calls.answers.put(answer)
    assert worker.ended() == ("r", done)
    assert len(worker.loaded) == 1
    worker.close()


@pytest.mark.parametrize("good", [99, 1])
def test_groups_come_one_behind_the_other(good, calls):
    worker, sliding = Worker(calls, good), Calls()
    worker.arrivals._calls = [calls, sliding]
    chain = digests(5)
    spans = Span(0, chain[2:], [1, 2, 3], chain[1]), Span(1, chain[3:], [7, 8], chain[2])
    source = HandedOver("r", "", None, early=True, seconds=60.0, firsts=(2, 0))
    worker.arrivals.begin(LoadJob("r", spans, source=source), source, [])
    for each, answer in ((calls, ready(2, 3)), (calls, ready(3, 5)), (sliding, ready(3, 5))):
        each.answers.put(answer)
    if good == 1:
        # What has come of the first group is of no use without the second.
        assert worker.ended() == ("r", 2, 0)
        assert sliding.told.empty()
    else:
        assert worker.ended() == ("r", 3, 2)
        assert sliding.next() == ("wait", 0)
        assert worker.loaded[-1] == (chain[3:], [7, 8], chain[2])
    worker.close()


@pytest.mark.parametrize("early", [True, False])
def test_a_hand_off_that_may_come_late_is_asked_for_again(early, calls):
    worker = Worker(calls, good=3 if early else 0)
    worker.begin("r", 3, early=early)
    for answer in (unknown(), unknown(), ready(0, 3, is_last=True)):
        calls.answers.put(answer)
    assert worker.ended() == ("r", 3 if early else 0)
    assert calls.told.qsize() == (3 if early else 1)
    worker.close()


def test_a_hand_off_that_is_forgotten_half_way_ends(calls):
    worker = Worker(calls, good=1)
    worker.begin("r", 3)
    calls.answers.put(ready(0, 1))
    calls.answers.put(unknown())
    assert worker.ended() == ("r", 2)  # and one of the rest was there anyway
    worker.close()


def test_a_hand_off_that_falls_silent_ends(calls):
    worker = Worker(calls, good=0)
    worker.begin("r", 3, seconds=0.05)
    assert worker.ended() == ("r", 0)
    worker.close()


def test_who_has_left_is_waited_for_no_longer(calls):
    worker = Worker(calls)
    worker.begin("r", 3)
    worker.arrivals.give_up(["r", "unknown"])
    assert worker.ended() == ("r", 0)
    assert worker.loaded == []
    worker.close()


def test_more_hand_offs_than_threads_take_turns(calls):
    worker = Worker(calls)
    wanted = threading.Event()
    served = Calls()

    def wait(name: str, first: int, *, timeout_seconds: float, **_: object) -> Awaited:
        # Only the last one has anything, and only when all of the others wait.
        if name == "19" and wanted.is_set():
            return ready(0, 1)
        return Awaited(HandoffState.OPEN, [], is_last=False, published=0)

    served.wait = wait
    worker.arrivals._calls = [served]
    for number in range(20):
        worker.begin(str(number), 1)
    wanted.set()
    assert worker.ended() == ("19", 1)
    worker.arrivals.give_up(map(str, range(20)))
    assert {worker.ended()[0] for _ in range(19)} == {str(number) for number in range(19)}
    worker.close()


def test_an_error_ends_one_load_and_no_other(calls):
    worker = Worker(calls)
    broken = Calls()
    broken.wait = None
    worker.arrivals._calls = [broken]
    worker.begin("r", 3)
    assert worker.ended() == ("r", 0)
    worker.arrivals._calls = [calls]
    worker.begin("s", 1)
    calls.answers.put(ready(0, 1))
    assert worker.ended() == ("s", 1)
    worker.close()
