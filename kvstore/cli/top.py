"""`kvstore top`: what the daemon does right now, in a terminal, until it is told to stop."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from kvstore.cli.tables import align
from kvstore.errors import KVStoreError
from kvstore.protocol.messages import DaemonStats, TierStats
from kvstore.units import round_size

_FULL: Final = "█"
_PARTS: Final = " ▏▎▍▌▋▊▉"
_SPARKS: Final = "▁▂▃▄▅▆▇█"
_BAR_WIDTH_MAX: Final = 40
_HISTORY: Final = 60

_ENTER: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_CLEAR_LINE: Final = "\x1b[K"
_CLEAR_BELOW: Final = "\x1b[J"

Ask = Callable[[], DaemonStats]


class Look(NamedTuple):
    """One look at the daemon; *stats* is None when it did not answer, *reason* says why."""

    at: float
    stats: DaemonStats | None
    reason: str = ""


class Top:
    """The last looks at one daemon, and how they are shown."""

    def __init__(self, ask: Ask, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._now = Look(clock(), None, "not asked yet")
        self._before: Look | None = None
        self._rates: list[float] = []

    def look(self) -> None:
        """Ask the daemon; one that does not answer is shown as such, with what was last seen."""
        try:
            look = Look(self._clock(), self._ask())
        except KVStoreError as error:
            self._now = Look(self._now.at, self._now.stats, str(error))
            return
        # Totals of a daemon that was started again begin anew: no rates across.
        known = self._now.stats
        assert look.stats is not None
        is_same = known is not None and known.pid == look.stats.pid
        self._before = self._now if is_same else None
        self._now = look
        rate = self._hit_rate()
        if rate is not None:
            self._rates = [*self._rates, rate][-_HISTORY:]

    def frame(self, width: int, height: int) -> list[str]:
        """Return what is to be shown in so many columns and rows."""
        stats = self._now.stats
        if stats is None:
            return _cut([f"no answer: {self._now.reason}"], width, height)
        lines = [
            "  ".join(
                (
                    f"kvstore {stats.version}  pid {stats.pid}  {stats.state}",
                    f"up {_lasting(stats.uptime_seconds)}",
                    f"{round_size(stats.resident_bytes)} own memory",
                )
            ),
            f"no answer: {self._now.reason}" if self._now.reason else "",
            *self._hits(stats),
            "",
            *self._tiers(stats, width),
            "",
            *self._work(stats),
        ]
        if stats.namespaces:
            lines += ["", *_namespaces(stats)]
        return _cut(lines, width, height)

    def _hits(self, stats: DaemonStats) -> list[str]:
        rate = self._hit_rate()
        asked = sum(_outcomes(stats))
        shown = "-" if rate is None else f"{rate:.0%}"
        total = f"{stats.counters['lookup_chunks_ready'] / asked:.0%}" if asked else "-"
        sparks = "".join(_SPARKS[round(one * (len(_SPARKS) - 1))] for one in self._rates)
        return [f"hit rate {shown:>4}  since the start {total:>4}  {sparks}"]

    def _tiers(self, stats: DaemonStats, width: int) -> list[str]:
        room = max(8, min(_BAR_WIDTH_MAX, width - 56))
        rows = [("tier", "", "used", "of", "chunks", "hits/s", "state")]
        rows += [
            (
                tier.tier,
                _bar(tier, room),
                round_size(tier.used_bytes),
                round_size(tier.capacity_bytes) if tier.capacity_bytes else "-",
                f"{tier.chunks:,}",
                self._per_second(partial(_hit_chunks, place)),
                tier.state,
            )
            for place, tier in enumerate(stats.tiers)
        ]
        return align(rows, right={2, 3, 4, 5})

    def _work(self, stats: DaemonStats) -> list[str]:
        def size(name: str) -> str:
            return f"{round_size(self._rate(lambda one: one.counters[name]))}/s"

        def count(name: str) -> str:
            return self._per_second(lambda one: one.counters[name])

        rows = [
            ("loaded", size("load_bytes"), "sessions", f"{stats.sessions:,}"),
            ("stored", size("commit_bytes"), "leases", f"{stats.leases:,}"),
            ("evicted/s", count("evict_chunks"), "reservations", f"{stats.reservations:,}"),
            ("requests/s", count("requests"), "errors/s", count("request_errors")),
            ("damaged", f"{stats.counters['checksum_failures']:,}", "", ""),
        ]
        return align(rows, right={1, 3})

    def _rate(self, pick: Callable[[DaemonStats], float]) -> float:
        before, now = self._before, self._now
        if before is None or before.stats is None or now.stats is None or now.at <= before.at:
            return 0.0
        return max(0.0, (pick(now.stats) - pick(before.stats)) / (now.at - before.at))

    def _per_second(self, pick: Callable[[DaemonStats], float]) -> str:
        return f"{self._rate(pick):,.0f}"

    def _hit_rate(self) -> float | None:
        """Return the share of hits among what was asked for between the last two looks."""
        ready = self._rate(lambda one: one.counters["lookup_chunks_ready"])
        asked = self._rate(lambda one: sum(_outcomes(one)))
        return ready / asked if asked else None


def run(ask: Ask, interval_seconds: float) -> None:
    """Show frames until `q` or an interrupt; one frame alone where there is no terminal."""
    top = Top(ask)
    top.look()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("\n".join(top.frame(100, 10_000)))
        return
    with _whole_screen():
        while True:
            _show(top.frame(*shutil.get_terminal_size()))
            ready, _, _ = select.select([sys.stdin], [], [], interval_seconds)
            if ready and os.read(sys.stdin.fileno(), 1) in {b"q", b"Q", b"\x04", b""}:
                return
            top.look()


def _show(lines: Sequence[str]) -> None:
    text = "".join(f"{line}{_CLEAR_LINE}\r\n" for line in lines[:-1]) + lines[-1] + _CLEAR_LINE
    sys.stdout.write(_HOME + text + _CLEAR_BELOW)
    sys.stdout.flush()


@contextlib.contextmanager
def _whole_screen() -> Iterator[None]:
    """Take the whole screen and single keys; give both back whatever happens."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    sys.stdout.write(_ENTER)
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _hit_chunks(place: int, stats: DaemonStats) -> int:
    return stats.tiers[place].hit_chunks


def _bar(tier: TierStats, room: int) -> str:
    if not tier.capacity_bytes:
        return ""
    eighths = round(8 * room * min(1.0, tier.used_bytes / tier.capacity_bytes))
    bar = _FULL * (eighths // 8) + (_PARTS[eighths % 8] if eighths % 8 else "")
    return bar.ljust(room, "·")


def _namespaces(stats: DaemonStats) -> list[str]:
    rows = [("model", "dtype", "chunks")]
    rows += [(space.model, space.dtype, f"{space.chunks:,}") for space in stats.namespaces]
    return align(rows, right={2})


def _outcomes(stats: DaemonStats) -> list[int]:
    """Return what became of the keys of all look-ups; together they are the keys asked for."""
    kinds = ("ready", "arriving", "declined", "unavailable", "miss")
    return [stats.counters[f"lookup_chunks_{kind}"] for kind in kinds]


def _lasting(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _cut(lines: Sequence[str], width: int, height: int) -> list[str]:
    return [line[:width] for line in lines[:height]]
