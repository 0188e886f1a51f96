"""What the tests of the SGLang connector share: SGLang's own storage interface and host pools."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.demo.daemon import running_daemon
from tests.engine.sglang import wheel

AWAY = wheel.fetch() if importlib.util.find_spec("transformers") else "transformers is not here"

if AWAY:
    collect_ignore_glob = ["test_*.py"]
else:
    wheel.install()


def pytest_report_header() -> str | None:
    return f"SGLang is not tested: {AWAY}" if AWAY else None


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A saved model of four layers with two KV heads of 16."""
    from tests.engine import models

    path = tmp_path_factory.mktemp("sglang") / "tiny"
    models.llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def socket() -> Iterator[Path]:
    with running_daemon(["tiers.host.capacity=64MiB"]) as (path, _):
        yield path
