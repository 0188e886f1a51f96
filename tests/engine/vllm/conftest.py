"""What the tests of the vLLM connector share. They run where vLLM is installed."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.demo.daemon import running_daemon
from tests.engine.vllm import models
from tests.engine.vllm.driver import ENVIRONMENT

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*"]
else:
    os.environ.update(ENVIRONMENT)
    with warnings.catch_warnings():
        # What engines warn about when they are imported is not ours.
        warnings.simplefilter("ignore")
        importlib.import_module("kvstore.connectors.vllm")


# Whoever runs files side by side begins with the longest, so that none is waited for at the end.
LONGEST = ("test_parallel", "test_several_processes", "test_churn", "test_processes", "test_pd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            # Engines start slowly.
            item.add_marker(pytest.mark.timeout(300))
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return models.save(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(scope="module")
def socket() -> Iterator[Path]:
    with running_daemon(["tiers.host.capacity=512MiB"]) as (path, _):
        yield path
