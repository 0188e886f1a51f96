"""Train the small model of the quality bench: `python -m tests.bench.quality.train`.

Run once; the weights are part of the repository. Takes an hour or two on one core.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tests.bench.quality import corpus
from tests.bench.quality.model import WEIGHTS, TinyModel, save

_RATE: Final = 3e-3
_WARM_UP_STEPS: Final = 60
_SAVE_EVERY: Final = 100


def main() -> None:
    """Train, saving now and then."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.batch, arguments.seed, arguments.out)


def train(steps: int, batch: int, seed: int, out: Path) -> None:
    """Take *steps* steps and write the weights to *out*."""
    model = TinyModel()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    sequences = corpus.batches(corpus.standard_library(held_out=False), seed, batch)
    started = time.monotonic()
    for step, rows in zip(range(1, steps + 1), sequences, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * _schedule(step, steps)
        tokens = torch.from_numpy(rows.astype(np.int64))
        losses = _losses(model, tokens)
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            _report(step, losses.detach(), batch // 4, time.monotonic() - started)
        if step % _SAVE_EVERY == 0 or step == steps:
            save(model, out)


def _losses(model: TinyModel, tokens: Tensor) -> Tensor:
    """Return nats per byte, one for each row."""
    logits = model(tokens[:, :-1]).logits
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, step / _WARM_UP_STEPS)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _report(step: int, losses: Tensor, quarter: int, seconds: float) -> None:
    kinds = losses[: -2 * quarter], losses[-2 * quarter : -quarter], losses[-quarter:]
    text, copies, look_ups = (float(kind.mean()) for kind in kinds)
    print(
        f"step {step}: {text:.3f} text, {copies:.3f} copies, {look_ups:.3f} look-ups, "
        f"{seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
