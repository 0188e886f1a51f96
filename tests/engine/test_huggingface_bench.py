"""What `kvstore bench gpu` measures of a model runs from end to end, over the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvstore.bench import gpu_model, gpu_page, report
from kvstore.bench.gpu import Run
from kvstore.bench.gpu_model import TINY, Way
from kvstore.compression.twins import CODEC_TWINS
from kvstore.connectors.huggingface_device import Opened
from kvstore.errors import InternalError
from kvstore.gpu.device import host_bytes
from kvstore.gpu.standin import Standin

CPU = torch.device("cpu")


class BorrowedMemory(Standin):
    """A stand-in to which all memory of the host is its own."""

    def memory_at(self, address: int, size_bytes: int) -> np.ndarray:
        return host_bytes(address, size_bytes)


def rows_of(*ways: Way, seconds: float = 600.0) -> Iterator[dict[str, object]]:
    device = BorrowedMemory(np.random.default_rng(1), twins=CODEC_TWINS, eager=True)
    return gpu_model.measure_model(
        TINY,
        CPU,
        lambda _: Opened(device, lambda: 1),
        "standin",
        rounds=1,
        seconds=seconds,
        ways=ways,
    )


def measure(*ways: Way, seconds: float = 600.0) -> list[dict[str, object]]:
    return list(rows_of(*ways, seconds=seconds))


def test_every_prefix_is_timed_cold_and_from_each_tier_and_compared(capsys):
    rows = measure(Way("device", "raw"), Way("host", "int8kv"))
    assert [(row["tokens"], row["what"]) for row in rows] == [
        (tokens, what)
        for tokens in TINY.prefixes
        for what in ("cold", "device tier, raw", "host tier, int8kv")
    ]
    assert all(row["first_token_ms"] > 0 for row in rows)
    for cold, pooled, coded in (rows[:3], rows[3:]):
        assert cold["faster"] == 1.0
        assert pooled["moved_by"] == coded["moved_by"] == "device"
        assert (pooled["outcome"], pooled["logits_off"]) == ("KV equal", 0.0)
        assert coded["outcome"].endswith("0.02 allowed")
    verdicts = gpu_page.verdicts({"rows": [], "models": rows}, {})
    assert [verdict.is_met for verdict in verdicts] == [True, True]
    report.print_table(gpu_page.MODELS, rows)
    assert "| device tier, raw " in capsys.readouterr().out


def test_what_is_not_what_was_stored_is_told_behind_all_rows(monkeypatch):
    def compare(way: Way, tokens: int, *_: object) -> str:
        if tokens == TINY.prefixes[0]:
            raise InternalError(f"{way.name} is wrong")
        return "KV equal"

    monkeypatch.setattr(gpu_model, "compare", compare)
    run = Run()
    run.part("models", "all of it", lambda: rows_of(Way("host", "raw")))
    told = [row.get("outcome") for row in run.found["models"]]
    assert told == [None, "host tier, raw is wrong", None, "KV equal", None]
    assert run.found["models"][-1]["verdict"] == "InternalError: host tier, raw is wrong"
    assert run.failed == ["all of it"]


def test_what_there_is_no_time_for_says_so():
    rows = measure(Way("host", "raw"), seconds=0.0)
    assert [row["outcome"] for row in rows if row["what"] == "cold"] == [
        "takes about 0 s, and 0 s are left"
    ] * len(TINY.prefixes)
    assert {row["outcome"] for row in rows if row["what"] != "cold"} == {"not measured cold"}


def test_what_differs_by_more_than_it_may_ends_it():
    def past(keys: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=torch.ones(1, 1, 4, 2))])

    ones = torch.ones(1, 1, 4, 2)
    for off, raw, coded in ((0.0, True, True), (0.01, False, True), (0.03, False, False)):
        for way, is_right in ((Way("device", "raw"), raw), (Way("host", "int8kv"), coded)):
            # What follows the prefix is not looked at.
            found = torch.cat([(1 + off) * ones[:, :, :3], 9 * ones[:, :, 3:]], dim=2)
            ends = nullcontext() if is_right else pytest.raises(InternalError, match=way.tier)
            with ends:
                gpu_model.compare(way, 3, past(ones), past(found))
