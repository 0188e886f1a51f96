"""A shared daemon with a bystander, who must not notice what other sessions do."""

from __future__ import annotations

import pytest

from tests.support.making import make_digests, make_manifest, sources_of
from tests.support.peer import RawPeer
from tests.support.waiting import wait_until

MANIFEST = make_manifest()


@pytest.fixture(scope="module")
def bystander(shared_daemon):
    """A session that does nothing wrong: it has stored a prefix and holds a lease on it."""
    with shared_daemon.connect("bystander") as client:
        space = client.attach(make_manifest(model="bystander"))
        digests = make_digests(3)
        space.store(digests, sources_of(space.manifest, digests))
        with space.load(digests) as loaded:
            assert len(loaded) == 3
            yield client, space, digests


@pytest.fixture
def watched(shared_daemon, bystander):
    """The shared daemon; fails when the test has disturbed the bystander or left things behind."""
    client, space, digests = bystander
    before = client.stats()
    assert before.sessions == 1
    yield shared_daemon
    assert client.ping(b"still here") == b"still here"
    assert space.lookup(digests).hits == 3
    wait_until(lambda: client.stats().sessions == before.sessions, what="its session ends")
    after = client.stats()
    assert after.pid == before.pid
    assert (after.leases, after.reservations) == (before.leases, before.reservations) == (1, 0)


@pytest.fixture
def peer(watched):
    with RawPeer(watched.socket) as connected:
        yield connected


@pytest.fixture
def other(watched):
    with RawPeer(watched.socket) as connected:
        yield connected.enter(MANIFEST)
