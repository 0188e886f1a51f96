"""The quality bench: its model looks back, its outliers change nothing, its page says it all."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from kvstore.bench import codec
from tests.bench.quality import corpus
from tests.bench.quality.outliers import make_outliers
from tests.bench.quality.plot import Dot, draw

PREFIX = 256


def test_without_checkout_or_pytorch_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "checkout" in (codec.missing(tmp_path, has_torch=True) or "")
    weights = tmp_path / "tests/bench/quality/weights.npz"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert "pip install 'kvstore[torch]'" in (codec.missing(tmp_path, has_torch=False) or "")
    assert codec.missing(tmp_path, has_torch=True) is None
    monkeypatch.setattr(codec, "missing", lambda *_, **__: "lacks a screw")
    assert codec.main([]) == 1
    assert "lacks a screw" in capsys.readouterr().err


def test_needles_lie_in_the_prefix_and_nowhere_else() -> None:
    chance = np.random.default_rng(3)
    sample = corpus.needles(chance, PREFIX)
    before, behind = sample.tokens[:PREFIX].tobytes(), sample.tokens[PREFIX:].tobytes()
    lines = [behind[at : at + 3] for at in range(0, len(behind), 3)]
    assert len(set(lines)) == corpus.NAMES == sample.is_asked.sum()
    assert all(before.count(line) >= 2 and behind.count(line[:1]) == 1 for line in lines)
    assert bytes(sample.tokens[sample.is_asked]).isdigit()


def test_outliers_are_undone_by_who_knows_them() -> None:
    keys = np.random.default_rng(5).standard_normal((2, 2, 64, 32)).astype(np.float32)
    outliers = make_outliers(30, keys)
    stored = outliers.inject(keys)
    assert np.abs(stored).max() > 10 * np.abs(keys).max()
    assert np.allclose(outliers.undo(stored), keys, atol=1e-3)
    assert np.array_equal(make_outliers(0, keys).inject(keys), keys)


def test_the_plot_is_well_formed_and_names_what_fits() -> None:
    dots = [
        Dot("ours & more", True, 4.5, 1e-4, 1e-4),
        Dot("theirs", False, 8.0, 1e-5, 1e-2),
        Dot("beyond", False, 16.0, 1e-5, 1e-2),
    ]
    texts = [text.text for text in ElementTree.fromstring(draw(dots, 8)).iter() if text.text]
    assert {"ours & more", "theirs"} <= set(texts)
    assert "beyond" not in texts


def test_the_model_finds_what_its_prefix_says_and_codecs_are_measured_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from tests.bench.quality import evaluate, ours
    from tests.bench.quality.model import WEIGHTS, load

    assert WEIGHTS.stat().st_size < 10_000_000
    passages = evaluate.make_passages(load(), 8, count=2)
    assert evaluate.needle_accuracy(passages) > 0.9
    codecs = ours.codecs()
    exact, coarse = (
        evaluate.measure(load(), passages, codecs[name]) for name in ("exp3", "ecsq-lo")
    )
    assert exact[1:6] == (0.0, 1.0, 0.0, 0.0, 0.0)
    assert exact.bits_per_value < 16 / 1.4
    assert 0 < coarse.kl_nats < 0.5
    assert coarse.key_error > 0.05
    # A prefix of noise is as good as none.
    lost = evaluate.measure(load(), passages, _noise)
    assert lost.kl_nats > 10 * coarse.kl_nats
    assert lost.needle_accuracy < 0.5


def _noise(chunk: np.ndarray) -> tuple[np.ndarray, int]:
    from tests.bench.quality.evaluate import Coded, to_bf16

    noise = np.random.default_rng(9).standard_normal(chunk.shape).astype(np.float32)
    return Coded(to_bf16(noise), 0)
