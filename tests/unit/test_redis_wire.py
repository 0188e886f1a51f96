"""A lane believes nothing: each reply is held against its request, or the connection ends."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kvstore.hashing import root_of
from kvstore.limits import REDIS_REPLY_MAX_BYTES
from kvstore.tiers.redis_records import Names
from kvstore.tiers.redis_servers import first_answer, target_of
from kvstore.tiers.redis_url import Address
from kvstore.tiers.redis_wire import (
    Fetched,
    Lane,
    LaneError,
    LaneTimeoutError,
    ReplyError,
    Target,
    pack,
)
from tests.support.making import make_root
from tests.support.redis_shards import LARGE_BYTES, payload_of, shard_of

WINDOW = 1 << 30
STRIPES = Names("p").stripes(shard_of(1))
VALUE = STRIPES[0].label + payload_of(1)


class Pair:
    """A lane and the server's end of its connection."""

    def __init__(self) -> None:
        self.bulk, self.server = socket.socketpair()
        self.lane = Lane(self, 5.0)
        self.lane.begin(time.monotonic() + 5.0)

    def connect(self) -> None:
        """Nothing to do: it is connected."""

    def disconnect(self) -> None:
        self.bulk.close()

    def answer(self, reply: bytes) -> None:
        """Send *reply* as the socket takes it, from a thread."""
        threading.Thread(target=self.server.sendall, args=(reply,)).start()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.lane.close()
    made.server.close()


def fetch(pair: Pair, reply: bytes) -> Fetched | ReplyError:
    pair.answer(reply)
    pair.lane.begin(time.monotonic() + 5.0)
    target = bytearray(len(payload_of(1)))
    into = Target.over(memoryview(target))
    (outcome,) = pair.lane.fetch(STRIPES, into, window=WINDOW)
    assert outcome is not Fetched.HERE or target == payload_of(1)
    return outcome


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def test_a_stripe_arrives_where_it_belongs_with_its_digests(pair: Pair) -> None:
    stripes = Names("p").stripes(shard_of(1, LARGE_BYTES))
    payload = payload_of(1, LARGE_BYTES)
    pair.answer(b"".join(bulk(it.label + payload[it.start : it.stop]) for it in stripes))
    target = Target.over(memoryview(bytearray(LARGE_BYTES)))
    outcomes = pair.lane.fetch(stripes, target, window=WINDOW)
    assert outcomes == [Fetched.HERE] * 3
    assert target.view == payload
    assert pair.lane.is_quiet()
    asked = pair.server.recv(4096)
    assert asked == pack([(b"GET", it.name) for it in stripes])
    assert root_of(target.digests) == make_root(payload)


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (bulk(VALUE), Fetched.HERE),
        (b"$-1\r\n", Fetched.ABSENT),
        (b"-WRONGTYPE Operation against a key\r\n", Fetched.FOREIGN),
    ],
)
def test_a_whole_reply_leaves_the_lane_usable(pair: Pair, reply: bytes, outcome: Fetched) -> None:
    assert fetch(pair, reply) is outcome
    assert pair.lane.is_quiet()
    assert fetch(pair, bulk(VALUE)) is Fetched.HERE


def test_a_refusal_is_a_value(pair: Pair) -> None:
    refused = fetch(pair, b"-LOADING Redis is loading\r\n")
    assert isinstance(refused, ReplyError)
    assert refused.word == "LOADING"
    assert pair.lane.is_quiet()


@pytest.mark.parametrize(
    "value",
    [b"", b"x", VALUE[:-1], VALUE + b"x", b"y" * len(VALUE), STRIPES[0].label],
    ids=["empty", "short", "cut", "long", "foreign", "without bytes"],
)
def test_a_value_that_is_not_the_one_asked_for_ends_the_lane(pair: Pair, value: bytes) -> None:
    assert fetch(pair, bulk(value)) is Fetched.DAMAGED
    assert not pair.lane.is_quiet()


def test_a_value_of_another_key_ends_the_lane(pair: Pair) -> None:
    other = Names("p").stripes(shard_of(2))[0].label + payload_of(2)
    assert fetch(pair, bulk(other)) is Fetched.DAMAGED
    assert pair.lane.is_broken


NO_ANSWERS = {
    "integer": b":1\r\n",
    "status": b"+OK\r\n",
    "array": b"*1\r\n$1\r\nx\r\n",
    "no length": b"$x\r\n",
    "negative": b"$-2\r\n",
    "empty": b"\r\n",
    "endless": b"x" * 5000,
    "no end": b"$%d\r\n%b##" % (len(VALUE), VALUE),
}


@pytest.mark.parametrize("reply", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_what_is_no_answer_to_a_get_ends_the_lane(pair: Pair, reply: bytes) -> None:
    with pytest.raises(LaneError):
        fetch(pair, reply)
    assert pair.lane.is_broken


def test_what_comes_after_the_answer_ends_the_lane(pair: Pair) -> None:
    assert fetch(pair, bulk(VALUE) + b"+OK\r\n") is Fetched.HERE
    assert not pair.lane.is_quiet()


@pytest.mark.parametrize("size", [0, 1, 5, 60, 200, 100_000])
def test_a_connection_that_ends_in_a_reply_ends_the_lane(pair: Pair, size: int) -> None:
    pair.server.sendall(bulk(VALUE)[:size])
    pair.server.close()
    with pytest.raises(LaneError):
        fetch_nothing_more(pair)
    assert pair.lane.is_broken


def fetch_nothing_more(pair: Pair) -> None:
    target = Target.over(memoryview(bytearray(len(payload_of(1)))))
    pair.lane.fetch(STRIPES, target, window=WINDOW)


def test_a_reply_that_stays_away_is_given_up_and_ends_the_lane(pair: Pair) -> None:
    pair.lane.begin(time.monotonic() + 0.05)
    pair.server.sendall(bulk(VALUE)[:1000])
    with pytest.raises(LaneTimeoutError):
        fetch_nothing_more(pair)
    assert not pair.lane.is_quiet()


def test_a_server_that_takes_nothing_is_given_up(pair: Pair) -> None:
    pair.lane.begin(time.monotonic() + 0.05)
    stripes = Names("p").stripes(shard_of(1, LARGE_BYTES))
    source = memoryview(payload_of(1, LARGE_BYTES))
    with pytest.raises(LaneTimeoutError):
        pair.lane.store(stripes, source, ttl_ms=0, window=WINDOW)
    assert pair.lane.is_broken


def test_a_lane_that_is_aborted_ends_its_thread(pair: Pair) -> None:
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(LaneError):
            fetch_nothing_more(pair)
        ended.set()

    threading.Thread(target=wait).start()
    assert pair.server.recv(1000)
    pair.lane.abort()
    assert ended.wait(20)


def test_something_unasked_makes_a_lane_unusable(pair: Pair) -> None:
    assert pair.lane.is_quiet()
    pair.server.sendall(b"+OK\r\n")
    assert not pair.lane.is_quiet()


def test_small_replies_come_in_the_order_of_their_commands(pair: Pair) -> None:
    pair.answer(b":1\r\n$-1\r\n$2\r\nab\r\n-ERR no\r\n*2\r\n$1\r\nx\r\n-OOM full\r\n")
    replies = pair.lane.call([(b"A",)] * 5)
    assert replies[:3] == [1, None, b"ab"]
    assert [str(it) for it in (replies[3], *replies[4])] == ["ERR no", "b'x'", "OOM full"]
    assert pair.lane.call([]) == []


@pytest.mark.parametrize("reply", [b"+OK\r\n+OK\r\n", b"+OK\r\n$5\r\nab", b"hello\r\n"])
def test_more_or_other_than_asked_ends_the_lane(pair: Pair, reply: bytes) -> None:
    pair.server.sendall(reply)
    with pytest.raises(LaneError):
        pair.lane.call([(b"PING",)])
    assert pair.lane.is_broken


def test_a_reply_without_an_end_is_cut_off(pair: Pair) -> None:
    pair.answer(b"$%d\r\n" % (REDIS_REPLY_MAX_BYTES * 2) + b"x" * (REDIS_REPLY_MAX_BYTES + 70_000))
    with pytest.raises(LaneError, match="more than"):
        pair.lane.call([(b"PING",)])
    pair.bulk.shutdown(socket.SHUT_RDWR)


def test_after_a_refusal_nothing_more_is_stored(pair: Pair) -> None:
    stripes = Names("p").stripes(shard_of(1, LARGE_BYTES))
    source = memoryview(payload_of(1, LARGE_BYTES))
    received = bytearray()

    def serve() -> None:
        while len(received) < stripes[0].value_bytes or not received.endswith(b"\r\n"):
            received.extend(pair.server.recv(1 << 20))
        pair.server.sendall(b"-OOM full\r\n")

    server = threading.Thread(target=serve)
    server.start()
    outcomes = pair.lane.store(stripes, source, ttl_ms=1000, window=1)
    server.join()
    assert [outcome.word for outcome in outcomes] == ["OOM"] * 3
    assert received.count(b"PSETEX") == 1
    assert pair.lane.is_quiet()


@pytest.mark.parametrize(
    ("reply", "target"),
    [
        ("MOVED 3999 127.0.0.1:6381", Address("127.0.0.1", 6381)),
        ("ASK 3999 ::1:6381", Address("::1", 6381)),
        ("MOVED 3999 :6381", Address("asked", 6381)),
    ],
)
def test_redirections_say_where_to(reply: str, target: Address) -> None:
    assert target_of(ReplyError(reply), Address("asked", 1)) == target


@pytest.mark.parametrize("reply", ["MOVED", "MOVED 1", "MOVED 1 host", "ASK 1 host:x"])
def test_other_redirections_are_errors(reply: str) -> None:
    with pytest.raises(LaneError, match="asked:1 answers"):
        target_of(ReplyError(reply), Address("asked", 1))


async def test_the_first_good_answer_wins_over_silence_and_errors() -> None:
    async def ask(address: Address) -> str:
        if address.port == 1:
            await asyncio.get_running_loop().create_future()
        if address.port == 2:
            raise LaneError("refused")
        return address.host

    seeds = [Address("silent", 1), Address("dead", 2), Address("good", 3)]
    assert await first_answer(seeds, ask) == "good"
    with pytest.raises(LaneError, match="refused; refused"):
        await first_answer([seeds[1]] * 2, ask)
