"""What the directory is told of this host: all that is held and nothing else, in the end."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import msgspec
import pytest

from kvstore.config import load
from kvstore.daemon import peer_endpoint, peer_sharing
from kvstore.daemon.peer_doctor import examine_peers
from kvstore.daemon.peer_endpoint import PeerEndpoint
from kvstore.daemon.peer_share_setup import check_sharing, open_peer_tier
from kvstore.daemon.peer_sharing import Sharing, Turns, held_shards
from kvstore.errors import ConfigError, TierError
from kvstore.limits import (
    DIRECTORY_BATCH_CHUNKS,
    DIRECTORY_BEAT_SECONDS,
    KIB,
    MIB,
    PEER_SPARE_SENDS_MAX,
    PEER_TURN_SECONDS,
)
from kvstore.protocol import peering as p
from kvstore.types import HeadRange, SessionId, TierKind
from tests.support.hosts import token_file
from tests.support.liars import Liar, right
from tests.support.making import make_digests, make_manifest, opaque_manifest
from tests.support.stores import Engine, make_store
from tests.support.virtual import run

MANIFEST = make_manifest()


class Told:
    """A directory in memory that forgets when it is told to, and can be away."""

    def __init__(self) -> None:
        self.held: dict[object, set[object]] = {}
        self.calls: list[str] = []
        self.is_away = False
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def _called(self, what: str) -> None:
        self.calls.append(what)
        if self.is_away:
            raise TierError("directory: no answer in time")

    async def change(self, namespace, name, came, went) -> int:
        await asyncio.sleep(0)
        self._called("change")
        assert len(came) + len(went) <= DIRECTORY_BATCH_CHUNKS
        here = self.held.setdefault(namespace, set())
        before = len(here)
        here.update(came)
        here.difference_update(went)
        return len(here) - before

    async def renew(self, namespaces, name) -> list[int]:
        self._called("renew")
        return [len(self.held.get(namespace, ())) for namespace in namespaces]

    async def withdraw(self, namespaces, name) -> None:
        self._called("withdraw")
        for namespace in namespaces:
            self.held.pop(namespace, None)


@contextlib.asynccontextmanager
async def told_by(store):
    """Tell a directory of *store* inside the block, and that it holds nothing behind it."""
    directory = Told()
    sharing = Sharing(store, directory, "here", asyncio.get_running_loop().time)
    task = asyncio.create_task(sharing.run())
    try:
        yield directory
        task.cancel()
        await asyncio.wait([task])
        directory.is_away = False
        await sharing.close()
        assert not any(directory.held.values())
        assert store.room.on_change is None
    finally:
        task.cancel()
        store.host.close()


@pytest.mark.parametrize("is_own", [False, True])
def test_a_directory_is_closed_by_whose_it_is(is_own):
    async def main() -> None:
        store, directory = make_store(), Told()
        sharing = Sharing(store, directory, "here", lambda: 0.0, owns_directory=is_own)
        directory.is_away = True
        await sharing.close()
        assert directory.is_closed == is_own
        store.host.close()

    run(main())


async def beats(count: int) -> None:
    await asyncio.sleep(count * DIRECTORY_BEAT_SECONDS + 1)


def test_what_comes_and_leaves_is_told_and_what_was_there_before():
    async def main() -> None:
        store = make_store()
        engine = Engine(store, MANIFEST)
        before, after = make_digests(3), make_digests(4, 1)
        engine.put(before)
        async with told_by(store) as directory:
            await asyncio.sleep(1)
            assert directory.held == {engine.space.id: set(before)}
            engine.put(after)
            store.delete(engine.space, before)
            # Half a chunk is none.
            engine.put(make_digests(1, 2), heads=HeadRange(0, 2))
            await asyncio.sleep(1)
            assert directory.held == {engine.space.id: set(after)}

    run(main())


def test_many_chunks_take_few_calls():
    async def main() -> None:
        manifest = opaque_manifest(KIB)
        store = make_store(capacity_bytes=16 * MIB)
        engine = Engine(store, manifest)
        async with told_by(store) as directory:
            await asyncio.sleep(1)
            digests = make_digests(2 * DIRECTORY_BATCH_CHUNKS)
            engine.put(digests)
            await asyncio.sleep(1)
            assert directory.held == {engine.space.id: set(digests)}
            assert directory.calls.count("change") == 2
            directory.calls.clear()
            await beats(3)
            assert directory.calls == ["renew"] * 3

    run(main())


def test_a_directory_that_has_lost_or_missed_something_is_told_all_anew():
    async def main() -> None:
        store = make_store()
        engine = Engine(store, MANIFEST)
        async with told_by(store) as directory:
            digests = make_digests(8)
            engine.put(digests[:2])
            await asyncio.sleep(1)
            directory.held.clear()
            engine.put(digests[2:4], parent=digests[1])
            await beats(1)
            assert directory.held == {engine.space.id: set(digests[:4])}
            # What others have put there goes, too.
            directory.held[engine.space.id].update(make_digests(3, 9))
            await beats(1)
            assert directory.held == {engine.space.id: set(digests[:4])}
            directory.is_away = True
            engine.put(digests[4:], parent=digests[3])
            store.delete(engine.space, digests[:1])
            await beats(2)
            assert store.counters.directory_failures >= 2
            directory.is_away = False
            await beats(2)
            assert directory.held == {engine.space.id: set(digests[1:])}

    run(main())


def test_more_news_than_are_remembered_are_told_as_a_whole(monkeypatch):
    monkeypatch.setattr(peer_sharing, "DIRECTORY_NEWS_MAX", 3)

    async def main() -> None:
        store = make_store()
        engine = Engine(store, MANIFEST)
        async with told_by(store) as directory:
            await asyncio.sleep(1)
            for prompt in range(2):
                engine.put(make_digests(8, prompt))
                await asyncio.sleep(1)
            expected = {*make_digests(8, 0), *make_digests(8, 1)}
            assert directory.held == {engine.space.id: expected}

    run(main())


def test_a_namespace_that_has_emptied_is_told_of_no_more():
    async def main() -> None:
        store = make_store()
        engine = Engine(store, MANIFEST)
        async with told_by(store) as directory:
            engine.put(make_digests(2))
            await asyncio.sleep(1)
            store.delete(engine.space, make_digests(2))
            await beats(2)
            directory.calls.clear()
            engine.put(make_digests(3))
            await asyncio.sleep(1)
            assert directory.held[engine.space.id] == set(make_digests(3))
            assert "withdraw" in directory.calls, "it had been left out, and is told as a whole"

    run(main())


def test_only_whole_chunks_in_the_host_tier_are_held():
    store = make_store()
    engine = Engine(store, MANIFEST)
    (digest,) = make_digests(1)
    assert held_shards(store, engine.space, digest) == []
    engine.put([digest], heads=HeadRange(0, 2))
    assert held_shards(store, engine.space, digest) == []
    engine.put([digest], heads=HeadRange(2, 4))
    assert [s.heads for s in held_shards(store, engine.space, digest)] == [(0, 2), (2, 4)]
    store.host.close()


def test_turns_are_bounded_and_yield_to_loads_of_this_host():
    async def main() -> None:
        lanes = {kind: SimpleNamespace(is_loading=False) for kind in (TierKind.DISK, TierKind.PEER)}
        routes = {k: SimpleNamespace(kind=k, lane=lane) for k, lane in lanes.items()}
        turns = Turns(SimpleNamespace(routes=routes))
        assert all([await turns.take() for _ in range(PEER_SPARE_SENDS_MAX)])
        began_at = asyncio.get_running_loop().time()
        assert not await turns.take()
        assert asyncio.get_running_loop().time() - began_at <= 2 * PEER_TURN_SECONDS
        for _ in range(PEER_SPARE_SENDS_MAX - 1):
            turns.give()
        lanes[TierKind.PEER].is_loading = True
        assert await turns.take(), "those that we wait for wait for us"
        lanes[TierKind.DISK].is_loading = True
        assert not await turns.take()
        turns.give()
        turns.give()
        assert await turns.take(), "one goes on under loads without end"

    run(main())


def test_what_is_wanted_together_is_one_turn_unless_loads_wait_here(monkeypatch):
    async def main() -> None:
        store = make_store()
        lanes = {kind: SimpleNamespace(is_loading=False) for kind in (TierKind.DISK, TierKind.PEER)}
        routes = {k: SimpleNamespace(kind=k, lane=lane) for k, lane in lanes.items()}
        server = SimpleNamespace(
            store=store, loop=asyncio.get_running_loop(), mover=SimpleNamespace(routes=routes)
        )
        endpoint = PeerEndpoint(server, None, name="here", token=b"", tls=None, shares=True)
        engine, digests = Engine(store, MANIFEST), make_digests(4)
        engine.put(digests)
        wants = []
        for digest in [*digests, *make_digests(1, 1)]:
            shards = held_shards(store, engine.space, digest) or held_shards(
                store, engine.space, digests[0]
            )
            offered = p.OfferedShard(*shards[0].heads, shards[0].size_bytes, shards[0].root)
            wants.append(p.Want(engine.space.id, digest, offered, spare=True))
        session = SessionId(7)
        for is_loading, turns in ((False, [True, False, False, False]), (True, [True])):
            lanes[TierKind.DISK].is_loading = is_loading
            begun = await endpoint._begin_some(wants, session)
            assert [ready.has_turn for ready in begun] == turns
            # Others have no turn meanwhile, if it is the only one.
            lanes[TierKind.DISK].is_loading = True
            assert await endpoint._begin_some(wants[:1], session) == [p.Busy()]
            endpoint._end_some(session, begun, 0)
        lanes[TierKind.DISK].is_loading = False
        # A turn goes as far as its bytes.
        monkeypatch.setattr(peer_endpoint, "PEER_TURN_BYTES", 2 * MANIFEST.chunk_bytes)
        begun = await endpoint._begin_some(wants, session)
        assert [ready.has_turn for ready in begun] == [True, False]
        endpoint._end_some(session, begun, 0)
        # What is not here, and what is no tier's, is nothing that follows.
        mixed = [wants[4], wants[0]]
        assert await endpoint._begin_some(mixed, session) == [p.Gone()]
        for_handoff = msgspec.structs.replace(wants[1], spare=False)
        begun = await endpoint._begin_some([wants[0], for_handoff], session)
        assert len(begun) == 1
        endpoint._end_some(session, begun, 0)
        assert len(store.leases) == 0
        store.host.close()

    run(main())


REDIS = "tiers.redis.url=redis://127.0.0.1:1"
REFUSED = {
    "needs tiers.redis.url": ["peer.listen=127.0.0.1:0"],
    "needs peer.listen, to be asked, or a table": [REDIS],
    "needs tiers.host.checksum": [REDIS, "peer.listen=127.0.0.1:0", "tiers.host.checksum=off"],
    "peers.me has the name of this daemon": [
        *(REDIS, "peer.name=me", "peers.me.url=tcp://127.0.0.1:1")
    ],
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_sharing_lacks_is_said_before_anything_is_served(why):
    config = load(None, {}, ["peer.share=true", *REFUSED[why]])
    with pytest.raises(ConfigError, match=why):
        check_sharing(config)
    with pytest.raises(ConfigError, match=why):
        open_peer_tier(config)


@contextlib.contextmanager
def liar(**fields):
    """A peer that calls itself prefill."""
    running = Liar([], right, **fields)
    try:
        yield running.port
    finally:
        running.close()


def test_the_doctor_calls_every_peer_and_names_what_is_wrong(tmp_path):
    token = token_file(tmp_path)
    with liar() as good, liar(version=1) as old, liar(token="another token, longer") as strange:
        ports = {"prefill": good, "renamed": good, "old": old, "strange": strange, "gone": 1}
        words = [f"peers.{name}.url=tcp://127.0.0.1:{port}" for name, port in ports.items()]
        words += [REDIS, f"peer.token_file={token}", "peer.name=me"]
        findings = examine_peers(load(None, {}, [*words, "peer.share=true"]))
        found = {one.check: one for one in findings}
        assert found["sharing"].found == "asks peers, and is not asked (no peer.listen)"
        assert found["peer prefill"].verdict == "ok"
        assert found["peer renamed"].fix.startswith("call its table peers.prefill, or set")
        assert "does not know the token" in found["peer strange"].found
        assert "Connection refused" in found["peer gone"].found
        others = examine_peers(load(None, {}, words))
        assert {one.check for one in others} == {*found} - {"sharing"}
        assert next(one for one in others if one.check == "peer renamed").verdict == "ok"
        assert found["peer old"].fix == "bring it up to date"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["peer.listen=127.0.0.1:0", REDIS], "is asked as me, and asks nobody"),
        (["peer.listen=127.0.0.1:0"], "peer.share needs tiers.redis.url"),
        (["peers.bare.url=tcp://127.0.0.1:1", REDIS], "asks peers, and is not asked"),
    ],
)
def test_the_doctor_says_what_sharing_comes_to(words, found):
    config = load(None, {}, ["peer.share=true", "peer.name=me", *words])
    sharing, *peers = examine_peers(config)
    assert found in sharing.found
    assert [one.verdict for one in peers] == ["fail"] * len(config.peers), "there is no token"


def test_without_sharing_there_is_no_tier():
    assert open_peer_tier(load(None, {}, [REDIS, "peers.far.url=tcp://127.0.0.1:1"])) is None
