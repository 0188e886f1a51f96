"""`kvstore bench gpu` runs from end to end, over the stand-in; its figures then mean nothing."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvstore.bench import gpu, gpu_bus, gpu_daemon, gpu_page, gpu_pool
from kvstore.bench.gpu_rig import GpuShape, Rig
from kvstore.compression.twins import CODEC_TWINS
from kvstore.errors import InternalError, UnavailableError
from kvstore.gpu.standin import Standin

TINY = GpuShape("tiny", layers=1, heads=2, head_dim=16, page_tokens=4, pages_per_chunk=2, chunks=3)
GATHERS = ("raw_gather", "whole_gather")


@pytest.fixture
def device() -> Standin:
    return Standin(np.random.default_rng(1), twins=CODEC_TWINS, eager=True)


def test_it_measures_every_row_beside_its_floor(device, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "POOL_CODECS", ("raw", "int4kv"))  # a daemon each
    monkeypatch.setattr(gpu_bus, "PAGE_SIZES", (256, 512, 1024, 4096))
    device.copies = SimpleNamespace(off="")
    run = gpu.Run()
    found = gpu.measure(device, [TINY], 1, gpu="standin", matmul=float, run=run)
    assert run.failed == []
    names = [row["what"] for row in found["rows"]]
    through = [f"through the daemon, {codec}" for codec in gpu_daemon.CODECS]
    through += [f"device tier, {codec}" for codec in gpu.POOL_CODECS]
    assert [name.replace(" through", ", through") for name in names] == [
        "floor: pinned copy to the host",
        "floor: pinned copy to the device",
        "floor: both at once",
        "floor: copy on the device",
        "both, plain, in one stream",
        "store, gathered",
        "load, gathered",
        "both, gathered",
        "store, on the device",
        "load, on the device",
        *(f"{what}, {where}" for where in through for what in ("store", "load")),
    ]
    assert all(row["gb_per_s"] > 0 and row["floor_gb_per_s"] > 0 for row in found["rows"])
    assert [row["page_kib"] for row in found["pages"]] == [0, 0, 1]
    ways = {f"{what}, {way}" for what in ("store", "load") for way in gpu_bus.WAYS}
    assert all(row[way] > 0 for row in found["pages"] for way in ways)
    assert {verdict["target"]: verdict["limit"] for verdict in found["targets"]} == {
        "store, gathered (tiny)": 0.90,
        "load, gathered (tiny)": 0.90,
        "both, gathered (tiny)": 0.85,
        "store, on the device (tiny)": 0.80,
        "load, on the device (tiny)": 0.80,
        "store through the daemon, raw (tiny)": 0.90,
        "load through the daemon, raw (tiny)": 0.90,
        "store through the daemon, int4kv (tiny)": 3.2,
        "load through the daemon, int4kv (tiny)": 3.2,
        "store, device tier, raw (tiny)": 0.80,
        "load, device tier, raw (tiny)": 0.80,
        "tiny: engine's thread, a store of 32 chunks, us": 100.0,
        "matmul beside stores, slower by": 0.03,
    }
    assert found["checks"]["copies are given"] == "in batches"
    assert device.copies.off == ""


def test_what_fails_is_named_and_the_rest_goes_on(device, monkeypatch) -> None:
    def broken(*_: object) -> list[object]:
        return [lambda: None]

    def lost(_: int) -> float:
        raise RuntimeError("no cuBLAS here")

    device.twins = {**device.twins, **dict.fromkeys(GATHERS, broken)}
    monkeypatch.setattr(gpu_pool, "BenchDaemon", refuse)
    monkeypatch.setattr(gpu_daemon, "BenchDaemon", refuse)
    run = gpu.Run()
    found = gpu.measure(device, [TINY], 1, gpu="standin", matmul=lost, run=run)
    told = {row["what"]: row["verdict"] for row in found["rows"]}
    assert told["lanes (tiny)"] == "InternalError: chunks are not what the pages hold"
    assert told["a daemon (tiny)"] == "UnavailableError: there is no such GPU"
    assert told["store, device tier, raw"] == "there is no such GPU"
    assert told["matmul beside stores"] == "RuntimeError: no cuBLAS here"
    assert run.failed == ["lanes (tiny)", "a daemon (tiny)", "matmul beside stores"]
    assert found["checks"]["tiny: engine's thread, a store of 32 chunks, us"] > 0
    assert found["checks"]["copies are given"] == "this device has no batched copies"
    assert [verdict["target"] for verdict in found["targets"]] == [
        "tiny: engine's thread, a store of 32 chunks, us"
    ]


def test_what_there_is_no_time_for_is_named(device) -> None:
    now = iter(range(100))
    run = gpu.Run(ends_at=2, clock=lambda: next(now))
    for name in ("first", "second", "third"):
        run.part("rows", name, lambda: [{"what": "measured"}])
    assert [(row["what"], row.get("verdict")) for row in run.found["rows"]] == [
        ("measured", None),
        ("measured", None),
        ("third", "left out: no time is left"),
    ]
    assert run.failed == []


def refuse(*_: object, **__: object) -> None:
    raise UnavailableError("did not start:\nthere is no such GPU")


def page_row(kib: int, staged: float, single: float, batched: float | None) -> dict[str, object]:
    return {
        "page_kib": kib,
        "store, staged": staged,
        "store, one by one": single,
        "store, batched": batched,
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([page_row(16, 50, 9, 20), page_row(64, 50, 30, 48), page_row(256, 50, 50, 50)], 64),
        ([page_row(16, 50, 50, None), page_row(64, 50, 9, None), page_row(256, 50, 50, None)], 256),
        ([page_row(16, 50, 9, 20)], None),
        ([], None),
    ],
)
def test_the_break_even_is_where_all_larger_pages_do_as_well(rows, expected) -> None:
    assert gpu_bus.break_even_kib(rows, "store") == expected


def test_a_page_keeps_its_text_around_the_figures() -> None:
    page = Path("docs/benchmarks/gpu.md").read_text()
    gpu_page.require_room(page)
    row = page_row(64, 50.0, 9.0, 20.0)
    row |= {name.replace("store", "load"): row[name] for name in row if name != "page_kib"}
    found = {
        "machine": {"date": "2026-01-01", "gpu": "H0", "driver": "999", "commit": "abc"},
        "rows": [
            {"what": "both, gathered", "gb_per_s": 90.0},
            {"what": "both, plain, in one stream", "gb_per_s": 50.0},
        ],
        "pages": [row],
        "models": [],
        "checks": {"pages skip staging to the host, from KiB": 64.0},
        "targets": [],
    }
    filled = gpu_page.filled(page, found)
    for line in ("- gpu: H0", "90.0 GB/s in two, 50.0 plain in one", "20.0 GB/s out, 20.0 in"):
        assert line in filled
    assert "50.0 GB/s out, 50.0 in, pages of 64 KiB" in filled
    assert "64 KiB out, none at any size in" in filled
    outside = [re.sub(r"(?s)<!-- (\w.*?) -->.*?<!-- end", "", text) for text in (page, filled)]
    assert outside[0] == outside[1]
    # Written again, nothing of the last run is left.
    again = gpu_page.filled(filled, found | {"rows": [], "pages": [], "checks": {}})
    assert again.count(gpu_page.NOT_MEASURED) == 4
    assert "90.0" not in again
    with pytest.raises(ValueError, match="no room for 'figures'"):
        gpu_page.filled("# a page", found)


def test_a_pool_that_nobody_uses_is_not_measured() -> None:
    found = {"stored_chunks": 9, "loaded_chunks": 9}
    gpu_pool.require_pooled(found, 9, refused=0)
    for what in ("stored", "loaded"):
        with pytest.raises(UnavailableError, match=rf"8 of 9 chunks were {what} there \(1 times"):
            gpu_pool.require_pooled(found | {f"{what}_chunks": 8}, 9, refused=1)


def test_the_model_has_what_is_left_of_the_budget(device, monkeypatch, capsys, tmp_path) -> None:
    def model(_: int, rounds: int, seconds: float, *, quick: bool) -> list[dict[str, object]]:
        asked.append((rounds, quick, 0 < seconds < 500))
        return [{"tokens": 32, "what": "host tier, raw", "logits_off": 0.5, "outcome": "KV equal"}]

    asked: list[tuple[int, bool, bool]] = []
    monkeypatch.setattr(gpu, "open_device", lambda _: device)
    monkeypatch.setattr(gpu, "_find_matmul", lambda _: float)
    monkeypatch.setattr(gpu, "measure", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "_measure_model", model)
    monkeypatch.setattr(gpu_page, "facts", lambda _: {"gpu": "none", "commit": "abc"})
    page = tmp_path / "gpu.md"
    page.write_text(Path("docs/benchmarks/gpu.md").read_text())
    assert gpu.main(["--quick", "--budget", "500", "--write", str(page)]) == 0
    assert asked == [(1, True, True)]
    for printed in (capsys.readouterr().out, page.read_text()):
        assert "| 32             | host tier, raw | -  | -          | -        | 0.500" in printed
        assert "| logits off by, host tier, raw (32) | 0.000 | 0.500    | MISS    |" in printed
        assert "- commit: abc" in printed
    page.write_text("# Nothing")
    with pytest.raises(SystemExit):
        gpu.main(["--quick", "--write", str(page)])
    assert "no room for 'figures'" in capsys.readouterr().err


def test_without_transformers_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    (row,) = gpu._measure_model(0, 1, 1.0, quick=True)
    assert row["outcome"] == "needs torch and transformers: pip install 'kvstore[hf]'"


def test_wrong_kernels_end_it(device) -> None:
    def nothing(*_: object) -> list[object]:
        return [lambda: None]

    device.twins = {**device.twins, **dict.fromkeys(GATHERS, nothing)}
    with Rig(device, TINY) as rig, pytest.raises(InternalError, match="not what the pages hold"):
        rig.check()


def test_memory_that_cannot_be_registered_ends_it(device) -> None:
    device.fail("register")
    with pytest.raises(UnavailableError, match="ulimit -l"):
        Rig(device, TINY)


def test_without_a_gpu_it_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "open_device", lambda _: None)
    assert gpu.main(["--quick"]) == 1
    assert "no GPU to use here" in capsys.readouterr().err
