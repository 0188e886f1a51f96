"""Each bench runs, in a tiny configuration, and says what it promises to say. Nothing is timed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvstore.bench import lookup, transfer
from kvstore.bench.report import Verdict
from kvstore.bench.shapes import SHAPES, Pool, Shape
from kvstore.limits import MIB
from kvstore.transfer.copies import KERNEL, gather


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, list[dict[str, object]]]:
    return json.loads(capsys.readouterr().out)


def test_transfer_reports_every_source_in_both_directions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert transfer.main(["--quick", "--output", "json"]) == 0
    report = report_of(capsys)
    assert report["machine"]["copy_kernel"] == KERNEL
    kinds = {
        (row["source"], row["direction"], row["batch"], row["checksums"]) for row in report["rows"]
    }
    assert len(kinds) == len(report["rows"]) == 4 * 2 * 2 * 2
    assert all(row["ratio"] > 0 and row["floor_ms"] > 0 for row in report["rows"])
    assert all((row["thin_ratio"] is None) == (row["batch"] > 1) for row in report["rows"])
    assert report["cold_start"]["store_cold_gb_per_s"] > 0
    assert {target["verdict"] for target in report["targets"]} <= {"pass", "MISS"}


def test_lookup_reports_every_size_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert lookup.main(["--quick", "--output", "json"]) == 0
    report = report_of(capsys)
    assert [row["kind"] for row in report["rows"]] == ["all hit", "half", "all miss"] * 3
    assert {row["digests"] for row in report["rows"]} == {16, 256, 4096}
    assert all(row["p99_ms"] >= row["p50_ms"] > 0 for row in report["rows"])
    assert report["index"][0]["daemon_bytes_per_chunk"] > 0
    assert len(report["targets"]) == 4


def test_tables_name_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert lookup.main(["--quick", "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "16 digests, ms over an echo, worst row" in printed
    assert "| chunks in the index | digests |" in printed


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.chunk_bytes // MIB} MiB")
def test_a_pool_lays_out_every_byte_once(shape: Shape) -> None:
    pool = Pool(2 * shape.chunk_bytes)
    expected = np.bincount(pool.memory, minlength=256)
    for source in shape.sources:
        runs = pool.chunks(shape, source, 2)
        assert [one.size_bytes for one in runs] == [shape.chunk_bytes] * 2
        chunks = np.zeros((2, shape.chunk_bytes), np.uint8)
        for chunk, one in zip(chunks, runs, strict=True):
            gather(chunk, one, checksums=False)
        assert (np.bincount(chunks.ravel(), minlength=256) == expected).all()
        assert shape.manifest(source).chunk_bytes == shape.chunk_bytes


@pytest.mark.parametrize(("better", "word"), [("more", "pass"), ("less", "MISS")])
def test_a_verdict_knows_which_way_is_better(better: str, word: str) -> None:
    assert Verdict("share", 0.8, 0.9, better).word == word
