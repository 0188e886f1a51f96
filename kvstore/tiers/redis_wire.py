"""One connection to one server: small commands in batches, and stripes without a copy.

redis-py connects, checks certificates and authenticates; then a *lane* owns the socket. A lane
is used by one thread at a time, blocks, and gives up at a deadline. Whatever ends a batch
before its last reply has come breaks the lane for good: no later batch can ever take a reply
that was meant for this one.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator, Sequence
from enum import Enum, auto
from typing import Final, NamedTuple, Protocol, cast

import hiredis
import numpy as np

from kvstore.hashing import Digests64, block_count
from kvstore.limits import CHECKSUM_BLOCK_BYTES, REDIS_REPLY_MAX_BYTES
from kvstore.tiers.redis_records import (
    LABEL_BYTES,
    Label,
    Stripe,
    Unreadable,
    read_label,
)
from kvstore.transfer import copies
from kvstore.transfer.bounded_socket import BoundedSocket
from kvstore.transfer.native import address_of

Command = tuple[bytes, ...]
"""The words of one command."""

_LINE_MAX_BYTES: Final = 4096
_RECEIVE_BYTES: Final = 64 * 1024


class LaneError(Exception):
    """The connection failed, or what came over it is no answer; the lane is broken."""


class LaneTimeoutError(LaneError):
    """No answer, or not all of it, in time."""


class ReplyError(Exception):
    """What a server answers in place of a result. It is a value, in the place of its reply."""

    @property
    def word(self) -> str:
        """The first word: OOM, MOVED, WRONGTYPE and so on."""
        return str(self).partition(" ")[0]


Reply = bytes | int | None | ReplyError | list["Reply"]


class Fetched(Enum):
    """What became of one stripe that was asked for."""

    HERE = auto()
    """Its bytes are in the target; only their checksum is left to check."""

    ABSENT = auto()
    FOREIGN = auto()
    """Under its name is something that no version of kvstore has put there."""

    NEWER = auto()
    OTHER = auto()
    """A stripe of the same key, but of a shard of another size."""

    DAMAGED = auto()
    """What came is not what was asked for: altered in the server, or on the way."""


class Target(NamedTuple):
    """Where one shard goes: its bytes, and the digests of its blocks once they are there."""

    view: memoryview
    digests: Digests64

    @classmethod
    def over(cls, view: memoryview, table: Digests64 | None = None) -> Target:
        """Return *view* as a target, with *table* for its digests or one of its own."""
        if table is None:
            table = np.zeros(block_count(len(view)), dtype=np.uint64)
        return cls(view, table)

    def digest(self, stripe: Stripe) -> None:
        """Take the digests of the bytes of *stripe*, while they still lie in a cache."""
        view = self.view[stripe.start : stripe.stop]
        found = copies.digest_blocks_at(address_of(view), len(view))
        first = stripe.start // CHECKSUM_BLOCK_BYTES
        self.digests[first : first + len(found)] = found


class Connection(Protocol):
    """What is used of redis-py's connections, and the socket that they have made."""

    bulk: socket.socket

    def connect(self) -> None:
        """Connect, authenticate and select the database."""

    def disconnect(self) -> None:
        """Close the socket."""


class Lane(BoundedSocket):
    """One connection. *timeout_seconds* bounds every wait in which no byte moves."""

    other_side = "the server"

    def __init__(self, connection: Connection, timeout_seconds: float) -> None:
        super().__init__(connection.bulk, timeout_seconds)
        self._connection = connection
        self._small = memoryview(bytearray(_LINE_MAX_BYTES))
        self._have = self._small[:0]

    def close(self) -> None:
        """Close the connection. Idempotent, and only for whoever has the lane."""
        self.is_broken = True
        self._connection.disconnect()

    def begin(self, ends_at: float) -> None:
        """Let the next calls end by *ends_at* on the monotonic clock."""
        self._ends_at = ends_at

    def _failure(self, reason: str, *, is_timeout: bool) -> LaneError:
        return LaneTimeoutError("no answer in time") if is_timeout else LaneError(reason)

    # --- small commands ------------------------------------------------------------------

    def call(self, commands: Sequence[Command]) -> list[Reply]:
        """Send *commands* at once and return their replies; raises `LaneError`."""
        if not commands:
            return []
        with self._unbroken():
            self._send([memoryview(pack(commands))])
            return self._replies(len(commands))

    def _replies(self, count: int) -> list[Reply]:
        reader = hiredis.Reader(protocolError=LaneError, replyError=ReplyError)
        replies: list[Reply] = []
        room = memoryview(bytearray(_RECEIVE_BYTES))
        received = 0
        while len(replies) < count:
            size = self._receive_some(room)
            received += size
            if received > REDIS_REPLY_MAX_BYTES:
                raise LaneError(f"a reply of more than {REDIS_REPLY_MAX_BYTES} bytes")
            reader.feed(bytes(room[:size]))
            while len(replies) < count and (reply := reader.gets()) is not False:
                replies.append(cast(Reply, reply))
        if reader.has_data():
            raise LaneError("more replies than commands")
        return replies

    # --- stripes -------------------------------------------------------------------------

    def store(
        self,
        stripes: Sequence[Stripe],
        source: memoryview,
        *,
        ttl_ms: int,
        window: int,
        asking: bool = False,
    ) -> list[ReplyError | None]:
        """Set *stripes* from *source*, the bytes of their shard; return what each met, if anything.

        At most *window* bytes, or one stripe, are unanswered at a time. After a refusal that is
        no redirection to another server for that key, the rest is not sent and counts as
        refused alike.
        """
        outcomes: list[ReplyError | None] = []
        with self._unbroken():
            sent = 0
            while len(outcomes) < len(stripes):
                if _is_room(stripes[len(outcomes) : sent + 1], sent, len(stripes), window):
                    self._send_set(stripes[sent], source, ttl_ms=ttl_ms, asking=asking)
                    sent += 1
                    continue
                outcomes.append(self._status(asking=asking))
                refused = outcomes[-1]
                if refused is not None and not is_ask(refused):
                    outcomes += [self._status(asking=asking) for _ in range(sent - len(outcomes))]
                    outcomes += [refused] * (len(stripes) - len(outcomes))
            self._expect_silence()
        return outcomes

    def _send_set(self, stripe: Stripe, source: memoryview, *, ttl_ms: int, asking: bool) -> None:
        # The value comes last: what follows one costs the server half as much again.
        command = (b"PSETEX", stripe.name, b"%d" % ttl_ms) if ttl_ms else (b"SET", stripe.name)
        head = b"*%d\r\n" % (len(command) + 1) + b"".join(map(_word, command))
        head += b"$%d\r\n%b" % (stripe.value_bytes, stripe.label)
        if asking:
            head = pack([(b"ASKING",)]) + head
        self._send([memoryview(head), source[stripe.start : stripe.stop], memoryview(b"\r\n")])

    def fetch(
        self,
        stripes: Sequence[Stripe],
        target: Target,
        *,
        window: int,
        asking: bool = False,
    ) -> list[Fetched | ReplyError]:
        """Get *stripes* into *target*, the room of their shard; return what became of each.

        At most *window* bytes, or one stripe, are on their way at a time. Stripes behind one
        that is not as it should be may be left out, and count as it does.
        """
        outcomes: list[Fetched | ReplyError] = []
        asked, wanted = 0, len(stripes)
        with self._unbroken():
            while len(outcomes) < wanted:
                asked = self._ask(stripes[:wanted], asked, len(outcomes), window, asking=asking)
                if asking:
                    self._status(asking=False)
                stripe = stripes[len(outcomes)]
                outcomes.append(self._stripe(stripe, target))
                if self.is_broken:
                    break
                if outcomes[-1] is Fetched.HERE:
                    # The server goes on while we digest. Not while bytes come: one on this host
                    # waits for us then, and has to be woken again and again.
                    asked = self._ask(stripes[:wanted], asked, len(outcomes), window, asking=asking)
                    target.digest(stripe)
                elif not is_ask(outcomes[-1]):
                    wanted = asked
            else:
                self._expect_silence()
        return outcomes + [outcomes[-1]] * (len(stripes) - len(outcomes))

    def _ask(
        self, stripes: Sequence[Stripe], asked: int, answered: int, window: int, *, asking: bool
    ) -> int:
        """Ask for as many more stripes as may be on their way; return how many have been asked."""
        commands = b""
        while _is_room(stripes[answered : asked + 1], asked, len(stripes), window):
            commands += _get(stripes[asked].name, asking=asking)
            asked += 1
        if commands:
            self._send([memoryview(commands)])
        return asked

    def _stripe(self, stripe: Stripe, target: Target) -> Fetched | ReplyError:
        line = self._line()
        if line.startswith(b"-"):
            refused = ReplyError(line[1:].decode(errors="replace"))
            return Fetched.FOREIGN if refused.word == "WRONGTYPE" else refused
        if line == b"$-1":
            return Fetched.ABSENT
        length = _length_of(line)
        if length < LABEL_BYTES:
            self.is_broken = True
            return Fetched.DAMAGED
        label = bytearray(LABEL_BYTES)
        self._fill(memoryview(label))
        if label != stripe.label or length != stripe.value_bytes:
            # What follows is not read: closing costs less than reading bytes for nobody.
            self.is_broken = True
            return _judge(bytes(label), stripe)
        self._fill(target.view[stripe.start : stripe.stop])
        ending = bytearray(2)
        self._fill(memoryview(ending))
        if ending != b"\r\n":
            raise LaneError("a reply does not end where it should")
        return Fetched.HERE

    def _status(self, *, asking: bool) -> ReplyError | None:
        """Read the reply to a command that answers OK, and to the ASKING before it."""
        if asking:
            self._status(asking=False)
        line = self._line()
        if line.startswith(b"-"):
            return ReplyError(line[1:].decode(errors="replace"))
        if not line.startswith(b"+"):
            raise LaneError(f"{line[:40]!r} in place of a status")
        return None

    # --- bytes ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _unbroken(self) -> Generator[None]:
        """Break the lane when the batch inside does not run to its end."""
        try:
            yield
        except BaseException:
            self.is_broken = True
            raise

    def _expect_silence(self) -> None:
        if self._have:
            raise LaneError("more replies than commands")

    def _line(self) -> bytes:
        """Return the next line without its end."""
        while (end := bytes(self._have).find(b"\r\n")) < 0:
            kept = len(self._have)
            if kept == len(self._small):
                raise LaneError(f"a line of more than {kept} bytes")
            self._small[:kept] = bytes(self._have)
            # No more than a line and a label: what follows goes where it belongs at once.
            room = self._small[kept : kept + LABEL_BYTES + 16]
            self._have = self._small[: kept + self._receive_some(room)]
        line = bytes(self._have[:end])
        self._have = self._have[end + 2 :]
        return line

    def _fill(self, view: memoryview) -> None:
        super()._fill(view[self._drain(view) :])

    def _drain(self, view: memoryview) -> int:
        """Move what came along with the last line to *view*; return how much that was."""
        size = min(len(self._have), len(view))
        view[:size] = self._have[:size]
        self._have = self._have[size:]
        return size


def is_ask(reply: object) -> bool:
    """Return whether *reply* sends this one key to another server: its slot is on the move."""
    return isinstance(reply, ReplyError) and reply.word == "ASK"


def pack(commands: Sequence[Command]) -> bytes:
    """Return *commands* as they go over the wire."""
    words: list[bytes] = []
    for command in commands:
        words.append(b"*%d\r\n" % len(command))
        words += map(_word, command)
    return b"".join(words)


def _word(word: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(word), word)


def _is_room(ahead: Sequence[Stripe], begun: int, wanted: int, window: int) -> bool:
    """Return whether the last of *ahead*, unanswered ones and the next, may be begun."""
    if begun >= wanted:
        return False
    return len(ahead) == 1 or sum(stripe.value_bytes for stripe in ahead) <= window


def _get(name: bytes, *, asking: bool) -> bytes:
    command = pack([(b"GET", name)])
    return pack([(b"ASKING",)]) + command if asking else command


def _length_of(line: bytes) -> int:
    if not line.startswith(b"$") or not line[1:].isdigit():
        raise LaneError(f"{line[:40]!r} in place of a value")
    return int(line[1:])


def _judge(found: bytes, stripe: Stripe) -> Fetched:
    """Say what a value is that is not the one asked for."""
    label = read_label(found)
    if label is Unreadable.NEWER:
        return Fetched.NEWER
    wanted = read_label(stripe.label)
    assert isinstance(wanted, Label)
    if not isinstance(label, Label):
        return Fetched.DAMAGED
    is_same = label.shard.key == wanted.shard.key and label.stripe == wanted.stripe
    if is_same and label.shard.size_bytes != wanted.shard.size_bytes:
        return Fetched.OTHER
    return Fetched.DAMAGED
