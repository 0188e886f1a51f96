"""Chunks between an engine's memory and what is stored of them, where a codec lies between.

Encoding and decoding work where the engine's values lie, if they lie regularly; else in memory
that every thread keeps for it. Nothing here talks to the daemon, and nothing knows the arena.
"""

from __future__ import annotations

import threading
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from kvstore.compression.chunks import ChunkCodec, chunk_header
from kvstore.compression.container import (
    POSITION_MAX,
    Header,
    Section,
    head_of,
    next_section,
    payload_digest,
)
from kvstore.compression.guard import CodecCounters, EncodeReport, SectionReport
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.shapes import LOSSLESS, section_cap_bytes, shape_for
from kvstore.errors import CodecError, UnfitError
from kvstore.limits import CHUNKS_PER_TRANSFER_MAX, ENCODE_SCRATCH_BYTES
from kvstore.transfer.copies import Runs, gather
from kvstore.transfer.native import bytes_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from kvstore.client.chunks import Vacancy
    from kvstore.compression.chunks import Plan
    from kvstore.compression.shapes import Bytes, Encoded, Values
    from kvstore.protocol.manifest import Manifest
    from kvstore.types import Digest, HeadRange

_ALIGNMENT_BYTES: Final = 256


class Part(NamedTuple):
    """Consecutive chunks that are stored in one go, and how their room is filled.

    *sizes* are exact; none stands for those of the namespace. *fill* takes the number of a chunk
    and its room, and returns whether it fits there: if not, the room is given back.
    """

    digests: Sequence[Digest]
    parent: Digest | None
    sizes: Sequence[int]
    fill: Callable[[int, Vacancy], bool]

    def between(self, start: int, stop: int) -> Part:
        """Return the chunks from number *start* up to *stop*, or to the last."""
        return Part(
            self.digests[start:stop],
            self.digests[start - 1] if start else self.parent,
            self.sizes[start:stop],
            lambda number, vacancy: self.fill(start + number, vacancy),
        )


def plain_part(
    digests: Sequence[Digest],
    sources: Sequence[Runs],
    parent: Digest | None,
    sizes: Sequence[int] = (),
) -> Part:
    """Return what is stored as it is: chunk i are the bytes of `sources[i]`."""

    def fill(number: int, vacancy: Vacancy) -> bool:
        vacancy.fill(sources[number])
        return True

    return Part(digests, parent, sizes, fill)


class Coding:
    """How *heads* of the chunks of one namespace are encoded; made by `coding_for`. Thread-safe."""

    def __init__(self, manifest: Manifest, heads: HeadRange, policy: CodecPolicy) -> None:
        self._heads = heads
        self._codec = ChunkCodec(manifest, policy)
        self._header = chunk_header(manifest, heads)
        self._is_fixed_rate = all(
            self._codec.plan(heads, first_position=position).is_fixed_rate for position in (0, 1)
        )
        self._counters = CodecCounters()
        self._counting = threading.Lock()

    @property
    def counters(self) -> CodecCounters:
        """A copy of what was counted so far: bytes, errors, fallbacks, and what did not fit."""
        with self._counting:
            return deepcopy(self._counters)

    @property
    def chunk_bytes(self) -> int:
        """What one chunk takes, at most."""
        return max(
            self._codec.encoded_size(self._heads, first_position=position) for position in (0, 1)
        )

    def parts(
        self, digests: Sequence[Digest], sources: Sequence[Runs], parent: Digest | None
    ) -> Iterator[Part]:
        """Yield what to store, encoded; the next part is asked for when one has been stored.

        What does not fit its codec is in none of them, and counted.
        """
        if not self._is_fixed_rate:
            yield from self._encoded_parts(digests, sources, parent)
            return
        misfits: list[int] = []

        def fill(number: int, vacancy: Vacancy) -> bool:
            try:
                self._encode(sources[number], vacancy.view, is_first=not (parent or number))
            except UnfitError:
                misfits.append(number)
                return False
            vacancy.seal()
            return True

        sizes = [self.plan(is_first=not (parent or n)).size_bytes for n in range(len(digests))]
        yield Part(digests, parent, sizes, fill)
        # With sections that fell back, they are larger: how much so is known only now.
        for position in misfits:
            before = digests[position - 1] if position else parent
            yield from self._encoded_parts(
                digests[position : position + 1], sources[position : position + 1], before
            )

    def _encoded_parts(
        self, digests: Sequence[Digest], sources: Sequence[Runs], parent: Digest | None
    ) -> Iterator[Part]:
        """Encode into scratch memory first: what a chunk takes is known only behind that."""
        cap = self.chunk_bytes
        cap += -cap % _ALIGNMENT_BYTES
        room = _scratch.room("encoded", max(cap, min(ENCODE_SCRATCH_BYTES, cap * len(digests))))
        start = at = 0
        ready: list[npt.NDArray[np.uint8]] = []

        def part(stop: int) -> Part:
            before = digests[start - 1] if start else parent
            runs = [Runs.of_buffer(encoded) for encoded in ready]
            return plain_part(digests[start:stop], runs, before, [len(one) for one in ready])

        for position, source in enumerate(sources):
            if at + cap > room.nbytes or len(ready) == CHUNKS_PER_TRANSFER_MAX:
                yield part(position)
                start, at = position, 0
                ready.clear()
            try:
                is_first = not (parent or position)
                report = self._encode(source, room[at : at + cap].data, is_first=is_first)
            except UnfitError:
                with self._counting:
                    self._counters.refused += 1
                if ready:
                    yield part(position)
                start, at = position + 1, 0
                ready.clear()
                continue
            ready.append(room[at : at + report.size_bytes])
            at += report.size_bytes + -report.size_bytes % _ALIGNMENT_BYTES
        if ready:
            yield part(len(digests))

    def plan(self, *, is_first: bool) -> Plan:
        """Return where the sections of a chunk go; first chunks have a plan of their own."""
        return self._codec.plan(self._heads, first_position=_position(is_first=is_first))

    @property
    def seals_payload(self) -> bool:
        """Whether a head holds a checksum of the payload, which the host has to see for that."""
        return self._codec.policy.checksum

    def head_of(
        self,
        found: Sequence[Encoded],
        *,
        is_first: bool,
        sections: Sequence[Section] | None = None,
        stored: memoryview | None = None,
    ) -> bytes:
        """Return the head of a chunk whose sections another has encoded, by `plan`.

        *found* says of each section what that came to, *sections* where they are, if not where it
        was planned; *stored*, the chunk, is needed where `seals_payload`. Raises `UnfitError` when
        a section has more error than it may.
        """
        plan, policy = self.plan(is_first=is_first), self._codec.policy
        entries: list[Section] = []
        for section, encoded in zip(sections or sections_of(plan), found, strict=True):
            error = 0.0 if section.codec in LOSSLESS else encoded.relative_error
            if not encoded.is_fit or error > policy.bound(section.codec):
                raise UnfitError(f"a section of {section.codec.name.lower()} has error {error:.3g}")
            entries.append(replace(section, relative_error=error))
        header = replace(plan.header, first_position=_position(is_first=is_first))
        size = size_of(entries)
        digest = None
        if self.seals_payload:
            assert stored is not None, "a payload that is sealed is seen"
            digest = payload_digest(stored[header.payload_offset : size])
        reports = (
            SectionReport(nominal, one.codec, one.size_bytes, one.relative_error)
            for nominal, one in zip(plan.codecs, entries, strict=True)
        )
        with self._counting:
            self._counters.record(EncodeReport(size, header.raw_bytes, tuple(reports)))
        return head_of(header, entries, digest=digest)

    def _encode(self, source: Runs, target: memoryview, *, is_first: bool) -> EncodeReport:
        values = sections_at(source, self._header)
        if values is None:
            plain = _scratch.room("plain", self._header.raw_bytes)
            gather(plain, source, checksums=False)
            values = sections_in(plain, self._header)
        position = _position(is_first=is_first)
        report = self._codec.encode(values, target, self._heads, first_position=position)
        with self._counting:
            self._counters.record(report)
        return report


def coding_for(
    manifest: Manifest, heads: HeadRange, policy: CodecPolicy | None = None
) -> Coding | None:
    """Return how *heads* of chunks of *manifest* are encoded; None where they stay as they are.

    Raises `CodecError` when *policy* is not for the codec that the manifest names, or asks for
    what the manifest does not allow.
    """
    policy = policy or CodecPolicy(codec=manifest.codec)
    if policy.codec != manifest.codec:
        raise CodecError(
            f"a policy for codec {policy.codec!r} in a namespace of codec {manifest.codec!r}"
        )
    return None if policy.codec == "raw" else Coding(manifest, heads, policy)


def _position(*, is_first: bool) -> int:
    """Return where a chunk begins, as far as is known: what is not the first is somewhere later."""
    return 0 if is_first else POSITION_MAX


def sections_of(plan: Plan) -> list[Section]:
    """Return where sections lie in a container of *plan* when all are of their nominal size."""
    found, at = [], plan.header.payload_offset
    for index, codec in enumerate(plan.codecs):
        size = section_cap_bytes(codec, shape_for(codec, plan.header.shape(index)))
        found.append(Section(codec, at, size))
        at = next_section(at + size)
    return found


def size_of(sections: Sequence[Section]) -> int:
    """Return how long a container of *sections* is."""
    return next_section(max(section.end for section in sections))


def sections_in(plain: Bytes, header: Header) -> list[Values]:
    """Return views of the sections of a chunk that lies in *plain* in canonical order."""
    form = (header.sections, header.heads, header.tokens, header.head_dim)
    return list(plain.view(header.source.carrier).reshape(form))


def sections_at(runs: Runs, header: Header) -> list[Values] | None:
    """Return views of the sections where *runs* has them; None when they lie in other pieces.

    A view keeps nothing alive: it is good for as long as *runs* is.
    """
    element, addresses = header.source.size_bytes, runs.addresses
    if runs.size_bytes != header.raw_bytes or addresses[0] % element:
        return None
    if addresses.size == 1 and runs.inner_count == 1:
        plain = np.frombuffer(bytes_at(int(addresses[0]), header.raw_bytes), dtype=np.uint8)
        return sections_in(plain, header)
    head_bytes = header.tokens * header.head_dim * element
    if runs.piece_bytes == head_bytes and runs.inner_count == 1:
        token_stride = header.head_dim * element
    elif runs.piece_bytes == header.head_dim * element and runs.inner_count == header.tokens:
        token_stride = runs.inner_stride
    else:
        return None
    starts = addresses.reshape(header.sections, header.heads)
    if (starts % element).any() or token_stride % element:
        return None
    strides = np.diff(starts.astype(np.int64), axis=1)
    if header.heads > 1 and ((strides != strides[:, :1]).any() or (strides <= 0).any()):
        return None
    head_strides = strides[:, 0].tolist() if header.heads > 1 else [head_bytes] * header.sections
    return [
        _view(start, header, (head_stride, token_stride, element))
        for start, head_stride in zip(starts[:, 0].tolist(), head_strides, strict=True)
    ]


def _view(start: int, header: Header, strides: tuple[int, int, int]) -> Values:
    """Return the section `[heads][tokens][head_dim]` that begins at the address *start*."""
    shape = (header.heads, header.tokens, header.head_dim)
    reach = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    memory = bytes_at(start, reach + header.source.size_bytes)
    found: Values = np.ndarray(shape, header.source.carrier, buffer=memory, strides=strides)
    return found


class Scratch(threading.local):
    """Memory of each thread that is used again: fresh pages cost more than what is done in them.

    What one name stands for is as large as the largest chunk that its thread has had.
    """

    def __init__(self) -> None:
        self._rooms: dict[str, npt.NDArray[Any]] = {}

    def room(self, name: str, size_bytes: int) -> Bytes:
        """Return *size_bytes* for *name*; what it held before is gone."""
        room = self._rooms.get(name)
        if room is None or room.nbytes < size_bytes:
            room = self._rooms[name] = np.empty(size_bytes, dtype=np.uint8)
        return room[:size_bytes]


_scratch: Final = Scratch()
