"""The proxy between prefill and decode engines, with engines that say what the test wants."""

from __future__ import annotations

import argparse
import asyncio
import json

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.connectors import pd_proxy
from kvstore.connectors.pd_pools import EngineURL, Pool, decode_body, parse_engine, prefill_body
from kvstore.connectors.pd_proxy import Proxy
from kvstore.errors import ConfigError
from tests.engine.pd_site import CHAT, COMPLETIONS, EVENTS, PROMPT, engine, site


async def test_in_turn_what_prefill_answers_is_given_to_decode_as_it_is():
    async with site(in_turn=True) as made:
        body = CHAT | {"max_tokens": 50, "stream_options": {"include_usage": True}, "min_tokens": 3}
        status, answer = await made.ask(body, Authorization="Bearer x")
        assert (status, answer) == (200, b"".join(EVENTS))
        (asked,), (answering,) = made.prefill[0].asked, made.decode[0].asked
    assert (asked["stream"], asked["max_tokens"]) == (False, 1)
    assert not {"stream_options", "min_tokens", "max_completion_tokens"} & set(asked)
    assert asked["kv_transfer_params"]["do_remote_decode"] is True
    given = {"transfer_id": "n1", "do_remote_prefill": True, "more": [1]}
    assert answering == body | {"kv_transfer_params": given}
    first, second = made.prefill[0].headers[0], made.decode[0].headers[0]
    assert first["X-Request-Id"] == second["X-Request-Id"]
    assert first["Authorization"] == second["Authorization"] == "Bearer x"


async def test_both_begin_at_once_with_one_name_that_nobody_can_guess():
    async with site(peers=("host-a",)) as made:
        made.prefill[0].answer = made.prefill[0].hang
        for _ in range(2):
            assert await made.ask() == (200, b"".join(EVENTS))
        names = [asked["kv_transfer_params"]["transfer_id"] for asked in made.prefill[0].asked]
        given = [asked["kv_transfer_params"] for asked in made.decode[0].asked]
        # What decode has no more use for is not computed to its end.
        for _ in range(2):
            await made.prefill[0].cancelled.get()
    assert len(set(names)) == 2
    assert min(map(len, names)) > 30
    assert [params["transfer_id"] for params in given] == names
    assert {params["remote_host"] for params in given} == {"host-a"}
    assert all(params["early"] and params["do_remote_prefill"] for params in given)


async def test_where_prefill_hands_nothing_over_decode_does_not_wait_for_it():
    async with site() as made:
        prefill, decode = made.prefill[0], made.decode[0]

        async def hands_nothing_over(_: web.Request) -> web.StreamResponse:
            await decode.begun.wait()
            return web.json_response({"kv_transfer_params": None, "choices": []})

        async def wait_for_prefill(request: web.Request) -> web.StreamResponse:
            waits = "kv_transfer_params" in decode.asked[-1]
            return await (decode.hang(request) if waits else decode.stream(request))

        prefill.answer, decode.answer = hands_nothing_over, wait_for_prefill
        assert await made.ask() == (200, b"".join(EVENTS))
        assert decode.asked[-1] == CHAT
        assert len(prefill.asked) == 1


async def test_a_prefill_engine_that_says_nothing_is_left_out():
    async with site(prefill_seconds=1.0) as made:
        prefill, decode = made.prefill[0], made.decode[0]
        prefill.answer = prefill.hang

        async def wait_for_prefill(request: web.Request) -> web.StreamResponse:
            waits = "kv_transfer_params" in decode.asked[-1]
            return await (decode.hang(request) if waits else decode.stream(request))

        decode.answer = wait_for_prefill
        for _ in range(3):
            assert await made.ask() == (200, b"".join(EVENTS))
        assert len(prefill.asked) == 1


async def test_more_requests_than_are_answered_at_a_time_are_refused():
    async with site(requests_max=1) as made:
        decode = made.decode[0]
        decode.answer = decode.hang
        asking = asyncio.ensure_future(made.ask())
        await decode.begun.wait()
        async with made.client.post(COMPLETIONS, json=PROMPT) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert (await answer.json())["error"]["type"] == "overloaded"
        asking.cancel()
        await asyncio.wait((asking,))


async def test_requests_are_spread_over_all_engines():
    async with site(3, 2) as made:
        await asyncio.gather(*(made.ask() for _ in range(12)))
        assert [len(fake.asked) for fake in made.prefill] == [4, 4, 4]
        assert [len(fake.asked) for fake in made.decode] == [6, 6]


@pytest.mark.parametrize("in_turn", [True, False])
async def test_an_engine_that_fails_is_replaced_and_then_left_out(in_turn):
    async with site(2, 2, in_turn=in_turn) as made:
        made.prefill[0].status = made.decode[0].status = 500

        async def once_prefill_has_begun(request: web.Request) -> web.StreamResponse:
            await made.prefill[1].begun.wait()
            return await made.decode[1].stream(request)

        made.decode[1].answer = once_prefill_has_begun
        assert await made.ask() == (200, b"".join(EVENTS))
        before = len(made.prefill[0].asked), len(made.decode[0].asked)
        for _ in range(4):
            assert (await made.ask())[0] == 200
        assert (len(made.prefill[0].asked), len(made.decode[0].asked)) == before


@pytest.mark.parametrize("in_turn", [True, False])
async def test_without_prefill_a_decode_engine_computes_all(in_turn):
    async with site(2, 1, in_turn=in_turn) as made:
        for fake in made.prefill:
            fake.status = 503
        decode = made.decode[0]

        async def wait_for_prefill(request: web.Request) -> web.StreamResponse:
            waits = "kv_transfer_params" in decode.asked[-1]
            return await (decode.hang(request) if waits else decode.stream(request))

        decode.answer = wait_for_prefill
        assert await made.ask() == (200, b"".join(EVENTS))
        assert decode.asked[-1] == CHAT


async def test_without_decode_the_error_says_so():
    async with site(1, 2) as made:
        for fake in made.decode:
            fake.status = 500
        status, answer = await made.ask()
    assert status == 503
    assert "no decode engine answers" in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
async def test_what_an_engine_refuses_the_client_reads_in_its_words(kind, in_turn):
    async with site(2, 2, in_turn=in_turn) as made:
        refusing = made.prefill if kind == "prefill" else made.decode
        for fake in refusing:
            fake.status = 422
        if kind == "prefill":
            for fake in made.decode:
                fake.answer = fake.hang
        status, answer = await made.ask()
    assert (status, json.loads(answer)) == (422, {"error": {"message": "its own words"}})


async def test_models_are_those_of_a_decode_engine_that_answers():
    async with site(1, 2) as made:
        made.decode[0].status = 500
        keys = {"Authorization": "Bearer x"}
        async with made.client.get("/v1/models", headers=keys) as answer:
            assert answer.status == 200
            assert "url" in await answer.json()
        async with made.client.get("/v1/models") as answer:
            assert answer.status == 401
        made.decode[1].status = 503
        async with made.client.get("/v1/models", headers=keys) as answer:
            assert answer.status == 503
            assert "no decode engine" in (await answer.json())["error"]["message"]


@pytest.mark.parametrize("raw", [b"", b"no JSON", b"[1, 2]", b"[" * 100_000])
async def test_a_body_that_is_no_object_is_refused(raw):
    async with site() as made, made.client.post("/v1/completions", data=raw) as answer:
        assert answer.status == 400
        assert "no JSON object" in (await answer.json())["error"]["message"]
    assert made.prefill[0].asked == []


async def test_a_client_that_leaves_takes_its_request_along():
    async with engine(is_prefill=True) as (_, first), engine(is_prefill=False) as (fake, second):
        fake.answer = fake.hang
        app = Proxy([first], [second]).app()
        async with TestServer(app, handler_cancellation=True) as server:
            async with aiohttp.ClientSession() as session:
                url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
                asking = asyncio.ensure_future(session.post(url, json=CHAT))
                await fake.begun.wait()
                asking.cancel()
                await asyncio.wait((asking,))
            await fake.cancelled.get()


async def test_half_an_answer_is_no_answer():
    async with site() as made:

        async def breaks_off(request: web.Request) -> web.StreamResponse:
            answer = web.StreamResponse()
            await answer.prepare(request)
            await answer.write(EVENTS[0])
            assert request.transport is not None
            request.transport.abort()
            return answer

        made.decode[0].answer = breaks_off
        with pytest.raises(aiohttp.ClientError):
            await made.ask()


async def test_health_says_which_engines_answer():
    async with site(2, 2) as made:
        made.prefill[1].status = made.decode[0].status = 500
        async with made.client.get("/health") as answer:
            assert answer.status == 200
            found = await answer.json()
        assert found["ready"]
        assert list(found["engines"]["prefill"].values()) == [True, False]
        assert list(found["engines"]["decode"].values()) == [False, True]
        made.decode[1].status = 500
        async with made.client.get("/health") as answer:
            assert (answer.status, (await answer.json())["ready"]) == (503, False)


def test_a_pool_takes_turns_and_asks_last_who_has_failed():
    now = [0.0]
    a, b, c = (EngineURL(f"http://{name}") for name in "abc")
    pool = Pool([a, b, c, a], clock=lambda: now[0])
    assert [pool.in_order() for _ in range(2)] == [[a, b, c], [b, c, a]]
    pool.rest(b, OSError("away"))
    assert [pool.in_order()[-1] for _ in range(3)] == [b, b, b]
    now[0] = 60.0
    assert [pool.in_order()[0] for _ in range(3)] == [c, a, b]
    pool.rest(c, TimeoutError(), is_silent=True)
    assert sorted(pool.in_order()) == [a, b]
    now[0] = 200.0
    assert sorted(pool.in_order()) == [a, b, c]


def test_bodies_keep_what_the_client_asks():
    body = {"prompt": "x", "max_completion_tokens": 9, "kv_transfer_params": {"forged": True}}
    asked = prefill_body(body, "name")
    assert (asked["max_tokens"], asked["max_completion_tokens"], asked["prompt"]) == (1, 1, "x")
    assert asked["kv_transfer_params"]["transfer_id"] == "name"
    assert "forged" not in asked["kv_transfer_params"]
    assert decode_body(body, None) == {"prompt": "x", "max_completion_tokens": 9}


def test_addresses_of_engines():
    assert parse_engine("http://h:1/base/#peer-b") == ("http://h:1/base", "peer-b")
    for text in ("h:1", "ftp://h", "http://", f"http://h#{'x' * 300}"):
        with pytest.raises(ConfigError):
            parse_engine(text)
    assert pd_proxy._address("[::1]:80") == ("::1", 80)
    for text in ("80", "h:x", "h:99999", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            pd_proxy._address(text)
    with pytest.raises(SystemExit):
        pd_proxy.main(["--prefill", "nonsense", "--decode", "http://h"])
    for text in ("0", "-1", "inf", "nan", "x"):
        with pytest.raises(SystemExit):
            pd_proxy.main(
                ["--prefill", "http://h", "--decode", "http://h", "--prefill-timeout", text]
            )
