"""A daemon that dies, hangs or drains: engines see misses, never wrong bytes, never an error."""

from __future__ import annotations

import signal
import time

import pytest

from kvstore.client.cache import PrefixCache
from kvstore.errors import DrainingError, UnavailableError
from tests.support.making import empty_targets, make_digests, make_manifest, sources_of
from tests.support.waiting import wait_until
from tests.support.workload import Engine, Wrongs, engines

MANIFEST = make_manifest(model="crash")
DIGESTS = make_digests(4, prompt=1000)


@pytest.fixture
def cache(daemon):
    with PrefixCache(MANIFEST, socket=daemon.socket, timeout_seconds=2.0) as made:
        wait_until(lambda: made.is_connected)
        yield made


def store(cache: PrefixCache) -> int:
    return cache.store(DIGESTS, sources_of(MANIFEST, DIGESTS)).stored


def load(cache: PrefixCache) -> int:
    return cache.load(DIGESTS, empty_targets(MANIFEST, len(DIGESTS))[1])


def until_all_grow(crew: list[Engine], name: str, wrongs: Wrongs) -> None:
    """Wait until this counter of every engine has grown."""
    before = [getattr(engine, name) for engine in crew]

    def have_grown() -> bool:
        assert not wrongs.found, wrongs.found
        now = [getattr(engine, name) for engine in crew]
        return all(new > old for new, old in zip(now, before, strict=True))

    wait_until(have_grown, what=f"{name} of every engine grows")


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("times", [10])
def test_kill_nine_under_load_costs_misses_and_nothing_else(start_daemon, times):
    daemon = start_daemon({"tiers.host.capacity": "4MiB"})
    wrongs = Wrongs()
    # A dead daemon is noticed by its socket; the timeout is for those that hang.
    shared = PrefixCache(MANIFEST, socket=daemon.socket, timeout_seconds=1.0)
    own = PrefixCache(MANIFEST, socket=daemon.socket, timeout_seconds=1.0)
    with shared, own, engines([shared, shared, own], wrongs) as crew:
        for _ in range(times):
            until_all_grow(crew, "loaded", wrongs)
            daemon.kill()
            until_all_grow(crew, "misses", wrongs)
            daemon.launch()
            daemon.wait_ready()
    assert wrongs.found == []


def test_after_a_restart_everything_works_without_touching_the_client(daemon, cache):
    assert (store(cache), load(cache)) == (4, 4)
    daemon.kill()
    assert (store(cache), load(cache), cache.lookup(DIGESTS)) == (0, 0, 0)
    assert not cache.is_connected
    daemon.launch()
    daemon.wait_ready()
    wait_until(lambda: cache.is_connected, what="the daemon is found again")
    assert cache.lookup(DIGESTS) == 0
    assert (store(cache), load(cache)) == (4, 4)


def test_a_cache_can_be_made_while_there_is_no_daemon(daemon):
    daemon.kill()
    with PrefixCache(MANIFEST, socket=daemon.socket) as cache:
        assert (store(cache), load(cache)) == (0, 0)
        daemon.launch()
        daemon.wait_ready()
        wait_until(lambda: cache.is_connected, what="the daemon is found")
        assert (store(cache), load(cache)) == (4, 4)


def test_the_plain_client_says_that_the_daemon_is_gone(daemon):
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        daemon.kill()
        for _ in range(2):
            with pytest.raises(UnavailableError):
                space.lookup(DIGESTS)
        assert not client.is_open
    with pytest.raises(UnavailableError, match=str(daemon.socket)):
        daemon.connect()


def test_what_was_loaded_stays_readable_when_the_daemon_is_gone(daemon):
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        space.store(DIGESTS, sources_of(MANIFEST, DIGESTS))
        loaded = space.load(DIGESTS)
        daemon.kill()
        buffers, targets = empty_targets(MANIFEST, 4)
        loaded.copy_to(targets)
        loaded.release()
    assert any(buffers[3])


# --- a black hole -------------------------------------------------------------------------


def test_a_daemon_that_hangs_costs_one_timeout_then_nothing_until_it_is_back(daemon):
    with PrefixCache(MANIFEST, socket=daemon.socket, timeout_seconds=0.2) as cache:
        wait_until(lambda: cache.is_connected)
        assert store(cache) == 4
        daemon.send(signal.SIGSTOP)
        started = time.monotonic()
        assert cache.lookup(DIGESTS) == 0
        assert not cache.is_connected
        for _ in range(1000):
            assert cache.lookup(DIGESTS) == 0
        # One timeout of 0.2 s; a thousand of them would be minutes.
        assert time.monotonic() - started < 10
        daemon.send(signal.SIGCONT)
        wait_until(lambda: cache.is_connected, what="the daemon is found again")
        assert cache.lookup(DIGESTS) == 4


def test_engines_in_threads_live_through_a_daemon_that_hangs_and_comes_back(daemon):
    wrongs = Wrongs()
    cache = PrefixCache(MANIFEST, socket=daemon.socket)
    with cache, engines([cache] * 3, wrongs) as crew:
        for _ in range(3):
            until_all_grow(crew, "loaded", wrongs)
            daemon.send(signal.SIGSTOP)
            wait_until(lambda: not cache.is_connected, what="the hang is noticed")
            daemon.send(signal.SIGCONT)
    assert wrongs.found == []


# --- draining ---------------------------------------------------------------------------


def test_a_drained_daemon_lets_what_is_under_way_finish_and_takes_nothing_new(start_daemon):
    daemon = start_daemon({"server.drain_timeout": "5min"})
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        with space.reserve(DIGESTS) as vacancies:
            daemon.send(signal.SIGTERM)
            wait_until(lambda: client.stats().state == "draining")
            with pytest.raises(UnavailableError):
                daemon.connect()
            with pytest.raises(DrainingError):
                space.store(make_digests(1, 5), sources_of(MANIFEST, make_digests(1, 5)))
            with pytest.raises(DrainingError):
                client.attach(make_manifest())
            assert daemon.is_running
            for vacancy, source in zip(vacancies, sources_of(MANIFEST, DIGESTS), strict=True):
                vacancy.fill(source)
        wait_until(lambda: not daemon.is_running, what="the daemon ends")
    assert daemon.stop() == 0
    assert not daemon.socket.exists()


def test_a_drained_daemon_does_not_wait_beyond_its_timeout(start_daemon):
    daemon = start_daemon({"server.drain_timeout": "0.1s"})
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        space.store(DIGESTS, sources_of(MANIFEST, DIGESTS))
        with space.load(DIGESTS):
            assert daemon.stop() == 0
        with pytest.raises(UnavailableError):
            client.ping()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_ends_at_once_and_cleanly(daemon, number):
    assert daemon.end(number) == 0
    assert "Traceback" not in daemon.log()
