"""NVIDIA's run-time compiler: CUDA C++ to machine code, on any host, with or without a GPU.

The library comes from a wheel (`nvidia-cuda-nvrtc-cu12`, `nvidia-cuda-nvrtc`) or from an installed
toolkit. That it is absent is a value: `find_compiler` returns None.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.errors import InternalError

_WHEEL_FOLDERS: Final = ("cuda_nvrtc/lib", "cu13/lib", "cu12/lib")
_SONAMES: Final = ("libnvrtc.so.13", "libnvrtc.so.12")


class CompileError(InternalError):
    """A kernel cannot be compiled; the text is the compiler's."""


class Compiled(NamedTuple):
    """Machine code (or PTX) and what the compiler said about it."""

    code: bytes
    log: str


def find_compiler() -> Compiler | None:
    """Return the compiler of this host, or None."""
    for candidate in _candidates():
        try:
            return Compiler(ctypes.CDLL(candidate))
        except (OSError, AttributeError):
            continue
    return None


def _candidates() -> Iterator[str]:
    """Name the libraries to try: those of wheels first, because their headers match."""
    spec = importlib.util.find_spec("nvidia")
    for root in [] if spec is None else spec.submodule_search_locations or []:
        for folder in _WHEEL_FOLDERS:
            for soname in _SONAMES:
                path = Path(root, folder, soname)
                if path.exists():
                    yield str(path)
    yield from _SONAMES


class Compiler:
    """One loaded NVRTC. Calls are independent of each other and release the GIL."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        library.nvrtcGetErrorString.argtypes = [ctypes.c_int]
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def architectures(self) -> list[int]:
        """Return the compute capabilities that it compiles for: 80, 90, ..."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        return list(found)

    def compile(self, source: str, name: str, options: Sequence[str], *, to_ptx: bool) -> Compiled:
        """Compile *source*. Raises `CompileError` with the compiler's words."""
        program = ctypes.c_void_p()
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), name.encode(), 0, None, None
            )
        )
        try:
            words = [option.encode() for option in options]
            status = self._library.nvrtcCompileProgram(
                program, len(words), (ctypes.c_char_p * len(words))(*words)
            )
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status != 0:
                raise CompileError(f"{name} does not compile: {log.strip()}")
            return Compiled(self._read(program, "PTX" if to_ptx else "CUBIN"), log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, text))
        return text.raw

    def _check(self, status: int) -> None:
        if status != 0:
            words: bytes = self._library.nvrtcGetErrorString(status)
            raise CompileError(f"nvrtc: {words.decode()}")
