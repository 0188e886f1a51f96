"""Stores without a daemon, under both policies; every test leaves them in order."""

from __future__ import annotations

import pytest

from tests.support.making import make_manifest
from tests.support.stores import Engine, make_store

MANIFEST = make_manifest()


@pytest.fixture(params=["lru", "s3fifo"])
def store(request):
    made = make_store(eviction=request.param)
    yield made
    made.check()
    made.host.close()


@pytest.fixture
def engine(store) -> Engine:
    return Engine(store, MANIFEST)


@pytest.fixture
def other(store) -> Engine:
    """Another session in the same namespace."""
    return Engine(store, MANIFEST, session=2)
