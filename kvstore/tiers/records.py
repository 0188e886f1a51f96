"""What a restart must know of the host tier: a record of every shard, in memory that stays.

The records lie in a file beside the arena's that only the daemon maps: what clients can write
to is not trusted to say what it is. A record is void while it is written and counts only when
its checksum is that of its body, so a daemon that is killed between any two stores leaves one
that holds or none. No clock, no files; `record_layout` says how bytes lie.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.limits import NAMESPACES_MAX
from kvstore.tiers.base import Shard
from kvstore.tiers.record_layout import (
    FILLING,
    OFFSET_WORD,
    READY,
    RECORD,
    RECORD_WORDS,
    VACANT,
    WORD_BYTES,
    Geometry,
    NamespaceLog,
    Owner,
    checksum_of,
    filling_body,
    ready_body,
)
from kvstore.types import Extent, NamespaceId

Rows = npt.NDArray[np.void]

_NOWHERE: Final = -1


class Found(NamedTuple):
    """All records that hold, their places in the table, and how many do not hold."""

    numbers: npt.NDArray[np.int64]
    rows: Rows
    torn: int


class Records:
    """The records in *view*, of extents as they are filled, published and freed.

    The record of an extent stands where the extent starts, scaled to the table; where two meet,
    the second goes astray to a vacant place, and only for those a dict is kept.
    """

    def __init__(self, view: memoryview, capacity_bytes: int, geometry: Geometry) -> None:
        self.unrecorded = 0
        self._span = -(-capacity_bytes // geometry.entries)
        self._table = view[geometry.table_offset : geometry.size_bytes]
        self._words = self._table.cast("Q")
        self._log = NamespaceLog(view, geometry)
        self._known = set(self._log.read())
        self._refused: set[NamespaceId] = set()
        self._state = bytearray(geometry.entries)
        self._vacant = geometry.entries
        self._astray: dict[int, int] = {}
        self._sequence = 0
        self._cursor = 0

    # --- as extents change -----------------------------------------------------------------

    def fill(self, extent: Extent, owner: Owner) -> bool:
        """Note that *owner* may write to *extent* from now on; return whether it is noted.

        When the table is full, it takes the place of a published shard: that one is merely
        missed after a restart, but this extent would be given away while it is written.
        """
        number = self._take(extent.offset)
        if number == _NOWHERE:
            number = self._displace(extent.offset)
        if number == _NOWHERE:
            return False
        self._write(number, FILLING, filling_body(extent, owner))
        return True

    def publish(self, extent: Extent, shard: Shard, tenant: int = 0) -> None:
        """Note that *extent* holds *shard*.

        Without room for it, or for its namespace, it is counted in `unrecorded` instead: it is
        served as any other, and a restart forgets it.
        """
        number = self._number_of(extent.offset)
        if shard.key.namespace not in self._known:
            self.clear(extent.offset)
            number = _NOWHERE
        elif number == _NOWHERE:
            number = self._take(extent.offset)
        if number == _NOWHERE:
            self.unrecorded += 1
            return
        self._sequence += 1
        self._write(number, READY, ready_body(extent, shard, self._sequence, tenant))

    def clear(self, offset: int) -> None:
        """Forget the extent at *offset*, if it is known. Comes before it is given away."""
        number = self._number_of(offset)
        if number != _NOWHERE:
            self._vacate(number, offset)

    def knows(self, namespace: NamespaceId) -> bool:
        """Return whether it was said what *namespace* is."""
        return namespace in self._known

    def introduce(self, namespace: NamespaceId, introduction: bytes) -> bool:
        """Keep what will say what *namespace* is; return whether there was room.

        One that found no room is not tried again soon: to look for some is slow.
        """
        if namespace in self._known or namespace in self._refused:
            return namespace in self._known
        if self._log.append(namespace, introduction) or (
            self._make_room() and self._log.append(namespace, introduction)
        ):
            self._known.add(namespace)
            return True
        if len(self._refused) >= NAMESPACES_MAX:
            self._refused.clear()
        self._refused.add(namespace)
        return False

    def close(self) -> None:
        """Let go of the memory; the records stay."""
        self._log.close()
        self._words.release()
        self._table.release()

    # --- after a restart -------------------------------------------------------------------

    def scan(self) -> Found:
        """Return every record that holds, as it stands in the table; changes nothing."""
        table = np.frombuffer(self._table, dtype=RECORD)
        numbers = np.flatnonzero(table["checksum"])
        rows: Rows = table[numbers]
        packed = memoryview(rows.tobytes())
        size = RECORD.itemsize
        holds = np.fromiter(
            (
                checksum == checksum_of(packed[at * size + WORD_BYTES : (at + 1) * size])
                for at, checksum in enumerate(rows["checksum"].tolist())
            ),
            dtype=np.bool_,
            count=len(rows),
        )
        holds &= np.isin(rows["state"], (FILLING, READY))
        return Found(numbers[holds], rows[holds], int(len(rows) - holds.sum()))

    def namespaces(self) -> dict[NamespaceId, bytes]:
        """Return namespace -> introduction of all that are kept."""
        return self._log.read()

    def resume(self, found: Found, kept: npt.NDArray[np.bool_]) -> None:
        """Go on with those of a scan that are *kept*; every other record becomes void."""
        numbers, rows = found.numbers[kept], found.rows[kept]
        states = np.zeros(len(self._state), dtype=np.uint8)
        states[numbers] = rows["state"]
        checksums = np.frombuffer(self._table, dtype=RECORD)["checksum"]
        for number in np.flatnonzero((checksums != 0) & (states == VACANT)).tolist():
            self._words[number * RECORD_WORDS] = 0
        self._state = bytearray(states.tobytes())
        self._vacant = len(states) - len(numbers)
        offsets = rows["offset"].astype(np.int64)
        away = offsets // self._span != numbers
        self._astray = dict(zip(offsets[away].tolist(), numbers[away].tolist(), strict=True))
        self._sequence = int(rows["sequence"].max(initial=0))

    # --- the table -------------------------------------------------------------------------

    def _number_of(self, offset: int) -> int:
        number = self._astray.get(offset, _NOWHERE)
        if number != _NOWHERE:
            return number
        home = offset // self._span
        is_home = self._state[home] != VACANT and self._offset_at(home) == offset
        return home if is_home else _NOWHERE

    def _offset_at(self, number: int) -> int:
        return self._words[number * RECORD_WORDS + OFFSET_WORD]

    def _take(self, offset: int) -> int:
        """Return a vacant place for the extent at *offset*, or `_NOWHERE`."""
        if not self._vacant:
            return _NOWHERE
        self._vacant -= 1
        number = self._state.find(VACANT, offset // self._span)
        if number == _NOWHERE:
            number = self._state.find(VACANT)
        if number != offset // self._span:
            self._astray[offset] = number
        return number

    def _displace(self, offset: int) -> int:
        """Return the place of a published shard, which loses it, or `_NOWHERE`."""
        number = self._state.find(READY, self._cursor)
        if number == _NOWHERE:
            number = self._state.find(READY)
        if number == _NOWHERE:
            return _NOWHERE
        self._cursor = number + 1
        self._vacate(number, self._offset_at(number))
        self.unrecorded += 1
        return self._take(offset)

    def _vacate(self, number: int, offset: int) -> None:
        self._words[number * RECORD_WORDS] = 0
        self._state[number] = VACANT
        self._vacant += 1
        self._astray.pop(offset, None)

    def _write(self, number: int, state: int, body: bytes) -> None:
        word, start = number * RECORD_WORDS, number * RECORD.itemsize
        self._words[word] = 0
        self._table[start + WORD_BYTES : start + RECORD.itemsize] = body
        self._words[word] = checksum_of(body)
        self._state[number] = state

    def _make_room(self) -> bool:
        """Forget all namespaces that have no shards; return whether there were any."""
        rows = np.frombuffer(self._table, dtype=RECORD)
        ready = np.frombuffer(self._state, dtype=np.uint8) == READY
        in_use = set(rows["namespace"][ready].tolist())
        if self._known <= in_use:
            return False
        self._log.rewrite(
            {known: text for known, text in self._log.read().items() if known in in_use}
        )
        self._known &= in_use
        return True
