"""`kvstore bench gpu` runs from end to end, over the stand-in; its figures then mean nothing."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.bench import gpu, gpu_pool
from kvstore.bench.gpu_rig import GpuShape, Rig
from kvstore.compression.twins import CODEC_TWINS
from kvstore.errors import InternalError, UnavailableError
from kvstore.gpu.standin import Standin

TINY = GpuShape("tiny", layers=1, heads=2, head_dim=16, page_tokens=4, pages_per_chunk=2, chunks=3)


@pytest.fixture
def device() -> Standin:
    return Standin(np.random.default_rng(1), twins=CODEC_TWINS, eager=True)


def test_it_measures_every_row_beside_its_floor(device, capsys) -> None:
    found = gpu.measure(device, [TINY], 1, gpu="standin", matmul=float)
    names = [row["what"] for row in found["rows"]]
    assert [name for name in names if name.startswith("floor")] == [
        "floor: pinned copy to the host",
        "floor: pinned copy to the device",
        "floor: both at once",
        "floor: copy on the device",
    ]
    for what in ("store, gathered", "load, gathered", "both, gathered"):
        assert what in names
    through = [f"through the daemon, {codec}" for codec in gpu.CODECS]
    through += [f"device tier, {codec}" for codec in gpu.POOL_CODECS]
    assert [name.replace(" through", ", through") for name in names[-2 * len(through) :]] == [
        f"{what}, {where}" for where in through for what in ("store", "load")
    ]
    assert any("by the copy engine" in name for name in names)
    assert all(row["gb_per_s"] > 0 and row["floor_gb_per_s"] > 0 for row in found["rows"])
    targets = [verdict["target"] for verdict in found["targets"]]
    assert "store through the daemon, raw (tiny)" in targets
    assert "load through the daemon, int4kv (tiny)" in targets
    assert "matmul beside stores, slower by" in targets
    assert "store, device tier, raw (tiny)" in targets
    gpu._print(found)
    assert "| tiny " in capsys.readouterr().out


def test_without_a_pool_it_says_why(device, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UnavailableError("did not start:\nthere is no such GPU")

    monkeypatch.setattr(gpu_pool, "BenchDaemon", refuse)
    rows = list(gpu._through_a_pool(device, TINY, 1, "7", "int4kv"))
    assert [row["verdict"] for row in rows] == ["there is no such GPU"] * 2
    assert gpu._verdicts(rows, {}) == []


def test_a_pool_that_nobody_uses_is_not_measured() -> None:
    found = {"stored_chunks": 9, "loaded_chunks": 9}
    gpu_pool.require_pooled(found, 9, refused=0)
    for what in ("stored", "loaded"):
        with pytest.raises(UnavailableError, match=rf"8 of 9 chunks were {what} there \(1 times"):
            gpu_pool.require_pooled(found | {f"{what}_chunks": 8}, 9, refused=1)


def test_the_model_has_what_is_left_of_the_budget(device, monkeypatch, capsys) -> None:
    def model(_: int, rounds: int, seconds: float, *, quick: bool) -> list[dict[str, object]]:
        asked.append((rounds, quick, 0 < seconds < 500))
        return [{"tokens": 32, "what": "host tier, raw", "logits_off": 0.5, "outcome": "KV equal"}]

    asked: list[tuple[int, bool, bool]] = []
    measured = {"machine": {}, "rows": [], "checks": {}, "targets": []}
    monkeypatch.setattr(gpu, "open_device", lambda _: device)
    monkeypatch.setattr(gpu, "_find_matmul", lambda: float)
    monkeypatch.setattr(gpu, "measure", lambda *_, **__: measured)
    monkeypatch.setattr(gpu, "_measure_model", model)
    assert gpu.main(["--quick", "--budget", "500"]) == 0
    assert asked == [(1, True, True)]
    printed = capsys.readouterr().out
    assert "| 32             | host tier, raw | -  | -          | -        | 0.500" in printed
    assert "| logits off by, host tier, raw (32) | 0.000 | 0.500    | MISS    |" in printed


def test_without_transformers_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    (row,) = gpu._measure_model(0, 1, 1.0, quick=True)
    assert row["outcome"] == "needs torch and transformers: pip install 'kvstore[hf]'"


def test_wrong_kernels_end_it(device) -> None:
    def nothing(*_: object) -> list[object]:
        return [lambda: None]

    device.twins = {**device.twins, "raw_gather": nothing}
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
