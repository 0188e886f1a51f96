"""Build the kernels ahead, on any host: a cubin per source and architecture, and PTX for the rest.

`python -m kvstore.gpu.build FOLDER` writes them and prints what each kernel uses. Nothing here
needs a GPU or a driver.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.gpu.nvrtc import Compiler, find_compiler

SOURCES: Final = Path(__file__).with_name("cuda")
ARCHITECTURES: Final = (80, 89, 90, 100)
PTX_ARCHITECTURE: Final = 80
"""What the driver compiles for GPUs that have no cubin: newer ones, and those between."""

# No fused multiply-add: every stored byte is the same on a CPU.
OPTIONS: Final = (
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "-default-device",
)
_REPORT_OPTIONS: Final = ("--ptxas-options=-v",)

INSTRUCTION_BYTES: Final = 16
_COMPILERS_MAX: Final = 8

_ENTRY: Final = re.compile(
    r"entry function '(\w+)' for '\w+'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


class KernelUse(NamedTuple):
    """What one kernel needs of a GPU."""

    kernel: str
    architecture: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    instructions: int


def source_names() -> list[str]:
    """Return the translation units: a `.cu` file is one, its name without the ending."""
    return sorted(path.stem for path in SOURCES.glob("*.cu"))


def fingerprint() -> str:
    """Return a digest of all sources and options: equal digests are equal kernels."""
    digest = hashlib.blake2b(" ".join(OPTIONS).encode(), digest_size=8)
    for path in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cubin_name(source: str, architecture: int) -> str:
    """Return the file name of the machine code of *source*."""
    return f"{source}.sm_{architecture}.cubin"


def ptx_name(source: str) -> str:
    """Return the file name of the PTX of *source*."""
    return f"{source}.compute_{PTX_ARCHITECTURE}.ptx"


def find_code(folder: Path, source: str, architecture: int) -> Path:
    """Return the file in *folder* to load *source* from: machine code, or else PTX.

    A GPU runs the code of those before it whose major number is its own; the driver compiles what
    was built for none of them.
    """
    for known in range(architecture, architecture // 10 * 10 - 1, -1):
        cubin = folder / cubin_name(source, known)
        if cubin.exists():
            return cubin
    return folder / ptx_name(source)


def compile_cubin(
    compiler: Compiler, source: str, architecture: int
) -> tuple[bytes, list[KernelUse]]:
    """Compile one source for one architecture; return the machine code and what it uses."""
    options = (f"--gpu-architecture=sm_{architecture}", *OPTIONS, *_REPORT_OPTIONS)
    made = compiler.compile(_text_of(source), f"{source}.cu", (*options, _include()), to_ptx=False)
    return made.code, list(_uses(made.log, made.code, architecture))


def compile_ptx(compiler: Compiler, source: str) -> bytes:
    """Compile one source to PTX."""
    options = (f"--gpu-architecture=compute_{PTX_ARCHITECTURE}", *OPTIONS, _include())
    return compiler.compile(_text_of(source), f"{source}.cu", options, to_ptx=True).code


def build(compiler: Compiler, folder: Path) -> list[KernelUse]:
    """Write the code of all kernels into *folder*; return what each uses.

    An older compiler leaves out the GPUs that it does not know.
    """
    known = set(compiler.architectures()).intersection(ARCHITECTURES)
    jobs = [(source, architecture) for source in source_names() for architecture in sorted(known)]
    uses = _build(compiler, folder, jobs)
    _build(compiler, folder, [(source, None) for source in source_names()])
    return uses


def build_for(compiler: Compiler, folder: Path, architecture: int) -> None:
    """Write the code of all kernels for one GPU into *folder*: PTX where it is not known."""
    target = architecture if architecture in compiler.architectures() else None
    _build(compiler, folder, [(source, target) for source in source_names()])


def _build(
    compiler: Compiler, folder: Path, jobs: Sequence[tuple[str, int | None]]
) -> list[KernelUse]:
    """Compile sources for an architecture each, None: to PTX; return what kernels use.

    Several at a time: each takes a processor seconds, and somebody may be waiting.
    """

    def compiled(job: tuple[str, int | None]) -> list[KernelUse]:
        source, architecture = job
        if architecture is None:
            _replace(folder / ptx_name(source), compile_ptx(compiler, source))
            return []
        code, uses = compile_cubin(compiler, source, architecture)
        _replace(folder / cubin_name(source, architecture), code)
        return uses

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(min(_COMPILERS_MAX, os.cpu_count() or 1)) as pool:
        return [use for uses in pool.map(compiled, jobs) for use in uses]


def _replace(path: Path, code: bytes) -> None:
    """Write a file whole or not at all: others may be reading the folder."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(code)
    partial.replace(path)


def _text_of(source: str) -> str:
    return (SOURCES / f"{source}.cu").read_text()


def _include() -> str:
    return f"--include-path={SOURCES}"


def _uses(log: str, cubin: bytes, architecture: int) -> Iterator[KernelUse]:
    sizes = _code_sizes(cubin)
    for found in _ENTRY.finditer(log):
        name, _stack, stored, loaded, registers, shared = found.groups()
        yield KernelUse(
            kernel=name,
            architecture=architecture,
            registers=int(registers),
            shared_bytes=int(shared or 0),
            spilled_bytes=int(stored) + int(loaded),
            instructions=sizes[name] // INSTRUCTION_BYTES,
        )


def _code_sizes(cubin: bytes) -> dict[str, int]:
    """Return the bytes of machine code of every kernel: the sections `.text.NAME` of the ELF."""
    header = struct.unpack_from("<Q", cubin, 40)[0]
    entry_bytes, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    sections = [
        struct.unpack_from("<IIQQQQ", cubin, header + index * entry_bytes) for index in range(count)
    ]
    names_at = sections[names_index][4]
    sizes = {}
    for name_at, _kind, _flags, _address, _offset, size in sections:
        end = cubin.index(b"\0", names_at + name_at)
        name = cubin[names_at + name_at : end].decode()
        if name.startswith(".text."):
            sizes[name.removeprefix(".text.")] = size
    return sizes


def main() -> int:
    """Build into the folder named on the command line and print the report."""
    compiler = find_compiler()
    if compiler is None:
        sys.stderr.write("no NVRTC found: pip install nvidia-cuda-nvrtc-cu12\n")
        return 1
    for use in build(compiler, Path(sys.argv[1])):
        sys.stdout.write(
            f"{use.kernel:34} sm_{use.architecture:<4} registers {use.registers:3}  "
            f"shared {use.shared_bytes:6}  spilled {use.spilled_bytes:4}  "
            f"instructions {use.instructions}\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
