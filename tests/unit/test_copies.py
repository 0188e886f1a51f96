"""Copies are bit-exact and their digests equal python-xxhash, on every kernel and without one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from kvstore.errors import RequestError
from kvstore.hashing import block_count, block_digests
from kvstore.limits import CHECKSUM_BLOCK_BYTES, KIB
from kvstore.transfer import copies
from kvstore.transfer.copies import Runs
from kvstore.transfer.native import (
    LIBRARY_PATH,
    Movers,
    NativeMovers,
    PlainMovers,
    address_of,
    load_library,
)

KERNELS = ("avx512", "avx2", "portable", "numpy")
SIZES = (0, 1, 63, 64, 65, 240, 241, 1023, 1024, 4095, 4096, 4097, 65535, 65536, 65537, 200_000)
# Whole blocks for two, three, four and more lanes; then a tail that fills no block.
BLOCK_SIZES = (*(n * CHECKSUM_BLOCK_BYTES for n in (2, 3, 4, 5, 9)), 600_001)
# piece_bytes, inner_count, inner_stride
SHAPES = (
    (1, 1, 0),
    (63, 1, 0),
    (64, 1, 0),
    (1023, 1, 0),
    (1024, 1, 0),
    (1152, 1, 0),
    (4096, 1, 0),
    (32 * KIB, 1, 0),
    (100_000, 1, 0),
    (256, 16, 2048),
    (256, 16, 256),
    (80, 7, 96),
    (2048, 3, 5000),
)


def movers_of(kernel: str) -> Movers:
    if kernel == "numpy":
        return PlainMovers()
    library = load_library()
    if library is None or not library.use_kernel(kernel):
        pytest.skip(f"no {kernel} kernel here")
    return library


@pytest.fixture(params=KERNELS)
def each_kernel(request, monkeypatch):
    """Run the test on each kernel; afterwards the best one is back in use."""
    movers = movers_of(request.param)
    monkeypatch.setattr(copies, "_MOVERS", movers)
    yield request.param
    if isinstance(movers, NativeMovers):
        for name in KERNELS[:3]:
            if movers.use_kernel(name):
                break


def noise(size_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, dtype=np.uint8)


def scattered(shape: tuple[int, int, int], run_count: int, *, skew: int = 0, seed: int = 0):
    """Return memory, and runs in it in shuffled order, *skew* bytes off a page boundary."""
    piece, inner, stride = shape
    span = max(piece, stride) * inner
    memory = noise(span * run_count + 2 * 4096, seed)
    start = address_of(memory.data)
    start += -start % 4096 + skew
    order = np.random.default_rng(seed).permutation(run_count).astype(np.uint64)
    return memory, Runs(np.uint64(start) + order * np.uint64(span), *shape, owner=memory)


def piece_offsets(memory: np.ndarray, runs: Runs) -> list[int]:
    """Return where in *memory* each piece lies, in order."""
    first = address_of(memory.data)
    inner = range(runs.inner_count)
    return [run - first + i * runs.inner_stride for run in runs.addresses.tolist() for i in inner]


def expected_bytes(memory: np.ndarray, runs: Runs) -> bytes:
    """Return what a gather must give, from slices alone."""
    size = runs.piece_bytes
    return b"".join(memory[at : at + size].tobytes() for at in piece_offsets(memory, runs))


def test_the_library_was_built_for_these_tests():
    if not LIBRARY_PATH.exists():
        pytest.skip("no C compiler: only the fallback is tested")
    assert load_library() is not None


@pytest.mark.parametrize("size", SIZES + BLOCK_SIZES)
def test_a_copy_is_exact_and_its_digests_are_those_of_xxhash(each_kernel, size):
    source, target = noise(size), np.zeros(size, np.uint8)
    digests = copies.copy(target, source, checksums=True)
    assert np.array_equal(target, source)
    assert digests is not None
    assert digests.tolist() == block_digests(source.tobytes()).tolist()


@pytest.mark.parametrize("size", SIZES + BLOCK_SIZES)
def test_digests_without_a_copy_are_those_of_xxhash(each_kernel, size):
    source = noise(size + 1)
    for skew in (0, 1):
        view = memoryview(source)[skew : skew + size]
        assert copies.digest_blocks(view).tolist() == block_digests(view).tolist()


@pytest.mark.parametrize(("to", "at"), list(itertools.product((0, 1, 16, 63), repeat=2)))
def test_unaligned_buffers_copy_exactly_and_nothing_around_them_changes(each_kernel, to, at):
    for size in (65, 4200, CHECKSUM_BLOCK_BYTES + 5, 300_000):
        memory, target = noise(size + 64), np.full(size + 128, 7, np.uint8)
        source = memory[at : at + size]
        digests = copies.copy(memoryview(target)[to : to + size], source, checksums=True)
        assert np.array_equal(target[to : to + size], source)
        assert (target[:to] == 7).all()
        assert (target[to + size :] == 7).all()
        assert digests is not None
        assert digests.tolist() == block_digests(source.tobytes()).tolist()


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("skew", [0, 16, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gather_puts_the_pieces_in_order(each_kernel, shape, skew, checksums):
    run_count = 300_000 // (shape[0] * shape[1]) + 1 if shape[0] > 1 else 5000
    memory, runs = scattered(shape, run_count, skew=skew)
    target = np.zeros(runs.size_bytes, np.uint8)
    digests = copies.gather(target, runs, checksums=checksums)
    assert target.tobytes() == expected_bytes(memory, runs)
    if checksums:
        assert digests is not None
        assert digests.tolist() == block_digests(target.tobytes()).tolist()
    else:
        assert digests is None


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("skew", [0, 16, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_scatter_fills_the_pieces_and_nothing_between_them(each_kernel, shape, skew, checksums):
    run_count = 300_000 // (shape[0] * shape[1]) + 1 if shape[0] > 1 else 5000
    memory, runs = scattered(shape, run_count, skew=skew)
    source = noise(runs.size_bytes, seed=1)
    expected = memory.copy()
    for index, at in enumerate(piece_offsets(memory, runs)):
        expected[at : at + shape[0]] = source[index * shape[0] :][: shape[0]]
    digests = copies.scatter(runs, source, checksums=checksums)
    assert np.array_equal(memory, expected)
    if checksums:
        assert digests is not None
        assert digests.tolist() == block_digests(source.tobytes()).tolist()


def test_the_raw_address_face_does_the_same(each_kernel):
    memory, runs = scattered((4096, 1, 0), 40)
    target = np.zeros(runs.size_bytes, np.uint8)
    address = address_of(target.data)
    digests = copies.gather_at(address, runs.size_bytes, runs, checksums=True)
    assert target.tobytes() == expected_bytes(memory, runs)
    memory[:] = 0
    assert digests is not None
    back = copies.scatter_from(address, runs.size_bytes, runs, checksums=True)
    assert back is not None
    assert back.tolist() == digests.tolist()
    assert expected_bytes(memory, runs) == target.tobytes()


def test_copies_and_digests_by_raw_address_do_the_same(each_kernel):
    source, target = noise(200_000), np.zeros(200_000, np.uint8)
    places = address_of(target.data), address_of(source.data)
    digests = copies.copy_at(*places, 200_000, checksums=True)
    assert np.array_equal(target, source)
    assert digests is not None
    assert digests.tolist() == copies.digest_blocks_at(places[0], 200_000).tolist()
    assert digests.tolist() == block_digests(source.tobytes()).tolist()


def test_runs_of_arrays_are_gathered_array_by_array():
    arrays = [np.full((3, 100), i, np.uint16) for i in range(9)]
    target = bytearray(9 * 600)
    copies.gather(target, Runs.of_arrays(arrays), checksums=False)
    assert bytes(target) == b"".join(array.tobytes() for array in arrays)


def test_runs_of_pages_are_in_the_order_plane_head_page():
    planes, pages, tokens, heads, row = 4, 10, 16, 8, 256
    table = [7, 2, 5]
    memory = noise(planes * pages * tokens * heads * row)
    cache = memory.reshape(planes, pages, tokens, heads, row)
    plane_bytes = pages * tokens * heads * row
    base = address_of(memory.data)
    runs = Runs.of_pages(
        [base + plane * plane_bytes for plane in range(planes)],
        table,
        page_stride_bytes=tokens * heads * row,
        piece_bytes=row,
        head_count=heads,
        head_stride_bytes=row,
        inner_count=tokens,
        inner_stride=heads * row,
        owner=memory,
    )
    target = np.zeros(runs.size_bytes, np.uint8)
    copies.gather(target, runs, checksums=False)
    assert target.tobytes() == cache[:, table].transpose(0, 3, 1, 2, 4).tobytes()


def test_runs_of_whole_pages_need_no_heads():
    memory = noise(20 * 4096)
    base = address_of(memory.data)
    runs = Runs.of_pages([base], [3, 1], page_stride_bytes=4096, piece_bytes=4096, owner=memory)
    target = bytearray(2 * 4096)
    copies.gather(target, runs, checksums=False)
    assert bytes(target) == memory[3 * 4096 : 4 * 4096].tobytes() + memory[4096:8192].tobytes()


def test_runs_keep_their_memory_alive():
    runs = Runs.of_buffer(noise(1000))
    target = bytearray(1000)
    copies.gather(target, runs, checksums=False)
    assert bytes(target) == noise(1000).tobytes()


def test_sizes_that_differ_are_refused():
    with pytest.raises(RequestError, match="10 bytes"):
        copies.copy(bytearray(10), b"12345678901", checksums=False)
    with pytest.raises(RequestError):
        copies.scatter(Runs.of_buffer(bytearray(10)), b"123", checksums=False)


def test_read_only_targets_are_refused():
    with pytest.raises(RequestError, match="read-only"):
        copies.copy(bytes(10), bytes(10), checksums=False)
    with pytest.raises(RequestError, match="read-only"):
        copies.scatter(Runs.of_buffer(bytes(10)), bytes(10), checksums=False)


def test_buffers_with_gaps_are_refused():
    gaps = np.zeros((10, 10), np.uint8)[:, :5]
    with pytest.raises(RequestError, match="contiguous"):
        Runs.of_buffer(gaps)
    with pytest.raises(RequestError, match="contiguous"):
        copies.digest_blocks(gaps)


@pytest.mark.parametrize("shape", [(0, 1, 0), (-1, 1, 0), (8, 0, 8), (8, 2, 7), (2**60, 1, 0)])
def test_absurd_shapes_are_refused(shape):
    with pytest.raises(RequestError):
        Runs(np.ones(1, np.uint64), *shape)


@pytest.mark.parametrize("addresses", [np.ones(2, np.int64), np.ones((2, 2), np.uint64)])
def test_addresses_of_another_kind_are_refused(addresses):
    with pytest.raises(RequestError, match="uint64"):
        Runs(addresses, 8)


def test_arrays_of_different_sizes_are_refused():
    with pytest.raises(RequestError, match="one size"):
        Runs.of_arrays([np.zeros(3), np.zeros(4)])
    with pytest.raises(RequestError, match="one size"):
        Runs.of_arrays([])


def test_negative_pages_are_refused():
    with pytest.raises(RequestError, match="negative"):
        Runs.of_pages([4096], [-1], page_stride_bytes=64, piece_bytes=64)


def test_a_missing_library_is_no_error(tmp_path):
    assert load_library(tmp_path / "absent.so") is None


def test_the_environment_turns_the_library_off():
    script = (
        "from kvstore.hashing import block_digests; from kvstore.transfer import copies\n"
        "source, target = bytes(range(256)) * 1000, bytearray(256_000)\n"
        "digests = copies.copy(target, source, checksums=True)\n"
        "assert target == source and digests.tolist() == block_digests(source).tolist()\n"
        "print(copies.KERNEL)"
    )
    environment = {**os.environ, "KVSTORE_NO_NATIVE": "1"}
    command = [sys.executable, "-c", script]
    output = subprocess.check_output(command, env=environment, text=True)
    assert output.strip() == "numpy"


def test_there_is_a_digest_for_every_block_started():
    for size in SIZES:
        assert len(copies.digest_blocks(bytes(size))) == block_count(size)
