"""What the engine tests share: models are tiny, seeded, and never fetched."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models are faster without threads, and their sums have one order."""
    torch.set_num_threads(1)
