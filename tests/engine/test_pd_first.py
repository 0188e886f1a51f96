"""The first token of an answer may be prefill's: when it is, and that nobody can tell."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web

from kvstore.connectors.pd_first import Events, FirstToken, may_split
from kvstore.connectors.pd_pools import EngineError
from kvstore.limits import PROXY_EVENT_MAX_BYTES
from tests.engine.pd_site import COMPLETIONS, EVENTS, PROMPT, SEEN, FakeEngine, Site, site
from tests.support.waiting import DEADLINE_SECONDS


def split_site(site: Site) -> tuple[FakeEngine, FakeEngine]:
    """Have the engines of *site* answer completions; decode only once prefill has."""
    prefill, decode = site.prefill[0], site.decode[0]
    prefill.answer = prefill.prefill_text

    async def stream(request: web.Request) -> web.StreamResponse:
        is_early = "early" in (decode.asked[-1].get("kv_transfer_params") or {})
        return await (decode.load(request) if is_early else decode.stream_text(request))

    decode.answer = stream
    return prefill, decode


def refuse_behind_load(decode: FakeEngine, status: int) -> None:
    """Have *decode* load what it is first asked for, and answer *status* to all behind it."""

    async def load_then_refuse(request: web.Request) -> web.StreamResponse:
        if len(decode.asked) == 1:
            return await decode.load(request)
        return web.Response(status=status)

    decode.answer = load_then_refuse


@pytest.mark.parametrize("in_turn", [False, True])
async def test_the_first_token_is_prefills_and_decode_goes_on_behind_it(in_turn):
    async with site(in_turn=in_turn) as made:
        prefill, decode = split_site(made)
        status, events = await made.complete(stream_options={"include_usage": True})
        if not in_turn:
            # What was only to load has ended, before the engine does.
            await asyncio.wait_for(decode.cancelled.get(), DEADLINE_SECONDS)
    assert status == 200
    texts = [choice["text"] for event in events for choice in event["choices"]]
    assert texts == ["one", " two", " thr\u00e9e", " four"]
    ends = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert ends == [None, None, None, "stop"]
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    usage = {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    assert events[-1]["usage"] == usage
    (asked,) = prefill.asked
    assert (asked["stream"], asked["max_tokens"]) == (False, 1)
    rest = decode.asked[-1]
    assert (rest["prompt"], rest["max_tokens"], rest["stream"]) == ([7, 8, 9], 4, True)
    assert "seed" not in rest
    if in_turn:
        assert [rest["kv_transfer_params"]] == [{"transfer_id": "n"}]
        assert len(decode.asked) == 1
    else:
        loading = decode.asked[0]
        # Should decode have to draw the first token after all, it draws the same.
        assert loading["seed"] == asked["seed"]
        assert loading["kv_transfer_params"]["early"]
        assert "kv_transfer_params" not in rest
        assert len({headers["X-Request-Id"] for headers in decode.headers}) == 2


async def test_the_client_reads_the_first_token_while_decode_still_loads():
    async with site() as made:
        _, decode = split_site(made)
        async with made.client.post(COMPLETIONS, json=PROMPT) as answer:
            first = await answer.content.readuntil(b"\n\n")
            assert json.loads(first.removeprefix(b"data: "))["choices"] == [SEEN]
            assert len(decode.asked) == 1
            decode.loaded.set()
            rest = await answer.read()
        assert rest.endswith(EVENTS[-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": False},
        {"prompt": ["x", "y"]},
        {"prompt": ""},
        {"max_tokens": 1},
        {"seed": 0},
        {"logprobs": 0},
        {"stop": ["x"]},
        {"n": 2},
        {"presence_penalty": 0.5},
        {"min_tokens": 2},
        {"stream_options": {"continuous_usage_stats": True}},
        {"a field of later versions": 1},
    ],
)
def test_what_one_engine_alone_does_right_it_does_alone(changes):
    assert not may_split(COMPLETIONS, PROMPT | changes)


def test_what_asks_for_nothing_stands_in_nobodys_way():
    for changes in ({"n": 1, "echo": False, "seed": None, "stop": []}, {"prompt": [1, 2]}):
        assert may_split(COMPLETIONS, PROMPT | changes)
    assert not may_split("/v1/chat/completions", PROMPT)


@pytest.mark.parametrize(
    ("asked", "left"), [({"max_tokens": 3}, 2), ({}, 15), ({"max_tokens": None}, None)]
)
def test_decode_is_asked_for_one_token_less_of_however_many(asked, left):
    token = FirstToken({}, "one", [7, 8], 9)
    assert token.rest_of(asked)["max_tokens"] == left


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize(
    "differs",
    [{"finish_reason": "stop"}, {"text": ""}, {"text": "\ufffd"}, {"token_ids": None}],
)
async def test_a_token_that_cannot_be_shown_by_itself_is_drawn_again(differs, in_turn):
    async with site(in_turn=in_turn) as made:
        prefill, decode = split_site(made)
        prefill.differs, decode.answer = differs, decode.stream_text
        status, events = await made.complete()
        (asked,) = decode.asked
    assert (status, asked["prompt"]) == (200, "x y")
    assert asked["seed"] == prefill.asked[0]["seed"]
    assert events[0]["choices"][0]["text"] == " two"


@pytest.mark.parametrize("in_turn", [False, True])
async def test_what_decode_refuses_the_client_hears_before_any_token(in_turn):
    async with site(in_turn=in_turn) as made:
        _, decode = split_site(made)
        decode.status = 400
        assert await made.complete() == (400, [{"error": {"message": "its own words"}}])
        assert decode.asked[-1]["prompt"] == PROMPT["prompt"]


async def test_a_decode_engine_that_fails_behind_the_first_token_is_replaced():
    async with site(1, 2) as made:
        _, decode = split_site(made)
        refuse_behind_load(decode, 500)
        made.decode[1].answer = made.decode[1].stream_text
        status, events = await made.complete()
        assert status == 200
        assert len(events) == 5


def test_an_event_that_never_ends_is_no_event():
    events = Events()
    assert list(events.of(b"data: 1\n\ndata")) == [b"data: 1\n\n"]
    with pytest.raises(EngineError, match="more than"):
        list(events.of(bytes(PROXY_EVENT_MAX_BYTES)))


@pytest.mark.parametrize("usage", [False, True])
async def test_an_answer_that_has_room_for_one_token_ends_with_it(usage):
    async with site() as made:
        _, decode = split_site(made)
        refuse_behind_load(decode, 400)
        status, events = await made.complete(stream_options={"include_usage": usage})
    assert status == 200
    choices = [choice for event in events for choice in event["choices"]]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [
        ("one", None),
        ("", "length"),
    ]
    counted = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    assert [event.get("usage") for event in events[2:]] == ([counted] if usage else [])


@pytest.mark.parametrize("status", [401, 500])
async def test_without_a_rest_half_an_answer_is_none(status):
    async with site() as made:
        _, decode = split_site(made)
        refuse_behind_load(decode, status)
        with pytest.raises(aiohttp.ClientError):
            await made.complete()
