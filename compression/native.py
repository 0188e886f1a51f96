"""The compiled section coders: the C library beside this file, where it was built.

`find` gives the coder of a section, or None: then NumPy does it, slower and to the same bytes.
Calls release the GIL. The library checks every size against the geometry; that arrays are as
large as they say is checked here.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.compression.shapes import (
    UNFIT,
    Bytes,
    CodecId,
    Encoded,
    SectionShape,
    SourceType,
    Values,
    section_cap_bytes,
)
from kvstore.compression.tables import PRESETS_BY_ID
from kvstore.errors import CodecError, ContainerError
from kvstore.types import HeadRange

LIBRARY_PATH: Final = Path(__file__).with_name("_codecs.so")
WITHOUT_LIBRARY: Final = "KVSTORE_NO_NATIVE"
"""Environment variable: when set to 1, the library is not loaded even where it was built."""

WIDTH_MAX: Final = 1024
"""The widest head that the library takes: its rows live on the stack."""

CODECS: Final = frozenset(
    {
        CodecId.FP8,
        CodecId.INT8KV,
        CodecId.INT4KV,
        CodecId.NVFP4,
        CodecId.HQ4,
        CodecId.HQ3,
        CodecId.EXP3,
        CodecId.RANS,
        CodecId.ECSQ,
    }
)

_NUMBERS: Final = tuple(kind for kind in SourceType if kind is not SourceType.OPAQUE)

_DONE, _UNFIT, _BAD_BYTES = 0, 1, 2


class Request(ctypes.Structure):
    """A section as the C library reads it; its fields are those of `request` in _codecs.c."""

    _fields_ = (
        ("codec", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("source", ctypes.c_uint32),
        ("layer", ctypes.c_uint32),
        ("element", ctypes.c_uint64),
        ("heads", ctypes.c_uint64),
        ("tokens", ctypes.c_uint64),
        ("width", ctypes.c_uint64),
        ("sinks", ctypes.c_uint64),
        ("tail", ctypes.c_uint64),
        ("table", ctypes.c_uint64),
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("frequencies", ctypes.c_void_p),
        ("bound", ctypes.c_uint64),
        ("delta", ctypes.c_float),
    )


class Outcome(ctypes.Structure):
    """What encoding came to; its fields are those of `outcome` in _codecs.c."""

    _fields_ = (
        ("error", ctypes.c_double),
        ("energy", ctypes.c_double),
        ("size", ctypes.c_uint64),
    )

    error: float
    energy: float
    size: int


class Library:
    """The loaded C library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, request = ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(Request)
        self.encode = library.kvstore_codecs_encode
        self.encode.argtypes = [request, pointer, pointer, size, ctypes.POINTER(Outcome)]
        self.decode = library.kvstore_codecs_decode
        self.decode.argtypes = [request, pointer, size, pointer, size, size]
        self._kernel = library.kvstore_codecs_kernel
        self._kernel.argtypes, self._kernel.restype = [], ctypes.c_char_p
        self._use_kernel = library.kvstore_codecs_use_kernel
        self._use_kernel.argtypes = [ctypes.c_char_p]

    @property
    def kernel(self) -> str:
        """Name the loops in use: avx512, avx2 or portable."""
        name: bytes = self._kernel()
        return name.decode()

    def use_kernel(self, name: str) -> bool:
        """Switch to lesser loops, to compare; return whether this CPU has them."""
        return bool(self._use_kernel(name.encode()))


def load_library(path: Path = LIBRARY_PATH) -> Library | None:
    """Load the C library, or return None where it was not built or cannot be loaded."""
    try:
        return Library(ctypes.CDLL(str(path)))
    except OSError:
        return None


def _choose() -> Library | None:
    return None if os.environ.get(WITHOUT_LIBRARY) == "1" else load_library()


_LIBRARY: Final = _choose()

KERNEL: Final = "numpy" if _LIBRARY is None else _LIBRARY.kernel
"""Which loops code sections: avx512, avx2, portable, or numpy (no library built)."""


def find(codec: CodecId, shape: SectionShape) -> NativeCoder | None:
    """Return the compiled coder for sections of *codec* like *shape*, or None."""
    if _LIBRARY is None:
        return None
    return coder_of(_LIBRARY, codec, shape)


def coder_of(library: Library, codec: CodecId, shape: SectionShape) -> NativeCoder | None:
    """Return the coder of this *library*, or None where it has none for the shape."""
    takes = {CodecId.EXP3: (SourceType.BFLOAT16,), CodecId.RANS: tuple(SourceType)}
    if codec not in CODECS or shape.source not in takes.get(codec, _NUMBERS):
        return None
    if codec is CodecId.ECSQ and shape.table not in PRESETS_BY_ID:
        return None
    if not 0 < shape.dim <= WIDTH_MAX or shape.tokens == 0 or shape.heads == 0:
        return None
    return NativeCoder(library, codec)


class NativeCoder:
    """A section coder of the C library; see `SectionCoder`."""

    def __init__(self, library: Library, codec: CodecId) -> None:
        self._library = library
        self._codec = codec

    def encode(self, shape: SectionShape, source: Values, target: Bytes) -> Encoded:
        """Fill *target*; see `SectionCoder`."""
        _check_values(shape, source, shape.heads)
        _check_section(target, section_cap_bytes(self._codec, shape))
        found = Outcome()
        request = self._request(shape, source)
        status = self._library.encode(
            request, source.ctypes.data, target.ctypes.data, target.nbytes, found
        )
        if status == _UNFIT:
            return UNFIT
        if status != _DONE:
            raise CodecError(f"{self._codec.name} cannot encode {shape} here (status {status})")
        return Encoded(found.size, found.error, found.energy)

    def decode(self, shape: SectionShape, source: Bytes, target: Values, heads: HeadRange) -> None:
        """Fill *target* with *heads*; see `SectionCoder`."""
        _check_values(shape, target, heads.stop - heads.start)
        _check_section(source, None)
        request = self._request(shape, target)
        status = self._library.decode(
            request, source.ctypes.data, source.nbytes, target.ctypes.data, heads.start, heads.stop
        )
        if status == _BAD_BYTES:
            raise ContainerError(f"a {self._codec.name} section is damaged")
        if status != _DONE:
            raise CodecError(f"{self._codec.name} cannot decode {shape} here (status {status})")

    def _request(self, shape: SectionShape, values: Values) -> Request:
        element = shape.source.size_bytes
        table = self._table(shape)
        return Request(
            codec=self._codec,
            kind=shape.kind,
            source=shape.source,
            layer=shape.layer,
            element=element,
            heads=shape.heads,
            tokens=shape.tokens,
            width=shape.dim,
            sinks=shape.sinks,
            tail=shape.tail,
            table=shape.table,
            head_stride=values.strides[0],
            token_stride=values.strides[1],
            frequencies=None if table is None else table.frequencies.ctypes.data,
            bound=0 if table is None else table.bound,
            delta=0.0 if table is None else table.delta,
        )

    def _table(self, shape: SectionShape) -> _Table | None:
        return _TABLES[shape.table][shape.kind] if self._codec is CodecId.ECSQ else None


class _Table(NamedTuple):
    """What ecsq knows beforehand about the symbols of K or of V."""

    frequencies: NDArray[np.uint16]
    bound: int
    delta: float


_TABLES: Final = {
    preset.table_id: tuple(
        _Table(np.array(preset.frequencies[kind], dtype=np.uint16), bound, delta)
        for kind, (bound, delta) in enumerate(zip(preset.bounds, preset.deltas, strict=True))
    )
    for preset in PRESETS_BY_ID.values()
}
"""Kept here for as long as the library may read them."""


def _check_values(shape: SectionShape, values: Values, heads: int) -> None:
    expected = (heads, shape.tokens, shape.dim)
    if values.shape != expected or values.dtype != shape.source.carrier:
        raise CodecError(f"values are {values.dtype} {values.shape}, the section {expected}")
    if shape.dim > 1 and values.strides[2] != values.itemsize:
        raise CodecError("the channels of a token are not contiguous")


def _check_section(section: Bytes, size_bytes: int | None) -> None:
    if section.dtype != "u1" or section.ndim != 1 or not section.flags.c_contiguous:
        raise CodecError("a section is a flat contiguous array of bytes")
    if size_bytes is not None and section.nbytes != size_bytes:
        raise CodecError(f"the section has {section.nbytes} bytes, the shape needs {size_bytes}")
