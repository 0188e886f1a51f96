"""Train the small model of the quality bench: `python -m tests.bench.quality.train`.

Run once; the weights are part of the repository. Takes some forty minutes on one core.

Looking back is learnt first, on short sequences where nothing else helps: repetitions and look-ups.
Text comes then, and last the length of the bench. With long text from the start a model of this
size has not learnt it after hours.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tests.bench.quality import corpus
from tests.bench.quality.model import WEIGHTS, TinyModel, save

_MATRIX_RATE: Final = 0.02
_OTHER_RATE: Final = 4e-3
_WARM_UP_STEPS: Final = 30
_DECAY_SHARE: Final = 0.6
_SAVE_EVERY: Final = 50
_REPORT_EVERY: Final = 10


class Stage(NamedTuple):
    """A stretch of training: sequences of one length, *kinds* of them in every batch."""

    steps: int
    tokens: int
    kinds: list[str]


STAGES: Final = (
    Stage(100, 64, ["repetition", "look-up"] * 32),
    Stage(300, 128, ["text", "repetition", "text", "look-up", "text", "copy"] * 6),
    Stage(350, 384, ["text", "repetition", "text", "look-up", "text", "copy"] * 2),
)


class Muon:
    """Momentum whose steps are made orthogonal: https://kellerjordan.github.io/posts/muon."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.matrices = matrices
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take one step."""
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 0.05)
            turned = _orthogonal(matrix.grad.lerp(momentum, 0.95))
            gain = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            matrix.mul_(1 - 0.02 * rate).add_(turned, alpha=-rate * gain)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Bring all singular values of *matrix* near 1, by five steps of Newton and Schulz."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if is_tall else x


def main() -> None:
    """Train, saving now and then; what was saved is gone on with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path, help="where to keep what is needed to go on")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    Training(arguments.seed, arguments.state, arguments.out).run()


class Training:
    """The model, its optimisers, and how far they have come."""

    def __init__(self, seed: int, state: Path | None, out: Path) -> None:
        self.seed, self.state, self.out = seed, state, out
        self.model = TinyModel()
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
        self.step = 0
        if state is not None and state.exists():
            self._load(state)

    def run(self) -> None:
        """Take all the steps that are left."""
        source = corpus.standard_library(held_out=False)
        started_at, total = time.monotonic(), sum(stage.steps for stage in STAGES)
        while self.step < total:
            stage = _stage_at(self.step)
            chance = np.random.default_rng((self.seed, self.step))
            sample = corpus.batch(stage.kinds, source, chance, stage.tokens)
            losses = self._take_step(sample, _rate_at(self.step, total))
            self.step += 1
            if self.step % _REPORT_EVERY == 0:
                _report(self.step, stage, losses, sample, time.monotonic() - started_at)
            if self.step % _SAVE_EVERY == 0 or self.step == total:
                self._save()

    def _take_step(self, sample: corpus.Sample, rate: float) -> Tensor:
        """Return nats of each byte but the first, zero where none was asked."""
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        asked = torch.from_numpy(sample.is_asked[:, 1:])
        logits = self.model(tokens[:, :-1]).logits
        losses = (
            functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            * asked
        )
        self.model.zero_grad(set_to_none=True)
        (losses.sum(1) / asked.sum(1).clamp(min=1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step(_MATRIX_RATE * rate)
        for group in self.adam.param_groups:
            group["lr"] = _OTHER_RATE * rate
        self.adam.step()
        return losses.detach()

    def _save(self) -> None:
        save(self.model, self.out)
        if self.state is not None:
            state: dict[str, Any] = {
                "model": self.model.state_dict(),
                "momenta": self.muon.momenta,
                "adam": self.adam.state_dict(),
                "step": self.step,
            }
            torch.save(state, self.state.with_suffix(".new"))
            self.state.with_suffix(".new").replace(self.state)

    def _load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.momenta = state["momenta"]
        self.adam.load_state_dict(state["adam"])
        self.step = state["step"]


def _stage_at(step: int) -> Stage:
    for stage in STAGES:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise AssertionError("training is over")


def _rate_at(step: int, total: int) -> float:
    """Rise, stay, and fall to a fiftieth over the last part."""
    warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
    left = min(1.0, (total - step) / (total * _DECAY_SHARE))
    return warm * (0.02 + 0.98 * 0.5 * (1 - math.cos(math.pi * left)))


def _report(step: int, stage: Stage, losses: Tensor, sample: corpus.Sample, seconds: float) -> None:
    kinds = np.array(stage.kinds)
    found = []
    for kind in dict.fromkeys(stage.kinds):
        asked = sample.is_asked[kinds == kind, 1:].sum()
        found.append(f"{kind} {float(losses[kinds == kind].sum()) / max(asked, 1):.3f}")
    print(f"step {step}, {stage.tokens} tokens: {', '.join(found)}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
