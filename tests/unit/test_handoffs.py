"""Hand-offs over a real store: when chunks are ready, what is held, and that nothing is left."""

from __future__ import annotations

import pytest

from kvstore.errors import HandoffError, LimitError, RequestError
from kvstore.limits import HANDOFF_CHUNKS_MAX
from kvstore.store import handoffs as module
from kvstore.store.handoffs import HandoffKey, Handoffs
from kvstore.types import HandoffState, HeadRange, SessionId
from tests.support.making import make_digests, make_manifest
from tests.support.stores import Engine, chunks_that_fit, make_store

MANIFEST = make_manifest()
DIGESTS = make_digests(6)
TTL = 10.0


class Desk:
    """A producer and a consumer of one store, and the hand-off *key* between them."""

    def __init__(self) -> None:
        self.store = make_store()
        self.handoffs = Handoffs(self.store)
        self.engine = Engine(self.store, MANIFEST)
        self.owner, self.consumer = self.engine.session, SessionId(2)
        self.key = HandoffKey(0, self.engine.space.id, "one")
        self.news = 0

    def open(self, **how):
        how = {"consumers": 1, "ttl_seconds": TTL} | how
        self.handoffs.open(self.owner, self.key, self.engine.space, 0.0, **how)

    def publish(self, first, digests):
        return self.handoffs.publish(self.owner, self.key, first, digests, 0.0)

    def put(self, *numbers):
        for number in numbers:
            self.engine.put(
                DIGESTS[number : number + 1], parent=DIGESTS[number - 1] if number else None
            )

    def standing(self, first=0, now=0.0):
        return self.handoffs.standing(self.key, first, now)

    def close(self, payload=b"", now=0.0):
        return self.handoffs.close(self.owner, self.key, payload, now)

    def check(self):
        self.store.check()
        self.handoffs.check()


@pytest.fixture
def desk():
    made = Desk()
    yield made
    made.check()
    made.store.host.close()


def test_a_chunk_is_ready_once_it_is_published_and_committed_in_either_order(desk):
    desk.open()
    desk.put(0)
    desk.publish(0, DIGESTS[:2])
    assert desk.standing().digests == DIGESTS[:1]
    desk.put(1, 2)
    assert desk.standing(1).digests == DIGESTS[1:2]
    desk.publish(2, DIGESTS[2:3])
    ready = desk.standing(2)
    assert (ready.digests, ready.is_last, ready.published) == (DIGESTS[2:3], False, 3)


def test_chunks_are_ready_in_order_alone(desk):
    desk.open()
    desk.publish(0, DIGESTS[:3])
    desk.put(0, 2)
    assert desk.standing().digests == DIGESTS[:1]
    desk.put(1)
    assert desk.standing().digests == DIGESTS[:3]


def test_a_chunk_is_ready_only_with_all_its_heads(desk):
    desk.open()
    desk.publish(0, DIGESTS[:1])
    desk.engine.put(DIGESTS[:1], heads=HeadRange(0, 2))
    assert desk.standing().digests == []
    desk.engine.put(DIGESTS[:1], heads=HeadRange(2, 4))
    assert desk.standing().digests == DIGESTS[:1]


def test_all_who_wait_hear_of_a_start_of_each_chunk_and_of_the_end(desk):
    news = []
    desk.handoffs.wait(desk.key, lambda: news.append(desk.standing().state))
    desk.open()
    desk.publish(0, DIGESTS[:1])
    before = len(news)
    desk.put(0)
    assert len(news) == before + 1
    desk.close()
    assert news[-1] is HandoffState.CLOSED


def test_all_who_wait_hear_of_a_chunk_that_was_stored_before_it_is_published(desk):
    desk.open()
    desk.put(0, 1)
    heard = []
    desk.handoffs.wait(desk.key, lambda: heard.append(list(desk.standing().digests)))
    desk.publish(0, DIGESTS[:2])
    assert heard[-1] == DIGESTS[:2]


def test_a_closed_one_gives_its_payload_with_the_last_chunk(desk):
    desk.open()
    desk.put(0, 1)
    desk.publish(0, DIGESTS[:2])
    desk.close(b"token 7")
    ready = desk.standing()
    assert (ready.digests, ready.is_last, ready.payload) == (DIGESTS[:2], True, b"token 7")


def test_what_was_published_and_never_stored_ends_a_closed_one_where_it_is_missing(desk):
    desk.open()
    desk.publish(0, DIGESTS[:3])
    desk.put(0)
    places = desk.engine.reserve(DIGESTS[1:2], parent=DIGESTS[0])
    desk.close()
    assert not desk.standing().is_last, "chunk 1 is being written"
    desk.engine.commit(DIGESTS[1], places[0])
    ready = desk.standing()
    assert (ready.digests, ready.is_last, ready.published) == (DIGESTS[:2], True, 3)


def test_a_second_producer_is_refused_while_it_is_open_and_ever_after(desk):
    desk.open()
    with pytest.raises(HandoffError, match="open while it is open"):
        desk.open()
    desk.handoffs.leave(desk.consumer, desk.key, 0.0)
    desk.close()
    assert desk.standing().state is HandoffState.TAKEN
    with pytest.raises(HandoffError, match="open while it is taken"):
        desk.open()


def test_only_its_own_session_publishes_and_closes(desk):
    desk.open()
    for act in (
        lambda: desk.handoffs.publish(SessionId(9), desk.key, 0, DIGESTS[:1], 0.0),
        lambda: desk.handoffs.close(SessionId(9), desk.key, b"", 0.0),
        lambda: desk.handoffs.abort(SessionId(9), desk.key, 0.0),
    ):
        with pytest.raises(HandoffError, match="opened by another session"):
            act()
    assert desk.standing().state is HandoffState.OPEN


@pytest.mark.parametrize(
    "other", [{"tenant": 1}, {"namespace": bytes(16)}, {"name": "two"}, {"peer": "elsewhere"}]
)
def test_another_tenants_or_namespaces_name_is_unknown(desk, other):
    desk.open()
    key = desk.key._replace(**other)
    assert not desk.handoffs.is_known(key)
    assert desk.handoffs.standing(key, 0, 0.0) == module.UNKNOWN
    with pytest.raises(HandoffError, match="unknown"):
        desk.handoffs.publish(desk.owner, key, 0, DIGESTS[:1], 0.0)


def test_publishing_again_is_fine_and_gaps_and_others_are_refused(desk):
    desk.open()
    assert desk.publish(0, DIGESTS[:2]) == 2
    assert desk.publish(1, DIGESTS[1:4]) == 4
    with pytest.raises(RequestError, match="chunk 5 published behind 4"):
        desk.publish(5, DIGESTS[5:])
    with pytest.raises(HandoffError, match="other chunks"):
        desk.publish(0, DIGESTS[1:3])
    with pytest.raises(LimitError, match=f"more than {HANDOFF_CHUNKS_MAX}"):
        desk.publish(0, DIGESTS[:4] + DIGESTS[:1] * (HANDOFF_CHUNKS_MAX - 3))


def test_chunks_stay_until_all_consumers_have_left(desk):
    desk.open(consumers=2)
    desk.put(0, 1)
    desk.publish(0, DIGESTS[:2])
    desk.close()
    assert desk.handoffs.held_chunks == 2
    assert desk.store.delete(desk.engine.space, DIGESTS[:2]) == (0, 2)
    desk.handoffs.leave(desk.consumer, desk.key, 0.0)
    desk.handoffs.leave(desk.consumer, desk.key, 0.0)
    assert desk.handoffs.held_chunks == 2, "the same consumer counts once"
    desk.handoffs.leave(SessionId(3), desk.key, 0.0)
    assert (desk.handoffs.held_chunks, desk.handoffs.open_count) == (0, 0)
    assert desk.store.delete(desk.engine.space, DIGESTS[:2]) == (2, 0)


def test_when_all_have_left_early_nothing_more_is_held(desk):
    desk.open()
    desk.put(0)
    desk.publish(0, DIGESTS[:2])
    desk.handoffs.leave(desk.consumer, desk.key, 0.0)
    desk.put(1)
    assert desk.handoffs.held_chunks == 0
    assert desk.standing(1).digests == DIGESTS[1:2]
    desk.close()
    assert desk.standing().state is HandoffState.TAKEN


def test_handoffs_never_hold_more_than_their_share_of_the_host_tier(desk):
    fit = chunks_that_fit(desk.store, MANIFEST)
    digests = make_digests(fit)
    desk.open()
    desk.engine.put(digests)
    desk.publish(0, digests)
    assert 0 < desk.handoffs.held_chunks <= (fit + 1) // 2
    assert len(desk.standing().digests) == fit
    more = make_digests(fit // 3, prompt=5)
    assert desk.engine.put(more).count(0) == len(more), "there is room for others"


@pytest.mark.parametrize("how", ["abort", "lost"])
def test_of_a_broken_one_what_is_ready_can_be_taken(desk, how):
    desk.open()
    desk.put(0)
    desk.publish(0, DIGESTS[:2])
    if how == "abort":
        desk.handoffs.abort(desk.owner, desk.key, 0.0)
    else:
        desk.store.end_session(desk.owner)
        desk.handoffs.end_session(desk.owner, 0.0)
    ready = desk.standing()
    assert (ready.state, ready.digests, ready.is_last) == (HandoffState.BROKEN, DIGESTS[:1], True)
    assert desk.handoffs.held_chunks == 1


def test_an_open_one_expires_when_its_producer_is_silent_whoever_asks(desk):
    desk.open()
    desk.put(0)
    desk.publish(0, DIGESTS[:1])
    assert desk.handoffs.expire(TTL - 0.1) == 0
    desk.standing(now=TTL - 0.1)
    assert desk.handoffs.expire(TTL) == 1
    assert desk.standing() == module.UNKNOWN._replace(state=HandoffState.EXPIRED)
    assert desk.handoffs.held_chunks == 0
    with pytest.raises(HandoffError, match="is expired"):
        desk.publish(1, DIGESTS[1:2])


def test_a_closed_one_lives_for_as_long_as_consumers_ask(desk):
    desk.open()
    desk.close()
    desk.standing(now=TTL - 1)
    assert desk.handoffs.expire(TTL) == 0
    assert desk.handoffs.expire(2 * TTL - 1) == 1


def test_there_are_never_more_than_the_limit_and_those_that_are_over_give_way(desk, monkeypatch):
    monkeypatch.setattr(module, "HANDOFFS_MAX", 2)
    desk.open()
    desk.key = desk.key._replace(name="two")
    desk.open()
    desk.key = desk.key._replace(name="three")
    with pytest.raises(LimitError, match="at most 2"):
        desk.open()
    desk.handoffs.abort(desk.owner, desk.key._replace(name="one"), 0.0)
    desk.handoffs.expire(TTL)
    desk.open()
    assert desk.standing().state is HandoffState.OPEN
