"""One client for many threads, and none for a forked child."""

from __future__ import annotations

import subprocess
import sys
import threading

from kvstore.client.cache import PrefixCache
from tests.support.daemon import REPOSITORY
from tests.support.making import (
    empty_targets,
    make_digests,
    make_manifest,
    make_payload,
    sources_of,
)
from tests.support.waiting import wait_until
from tests.support.workload import Wrongs, engines

MANIFEST = make_manifest(model="threads")
THREADS = 8
ROUNDS = 150


def test_threads_that_share_a_client_each_get_their_own_answers(daemon):
    wrongs = Wrongs()
    with daemon.connect() as client:
        space = client.attach(MANIFEST)

        def work(number: int) -> None:
            digests = make_digests(3, number)
            for turn in range(ROUNDS):
                payload = b"%d/%d" % (number, turn) * (1 + turn % 40)
                assert client.ping(payload) == payload
                assert space.store(digests, sources_of(MANIFEST, digests)).refused == 0
                assert space.lookup(digests).hits == 3
                with space.load(digests) as loaded:
                    buffers, targets = empty_targets(MANIFEST, 3)
                    loaded.copy_to(targets)
                for digest, buffer in zip(digests, buffers, strict=True):
                    assert buffer == make_payload(digest, len(buffer))
                assert space.delete(digests[2:]).busy == 0

        threads = [
            threading.Thread(target=wrongs.guard(lambda n=n: work(n))) for n in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrongs.found == []
        wait_until(lambda: client.stats().leases == 0)
        assert client.stats().reservations == 0


def test_threads_may_close_a_client_that_others_are_using(daemon):
    for _ in range(10):
        wrongs = Wrongs()
        cache = PrefixCache(MANIFEST, socket=daemon.socket)
        wait_until(lambda cache=cache: cache.is_connected)
        with engines([cache] * 3, wrongs) as crew:
            wait_until(lambda crew=crew: all(engine.rounds for engine in crew))
            cache.close()
        assert wrongs.found == []
    wait_until(lambda: daemon.stats().sessions == 1)


FORK = """
import os, sys
from kvstore.client.cache import PrefixCache
from kvstore.client.sync import Client
from kvstore.errors import UnavailableError
from tests.support.making import *
from pathlib import Path

manifest, digests, path = make_manifest(), make_digests(2), Path(sys.argv[1])
client = Client.connect(path)
space = client.attach(manifest)
cache = PrefixCache(manifest, socket=path, timeout_seconds=5)
assert cache.store(digests, sources_of(manifest, digests)).stored == 2
lease = space.load(digests)
child = os.fork()
if child == 0:
    try:
        client.ping()
        os._exit(1)
    except UnavailableError as error:
        assert "across fork" in str(error), error
    lease.release()
    client.close()
    assert cache.lookup(digests) == 0
    cache.close()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, "the child"
assert client.is_open and client.ping(b"still") == b"still"
assert space.delete(digests).busy == 2, "the lease still holds"
assert cache.is_connected and cache.lookup(digests) == 2
"""


def test_a_forked_child_can_neither_use_nor_end_the_sessions_of_its_parent(daemon):
    ended = subprocess.run(
        [sys.executable, "-c", FORK, str(daemon.socket)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
