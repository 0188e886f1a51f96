"""Bytes from another daemon's arena into this one's by NIXL, which a process of its own has.

What may be read, and from where, is for callers to know: this side only moves bytes. It fails
with `NixlError`, after which nothing is written any more to the memory that a read was given.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from kvstore.limits import (
    NIXL_GRACE_SECONDS,
    NIXL_LOG_LINE_MAX_BYTES,
    NIXL_MEET_SECONDS,
    NIXL_MESSAGE_MAX_BYTES,
    NIXL_PAUSE_SECONDS,
    NIXL_RESTART_SECONDS,
)
from kvstore.transfer.arena import Arena
from kvstore.transfer.nixl_process import (
    Absent,
    Done,
    Ending,
    Meet,
    Message,
    Part,
    Read,
    Ready,
    Refused,
    Watch,
    decode_answer,
    encode,
)
from kvstore.transfer.settling import settle

log = logging.getLogger(__name__)

# What UCX says of each way to another agent: "inter-node cfg#2 rma(rc_mlx5/mlx5_0:1)  am(...)".
_WAY: Final = re.compile(r"(?:intra|inter)-node cfg#\d+ (.*)")
_LANES: Final = re.compile(r"\b(?:rma\w*|am)\(([^)]*)\)")
_ENVIRONMENT: Final = {
    "UCX_LOG_LEVEL": "info",
    "UCX_HANDLE_ERRORS": "none",
    "UCX_ERROR_SIGNALS": "",
}


class NixlError(Exception):
    """NIXL cannot do it: not there, not any more, or refused by one of both sides."""


class Run(NamedTuple):
    """Bytes at *address* in the other agent's memory that belong at *offset* of our arena."""

    offset: int
    address: int
    size_bytes: int


class LocalAgent(NamedTuple):
    """What another daemon must know of our agent, to read from its arena at *address*."""

    name: str
    metadata: bytes
    address: int


class _End(NamedTuple):
    """Why a process has ended, whether it had an agent, and whether another would have none."""

    reason: str
    was_ready: bool = False
    is_final: bool = False


class Nixl:
    """The agent of this daemon. `run` keeps it alive; all else is for the same event loop."""

    def __init__(self, arena: Arena, host_name: str) -> None:
        self.agent: LocalAgent | None = None
        self.reason = "NIXL is starting"
        """Why there is no agent, while there is none."""
        self.lanes: list[str] = []
        """The transports of UCX that connections have been seen to use."""
        self._arena = arena
        self._host_name = host_name
        self._child: _Child | None = None
        self._turn = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._met: dict[str, str] = {}
        self._meetings: dict[str, asyncio.Lock] = {}
        self._watched = 0
        self._tail = b""

    async def run(self) -> None:
        """Have an agent until cancelled. Without the library, say so once and be idle."""
        pause_seconds = NIXL_RESTART_SECONDS
        while True:
            end = await self._live()
            self.reason = end.reason
            if end.is_final:
                log.warning("no NIXL", extra={"reason": self.reason})
                await asyncio.Event().wait()
            log.warning("NIXL has ended", extra={"reason": self.reason})
            if end.was_ready:
                pause_seconds = NIXL_RESTART_SECONDS
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, NIXL_PAUSE_SECONDS)

    def in_words(self) -> str:
        """Return what moves the bytes of hand-offs that come here."""
        if self.agent is None:
            return f"tcp ({self.reason})"
        return f"nixl (UCX over {', '.join(self.lanes)})" if self.lanes else "nixl (UCX)"

    async def meet(self, peer: str, name: str, metadata: bytes) -> None:
        """Let *peer* be read from, whose agent is *name*; raises `NixlError`.

        What is known already needs no *metadata*.
        """
        async with self._meetings.setdefault(peer, asyncio.Lock()):
            if self._met.get(peer) == name:
                return
            if not metadata:
                raise NixlError("its agent is not known here any more")
            others = {*self._met.values(), self.agent.name if self.agent is not None else ""}
            if name in others - {self._met.get(peer)}:
                raise NixlError(f"its agent {name!r} is known as another's")
            old = self._met.pop(peer, None)
            if old is not None:
                await self._send(Part(old))
            await self._order(lambda number: Meet(number, name, metadata), NIXL_MEET_SECONDS)
            self._met[peer] = name

    def known(self, peer: str) -> str:
        """Return the name of the agent of *peer* that was met last; empty for none."""
        return self._met.get(peer, "")

    async def read(self, peer: str, runs: Sequence[Run], seconds: float) -> None:
        """Bring *runs* here from *peer*, which has been met, within *seconds*.

        Raises `NixlError`. Must not be cancelled: nobody would know when memory is free again.
        """
        name = self._met.get(peer)
        if name is None:
            raise NixlError("its agent is not known here any more")
        plain = [(run.offset, run.address, run.size_bytes) for run in runs]
        try:
            await self._order(lambda number: Read(number, name, plain, seconds), seconds)
        except NixlError:
            # Whatever is known of it has not been good enough.
            self._met.pop(peer, None)
            raise

    async def watch(self) -> None:
        """Let other agents read here, until as many calls of `unwatch`."""
        self._watched += 1
        if self._watched == 1:
            await self._send_if_there(Watch(is_close=True))

    async def unwatch(self) -> None:
        """End what one call of `watch` has begun."""
        self._watched -= 1
        if self._watched == 0:
            await self._send_if_there(Watch(is_close=False))

    # --- the process --------------------------------------------------------------------

    async def _live(self) -> _End:
        """Have a process until it ends, and say why."""
        name = f"{self._host_name}-{secrets.token_hex(6)}"
        try:
            child = _start(self._arena.fd, name)
        except OSError as error:
            return _End(f"its process cannot be started: {error.strerror}")
        self._child = child
        loop = asyncio.get_running_loop()
        loop.add_reader(child.log_fd, self._hear, child.log_fd)
        end = _End("")
        try:
            end = await self._listen(child.orders, name)
        finally:
            was_ready = self.agent is not None
            self.agent, child.is_open = None, False
            loop.remove_reader(child.log_fd)
            await child.end()
            self._child = None
            self._met.clear()
            reason = end.reason or f"its process has ended with {child.process.returncode}"
            # Only now: nothing writes to the memory of reads any more.
            for number in list(self._waiting):
                self._settle(number, NixlError(reason))
        return end._replace(reason=reason, was_ready=was_ready)

    async def _listen(self, orders: socket.socket, name: str) -> _End:
        """Take what the process answers; return when it says no more."""
        loop, end = asyncio.get_running_loop(), _End("")
        try:
            while body := await loop.sock_recv(orders, NIXL_MESSAGE_MAX_BYTES):
                match decode_answer(body):
                    case Ready(metadata=metadata, address=address):
                        self.agent = LocalAgent(name, metadata, address)
                        log.info("NIXL is ready", extra={"agent": name})
                        if self._watched:
                            await self._send_if_there(Watch(is_close=True))
                    case Done(number=number):
                        self._settle(number, None)
                    case Refused(number=number, reason=reason):
                        self._settle(number, NixlError(reason))
                    case Ending(reason=reason):
                        end = _End(reason)
                    case Absent(reason=reason):
                        end = _End(reason, is_final=True)
        except OSError as error:
            # It has not waited for all that it was told.
            return end if end.reason else _End(f"it does not answer: {error.strerror}")
        except msgspec.DecodeError as error:
            return _End(f"it answers what is no answer: {error}")
        return end

    def _settle(self, number: int, error: NixlError | None) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is None or waiting.done():
            return
        if error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(error)

    async def _order(self, make: Callable[[int], Message], seconds: float) -> None:
        """Send an order and wait until it is done; raises `NixlError`.

        A process that says nothing for *seconds* and some more is killed.
        """
        if self._child is None:
            raise NixlError(self.reason)
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        waiting: asyncio.Future[None] = loop.create_future()
        self._waiting[number] = waiting
        backstop = loop.call_later(seconds + NIXL_GRACE_SECONDS, self._child.process.kill)
        try:
            # What cannot be sent may have been taken for all that: the end of the process tells.
            await self._send_if_there(make(number))
            await waiting
        finally:
            backstop.cancel()

    async def _send(self, message: Message) -> None:
        async with self._turn:
            if self._child is None or not self._child.is_open:
                raise NixlError(self.reason)
            try:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(self._child.orders, encode(message))
            except OSError as error:
                raise NixlError(f"its process does not listen: {error.strerror}") from error

    async def _send_if_there(self, message: Message) -> None:
        with contextlib.suppress(NixlError):
            await self._send(message)

    def _hear(self, fd: int) -> None:
        """Take in what the process has said to whoever reads its log."""
        with contextlib.suppress(BlockingIOError):
            said = self._tail + os.read(fd, NIXL_LOG_LINE_MAX_BYTES)
            *lines, tail = said.split(b"\n")
            self._tail = tail[-NIXL_LOG_LINE_MAX_BYTES:]
            for line in lines:
                self._learn(line.decode(errors="replace"))

    def _learn(self, line: str) -> None:
        log.debug("NIXL says", extra={"line": line})
        way = _WAY.search(line)
        if way is None:
            return
        for lanes in _LANES.findall(way.group(1)):
            self.lanes += [lane for lane in lanes.split() if lane not in self.lanes]


class _Child:
    """The process, the way to it, and where it writes what it says to whoever reads its log."""

    def __init__(
        self, process: subprocess.Popen[bytes], orders: socket.socket, log_fd: int
    ) -> None:
        self.process = process
        self.orders = orders
        self.log_fd = log_fd
        self.is_open = True

    async def end(self) -> None:
        """Kill it and wait until it has ended, however often this is cancelled."""
        self.process.kill()
        await settle(asyncio.get_running_loop().run_in_executor(None, self.process.wait))
        self.orders.close()
        os.close(self.log_fd)


def _start(arena_fd: int, name: str) -> _Child:
    """Start a process that has the agent *name*; raises `OSError`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    log_fd, their_log_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    words = [sys.executable, "-P", "-m", "kvstore.transfer.nixl_process"]
    try:
        process = subprocess.Popen(  # noqa: S603  # our own module
            [*words, str(theirs.fileno()), str(arena_fd), name],
            stdin=subprocess.DEVNULL,
            stdout=their_log_fd,
            stderr=their_log_fd,
            pass_fds=(theirs.fileno(), arena_fd),
            env={**_ENVIRONMENT, **os.environ},
            start_new_session=True,
        )
    except OSError:
        ours.close()
        os.close(log_fd)
        raise
    finally:
        theirs.close()
        os.close(their_log_fd)
    return _Child(process, ours, log_fd)
