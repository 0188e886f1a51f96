"""Frames: a 4-byte little-endian length, then that many bytes. Sans-I/O: bytes in, frames out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from kvstore.errors import FrameError
from kvstore.limits import DIGEST_SIZE_BYTES, FRAME_SIZE_MAX_BYTES
from kvstore.protocol.messages import Message, encode
from kvstore.types import BytesLike

HEADER_SIZE_BYTES: Final = 4
# A digest, and what MessagePack puts before it.
_DIGEST_STRIDE_BYTES: Final = DIGEST_SIZE_BYTES + 2


def frame(message: Message) -> bytes:
    """Return *message* as one frame; raises `FrameError` when it is over the limit."""
    body = encode(message)
    if len(body) > FRAME_SIZE_MAX_BYTES:
        raise FrameError(f"frame of {len(body)} bytes, at most {FRAME_SIZE_MAX_BYTES} allowed")
    return len(body).to_bytes(HEADER_SIZE_BYTES, "little") + body


class FrameReader:
    """Cuts a byte stream into frames.

    Holds at most one frame and the bytes last fed. After a `FrameError` the stream cannot be
    trusted any more and the reader must be dropped.
    """

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: BytesLike) -> Iterator[bytes]:
        """Yield the bodies of all frames that *data* completes.

        *data* is taken up with the first one asked for. The length is judged as soon as its
        four bytes are there, before the body is kept. Raises `FrameError` on a length of zero
        or over the limit.
        """
        # Whole frames, which nearly all are, are cut from what came without being kept first.
        source: BytesLike = data
        if self._rest:
            self._rest += data
            source = self._rest
        start, end = 0, len(source)
        try:
            while end - start >= HEADER_SIZE_BYTES:
                body = start + HEADER_SIZE_BYTES
                size = int.from_bytes(source[start:body], "little")
                if not 0 < size <= FRAME_SIZE_MAX_BYTES:
                    raise FrameError(
                        f"frame of {size} bytes, must lie in [1, {FRAME_SIZE_MAX_BYTES}]"
                    )
                if end - body < size:
                    return
                start = body + size
                yield bytes(source[body:start])
        finally:
            if source is self._rest:
                del self._rest[:start]
            else:
                self._rest += source[start:]


def first_bytes(frame: bytes, digests: Sequence[bytes]) -> bytes:
    """Return the first byte of each of *digests*, which *frame* holds, or nothing.

    One slice of the frame, because nearly every writer puts them at equal distances: it costs
    a tenth of looking at each digest.
    """
    last = len(digests) - 1
    start = frame.find(digests[0])
    end = start + last * _DIGEST_STRIDE_BYTES
    if start < 0 or frame[end : end + DIGEST_SIZE_BYTES] != digests[last]:
        return b""
    return frame[start : end + 1 : _DIGEST_STRIDE_BYTES]
