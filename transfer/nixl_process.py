"""The process that has the NIXL agent of a daemon, and what the two say to each other.

`python -m kvstore.transfer.nixl_process ORDERS ARENA NAME`, with the descriptors of a socket and
of the arena. It is apart from the daemon because the library takes signals, copies without
letting the interpreter go on, and reads what peers have sent: whatever it does, the daemon goes
on. And because a process that has ended is the one proof that nothing is written any more by a
read that has failed: after such a read it ends, and the daemon starts another.

It listens to nobody but its daemon, and ends with it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

import msgspec
import numpy as np

from kvstore.limits import NIXL_IDLE_SECONDS, NIXL_MESSAGE_MAX_BYTES, NIXL_WATCH_SECONDS
from kvstore.transfer.arena import ArenaMapping
from kvstore.transfer.native import address_of

_LIBRARIES: Final = ("nixl._api", "nixl_cu13._api", "nixl_cu12._api")
_BACKEND: Final = "UCX"
_DONE: Final = "DONE"
_UNDER_WAY: Final = "PROC"


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Anything that daemon and process say to each other, one datagram each."""


class Meet(Message, tag=1, frozen=True, gc=False):
    """Take in the agent *name* of another host, which is described by *metadata*."""

    number: int
    name: str
    metadata: bytes


class Part(Message, tag=2, frozen=True, gc=False):
    """Forget the agent *name*. Not answered."""

    name: str


class Read(Message, tag=3, frozen=True, gc=False):
    """Bring bytes of the agent *name* here: (offset here, address there, size) for each run."""

    number: int
    name: str
    runs: list[tuple[int, int, int]]
    seconds: float


class Watch(Message, tag=4, frozen=True, gc=False):
    """Look closely, or not, at what other agents do here. Not answered."""

    is_close: bool


class Ready(Message, tag=5, frozen=True, gc=False):
    """The agent is there: how others learn of it, and where the arena lies in its memory."""

    metadata: bytes
    address: int


class Absent(Message, tag=6, frozen=True, gc=False):
    """There is no library, and there will be none: no process is of any use."""

    reason: str


class Done(Message, tag=7, frozen=True, gc=False):
    """What was ordered has been done."""

    number: int


class Refused(Message, tag=8, frozen=True, gc=False):
    """It has not been done, and not begun either."""

    number: int
    reason: str


class Ending(Message, tag=9, frozen=True, gc=False):
    """A read has failed; this process ends at once."""

    reason: str


AnyOrder = Meet | Part | Read | Watch
AnyAnswer = Ready | Absent | Done | Refused | Ending

_encode = msgspec.msgpack.Encoder().encode
_order = msgspec.msgpack.Decoder(AnyOrder)
_answer = msgspec.msgpack.Decoder(AnyAnswer)


def encode(message: Message) -> bytes:
    """Return the MessagePack form of *message*."""
    return _encode(message)


def decode_answer(body: bytes) -> AnyAnswer:
    """Return what the process has said."""
    answer: AnyAnswer = _answer.decode(body)
    return answer


class _Running(NamedTuple):
    """A read that is under way."""

    handle: Any
    ends_at: float


class _Agent:
    """The library's agent, over the whole of the arena."""

    def __init__(self, library: Any, arena: ArenaMapping, name: str) -> None:  # noqa: ANN401
        # It stays mapped for as long as this is kept.
        self._arena = arena
        self.address = address_of(arena.view)
        # Its own thread for progress would take a whole core, also when nothing is to be done.
        config = library.nixl_agent_config(enable_prog_thread=False, backends=[_BACKEND])
        self._agent = library.nixl_agent(name, config)
        if _BACKEND not in self._agent.backends:
            raise RuntimeError(f"this build of NIXL has no {_BACKEND}")
        whole = [(self.address, arena.size_bytes, 0, "")]
        self._agent.register_memory(whole, mem_type="DRAM")
        self.metadata: bytes = self._agent.get_agent_metadata()
        self._running: dict[int, _Running] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._running)

    def meet(self, name: str, metadata: bytes) -> None:
        known = self._agent.add_remote_agent(metadata)
        known = known.decode() if isinstance(known, bytes) else known
        if known != name:
            # Whatever it has replaced: only a new process knows nothing of it.
            raise SystemExit(f"an agent that is announced as {name!r} calls itself {known!r}")

    def part(self, name: str) -> None:
        self._agent.remove_remote_agent(name)

    def begin(self, read: Read) -> None:
        """Begin *read*; raises `ValueError` before anything is begun, `SystemExit` after that."""
        for offset, _, size_bytes in read.runs:
            if offset < 0 or size_bytes <= 0 or offset + size_bytes > self._arena.size_bytes:
                raise ValueError(f"{size_bytes} bytes at {offset} are not in the arena")
        try:
            here = self._list([(self.address + to, size) for to, _, size in read.runs])
            there = self._list([(address, size) for _, address, size in read.runs])
            handle = self._agent.initialize_xfer("READ", here, there, read.name)
        except Exception as error:
            raise ValueError(_reason(error)) from error
        try:
            self._agent.transfer(handle)
        except Exception as error:
            raise SystemExit(_reason(error)) from error
        self._running[read.number] = _Running(handle, time.monotonic() + read.seconds)

    def _list(self, runs: Sequence[tuple[int, int]]) -> Any:  # noqa: ANN401  # the library's
        rows = np.array([(address, size, 0) for address, size in runs], dtype=np.uint64)
        return self._agent.get_xfer_descs(rows, "DRAM")

    def advance(self) -> list[int]:
        """Let the library work; return what is done. Raises `SystemExit` when a read fails."""
        # Nobody is told anything this way, but it is how what peers do here goes on.
        self._agent.get_new_notifs()
        done = []
        for number, running in list(self._running.items()):
            try:
                state = self._agent.check_xfer_state(running.handle)
            except Exception as error:
                raise SystemExit(_reason(error)) from error
            if state == _DONE:
                self._agent.release_xfer_handle(running.handle)
                del self._running[number]
                done.append(number)
            elif state != _UNDER_WAY:
                raise SystemExit(f"a read is in state {state}")
            elif time.monotonic() > running.ends_at:
                raise SystemExit("a read was not done in time")
        return done


class _Process:
    """Orders in, answers out, until the daemon is gone."""

    def __init__(self, orders: socket.socket, agent: _Agent) -> None:
        self._orders = orders
        self._agent = agent
        self._is_watching = False

    def run(self) -> None:
        self._say(Ready(self._agent.metadata, self._agent.address))
        while True:
            readable, _, _ = select.select([self._orders], [], [], self._pause_seconds())
            if readable:
                body = self._orders.recv(NIXL_MESSAGE_MAX_BYTES)
                if not body:
                    return
                self._take(_order.decode(body))
            for number in self._agent.advance():
                self._say(Done(number))

    def _pause_seconds(self) -> float:
        if self._agent.is_busy:
            return 0.0
        return NIXL_WATCH_SECONDS if self._is_watching else NIXL_IDLE_SECONDS

    def _take(self, order: AnyOrder) -> None:
        match order:
            case Meet():
                try:
                    self._agent.meet(order.name, order.metadata)
                except Exception as error:  # noqa: BLE001  # the library's, of no common kind
                    self._say(Refused(order.number, _reason(error)))
                else:
                    self._say(Done(order.number))
            case Part():
                with contextlib.suppress(Exception):  # it knows no such agent: as well
                    self._agent.part(order.name)
            case Read():
                try:
                    self._agent.begin(order)
                except ValueError as error:
                    self._say(Refused(order.number, str(error)))
            case Watch():
                self._is_watching = order.is_close

    def _say(self, message: Message) -> None:
        self._orders.sendall(encode(message))


def _library() -> Any:  # noqa: ANN401  # the seam to NIXL, which types loosely
    """Return the Python interface of whichever build of NIXL is there; raises `ImportError`."""
    reason = "NIXL is not installed"
    for name in _LIBRARIES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            if error.name != name.partition(".")[0]:
                reason = f"NIXL cannot be imported: {error}"
    raise ImportError(reason)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:512]


def _serve(orders: socket.socket, arena_fd: int, name: str) -> None:
    try:
        library = _library()
    except ImportError as error:
        orders.sendall(encode(Absent(str(error))))
        return
    try:
        agent = _Agent(library, ArenaMapping.open(arena_fd), name)
        _Process(orders, agent).run()
    except SystemExit as error:
        orders.sendall(encode(Ending(str(error))))
    except Exception as error:  # noqa: BLE001  # the library's, of no common kind
        orders.sendall(encode(Ending(_reason(error))))


def main(words: Sequence[str]) -> NoReturn:
    """Do what the daemon says until it is gone."""
    # What stops a daemon is often sent to all of its processes; this one ends after it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    orders, arena_fd, name = words
    with contextlib.suppress(ConnectionError):
        _serve(socket.socket(fileno=int(orders)), int(arena_fd), name)
    # Not by way of the library's destructors, which may wait for peers.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
