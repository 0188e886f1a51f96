"""What all tests share: hypothesis without a clock, and real daemons, started and stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.daemon import Daemon

# How long an example takes says nothing on a machine that others use too.
settings.register_profile("kvstore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvstore")

StartDaemon = Callable[..., Daemon]

# What takes longest starts first, so that no test is waited for alone at the end.
LONG = ("crash", "property", "engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in LONG)


@pytest.fixture
def start_daemon(tmp_path) -> Iterator[StartDaemon]:
    """Return a function that starts a daemon with settings; all end with the test."""
    with contextlib.ExitStack() as running:
        count = 0

        def start(settings: dict[str, object] | None = None, **options: object) -> Daemon:
            nonlocal count
            count += 1
            directory = tmp_path / str(count)
            directory.mkdir()
            return running.enter_context(Daemon(directory, settings or {}, **options))

        yield start


@pytest.fixture
def daemon(start_daemon) -> Daemon:
    """Return a running daemon with the settings of tests."""
    return start_daemon()


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory) -> Iterator[Daemon]:
    """Return a daemon that all tests of one module use; none may harm it."""
    with Daemon(tmp_path_factory.mktemp("shared")) as running:
        yield running
