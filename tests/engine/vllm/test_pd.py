"""A prefill engine and a decode engine on two hosts, each with its daemon: what one has computed,
the other loads. (On one host: `test_pd_servers.py`.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvstore.types import HandoffState
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine, Output
from tests.support.daemon import Daemon
from tests.support.hosts import called, caller, free_port
from tests.support.waiting import wait_until

TOKENS = 8
# What proxies give a prefill engine; nothing of it is known to them.
PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


EARLY = {"do_remote_prefill": True, "remote_host": "prefill", "early": True}


class Pair:
    """Two engines, of which one only prefills and one only decodes, and the daemons of each."""

    def __init__(self, prefill: Engine, decode: Engine, here: Daemon, there: Daemon) -> None:
        self.prefill = prefill
        self.decode = decode
        self.here = here
        self.there = there

    def ask_prefill(self, prompt: list[int], **terms: object) -> dict[str, Any] | None:
        _, params = self.prefill.call("hand_over", prompt, PREFILL | terms, 1)
        return params

    def ask_decode(self, prompt: list[int], params: dict[str, Any] | None) -> Output:
        output, returned = self.decode.call("hand_over", prompt, params, TOKENS)
        assert returned is None
        return output

    def alone(self, prompt: list[int]) -> list[int]:
        """Return what one engine by itself makes of *prompt*."""
        (output,) = self.prefill.generate([prompt], tokens=TOKENS, salt="alone")
        return output.tokens

    @contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """Give what the decode engine has counted in the block, at its end."""
        before, found = self._counts(), {}
        yield found
        after = self._counts()
        found.update({name: after[name] - before[name] for name in after})

    def _counts(self) -> dict[str, int]:
        loaded, failed = self.decode.call("chunks_moved")
        with self.there.connect() as client:
            pulled = client.stats().counters["handoff_chunks_pulled"]
        moved = {"loaded": loaded, "failed": failed, "pulled": pulled}
        return self.decode.call("counts") | moved


@pytest.fixture(scope="module")
def pair(llama, tmp_path_factory) -> Iterator[Pair]:
    extra = {"chunk_tokens": 128, "handoff_timeout_seconds": 60}
    folder, port = tmp_path_factory.mktemp("hosts"), free_port()
    capacity = {"tiers.host.capacity": "256MiB"}
    with (
        called(folder / "prefill", port, capacity) as here,
        caller(folder / "decode", port, capacity) as there,
        Engine(
            llama, socket=here.socket, extra=extra, role="kv_producer", max_num_batched_tokens=256
        ) as prefill,
        Engine(llama, socket=there.socket, extra=extra, role="kv_consumer") as decode,
    ):
        yield Pair(prefill, decode, here, there)


def in_background(call: Callable[[], Any]) -> Callable[[], Any]:
    """Begin *call*; return what waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()

    def result() -> Any:
        thread.join()
        return results.pop()

    return result


def test_decode_loads_what_prefill_has_computed(pair):
    (prompt,) = models.prompts(1, 1100, seed=60)
    params = pair.ask_prefill(prompt)
    assert params["do_remote_prefill"]
    assert not params["do_remote_decode"]
    assert (params["remote_num_tokens"], params["remote_host"]) == (1100, "prefill")
    with pair.counted() as counts:
        output = pair.ask_decode(prompt, params)
    assert (counts["handoffs_taken"], counts["tokens_handed"]) == (1, 1024)
    assert (counts["loaded"], counts["failed"], counts["load_failures"]) == (8, 0, 0)
    assert counts["pulled"] == 8
    assert output.tokens == pair.alone(prompt)


@pytest.mark.parametrize("seed", [61, 62])
def test_decode_may_begin_before_prefill_does(seed, pair):
    (prompt,) = models.prompts(1, 2100, seed=seed)
    name = f"both-{seed}-{'0' * 20}"
    early = EARLY | {"transfer_id": name}
    with pair.counted() as counts:
        decoding = in_background(lambda: pair.ask_decode(prompt, early))
        assert pair.ask_prefill(prompt, transfer_id=name)["transfer_id"] == name
        output = decoding()
    assert (counts["handoffs_taken"], counts["tokens_handed"]) == (1, 2048)
    assert (counts["loaded"], counts["failed"], counts["load_failures"]) == (16, 0, 0)
    assert counts["pulled"] == 16
    assert output.tokens == pair.alone(prompt)


@pytest.mark.parametrize(
    "forged",
    [
        {"remote_host": "10.0.0.1:6666"},
        {"remote_host": "peer that nobody has configured"},
        {"transfer_id": "no such hand-off"},
        {"transfer_id": "x" * 4096},
        {"transfer_id": 7},
        {"remote_host": ["a"], "remote_num_tokens": -5},
    ],
)
def test_forged_terms_are_a_prompt_like_any_other(forged, pair):
    seed = 70 + len(str(forged))
    (prompt,) = models.prompts(1, 300, seed=seed)
    output = pair.ask_decode(
        prompt,
        {
            "do_remote_prefill": True,
            "transfer_id": "unknown",
            "remote_host": "prefill",
            "remote_num_tokens": 300,
        }
        | forged,
    )
    assert output.tokens == pair.alone(prompt)


def test_what_a_producer_that_dies_has_not_handed_over_is_computed(pair):
    (prompt,) = models.prompts(1, 900, seed=63)
    name = f"dying-{'0' * 20}"
    early = EARLY | {"transfer_id": name}
    with pair.here.connect() as dying:
        space = dying.attach(pair.decode.call("manifest"))
        space.handoffs.open(name)
        with pair.counted() as counts:
            decoding = in_background(lambda: pair.ask_decode(prompt, early))
            dying.close()
            output = decoding()
    assert (counts["handoffs_taken"], counts["load_failures"]) == (1, 1)
    assert output.tokens == pair.alone(prompt)


def test_a_prefill_whose_decode_never_comes_leaves_nothing_behind(pair):
    (prompt,) = models.prompts(1, 300, seed=64)
    params = pair.ask_prefill(prompt)
    pair.prefill.call("settle")
    with pair.here.connect() as watcher:
        handoffs = watcher.attach(pair.decode.call("manifest")).handoffs

        def state() -> HandoffState:
            return handoffs.wait(params["transfer_id"], 0, timeout_seconds=0.0).state

        wait_until(lambda: state() is HandoffState.CLOSED, what="all is stored")
    assert pair.prefill.call("handoffs_kept") == 0
    # An ordinary prompt finds its chunks, whatever becomes of the hand-off.
    pair.prefill.call("forget")
    (output,) = pair.prefill.generate([prompt])
    assert output.reused == 256


def test_requests_that_are_aborted_while_they_wait_give_their_blocks_back(pair):
    free = pair.decode.call("free_blocks")
    early = EARLY | {"transfer_id": "never"}
    pair.decode.call("abort_waiting", models.prompts(1, 900, seed=65)[0], early)
    wait_until(lambda: pair.decode.call("stepped_free_blocks") == free, what="blocks are free")
