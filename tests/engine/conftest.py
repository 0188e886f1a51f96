"""What the engine tests share: models are tiny, seeded, and never fetched."""

from __future__ import annotations

import importlib.util
import os

import pytest

from tests.engine.standin import MemoryStore

os.environ["HF_HUB_OFFLINE"] = "1"

# The engines' libraries are large and no part of the core: without them there is nothing here.
if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_huggingface*.py", "test_demo.py"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models are faster without threads, and their sums have one order."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


@pytest.fixture
def store() -> MemoryStore:
    """An empty store in memory."""
    return MemoryStore()
