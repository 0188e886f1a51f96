"""The scheduler's half by itself: bounded waits, and errors that cost only the cache."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from kvstore.client.cache import Hits
from kvstore.connectors.vllm_layouts import KVGroup
from kvstore.connectors.vllm_metadata import NOWHERE, WorkerReport
from kvstore.connectors.vllm_scheduler import SchedulerHalf
from kvstore.connectors.vllm_shards import HeadShard
from kvstore.types import TierKind
from tests.support.waiting import wait_until

CHUNK, BLOCK = 256, 128
GROUP = KVGroup(
    layer_names=("layers.0.attn",),
    layers=(0,),
    block_tokens=BLOCK,
    chunk_tokens=CHUNK,
    shard=HeadShard(2),
    head_dim=32,
    width=64,
    sides=("keys", "values"),
    dtype=torch.float32,
    window_tokens=0,
    tiling=None,
    kernel="none",
)


class Cache:
    """Finds *hits* chunks in *tiers*, once *gate* is open."""

    def __init__(self, hits: int) -> None:
        self.hits = hits
        self.tiers = [(TierKind.HOST, 100)]
        self.gate = threading.Event()
        self.gate.set()

    def find(self, digests: list[bytes], *, window: int = 0) -> Hits:
        assert self.gate.wait(20)
        return Hits(min(self.hits, len(digests)), self.tiers)

    def close(self) -> None:
        pass


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Setting:
    def __init__(
        self, hits: int, *, ranks: int = 1, store_decoded: bool = False, **options: object
    ) -> None:
        self.cache, self.clock = Cache(hits), Clock()
        self.caches = [self.cache, *(Cache(hits) for _ in range(ranks - 1))]
        self.half = SchedulerHalf(
            [GROUP],
            [self.caches],
            ranks=ranks,
            store_decoded=store_decoded,
            **options,
            lookup_timeout_seconds=0.25,
            clock=self.clock,
        )

    def answer(self, request: SimpleNamespace, local: int = 0) -> int:
        """Ask again until there is an answer."""
        found: list[int] = []

        def ask() -> bool:
            tokens = self.half.matched_tokens(request, local)
            found.extend([] if tokens is None else [tokens])
            return bool(found)

        wait_until(ask)
        return found[0]


@pytest.fixture
def setting():
    setting = Setting(hits=3)
    yield setting
    setting.cache.gate.set()
    setting.half.close()


def request(tokens: int = 1100, name: str = "r") -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name,
        all_token_ids=list(range(tokens)),
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        lora_request=None,
        cache_salt=None,
        mm_features=[],
        prompt_embeds=None,
    )


def step(**scheduled: tuple[list[int], int, int]) -> SimpleNamespace:
    """A step of new requests: name=(blocks, tokens computed before, tokens scheduled)."""
    new = [
        SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=computed)
        for name, (blocks, computed, _) in scheduled.items()
    ]
    cached = SimpleNamespace(
        req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
    )
    tokens = {name: count for name, (_, _, count) in scheduled.items()}
    return SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached,
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
    )


def ended(**fields: object) -> SimpleNamespace:
    plain = {
        "kv_connector_worker_meta": None,
        "invalid_block_ids": set(),
        "failed_recving": set(),
        "finished_recving": set(),
    }
    return SimpleNamespace(**(plain | fields))


def test_asking_again_changes_nothing(setting):
    asked = request()
    assert [setting.answer(asked) for _ in range(5)] == [768] * 5
    assert setting.half.counts.lookups == 1
    assert setting.answer(asked, local=512) == 256
    assert setting.answer(asked, local=1024) == 0


def test_a_request_does_not_wait_for_ever(setting):
    setting.cache.gate.clear()
    asked = request()
    assert setting.half.matched_tokens(asked, 0) is None
    setting.clock.now += 1
    assert setting.half.matched_tokens(asked, 0) == 0
    setting.cache.gate.set()
    # What is found too late is not loaded: it was said that there is nothing.
    assert setting.answer(asked) == 0
    assert setting.half.counts.lookups_late == 1


def test_an_old_answer_is_asked_for_again(setting):
    asked = request()
    assert setting.answer(asked) == 768
    setting.cache.hits = 1
    setting.clock.now += 5
    assert setting.answer(asked) == 256
    assert setting.half.counts.lookups == 2


def test_local_blocks_are_not_written(setting):
    asked = request()
    assert setting.answer(asked, local=128) == 640
    setting.half.after_allocation(asked, (list(range(1, 10)),), 640)
    (job,) = setting.half.build(step()).loads
    (span,) = job.spans
    assert span.blocks == [NOWHERE, 2, 3, 4, 5, 6]
    assert setting.half.build(step()).loads == []


def test_what_was_loaded_is_not_stored_and_what_failed_is(setting):
    asked = request()
    setting.answer(asked)
    setting.half.after_allocation(asked, (list(range(1, 10)),), 768)
    setting.half.build(step())
    setting.half.after_step(ended(finished_recving={"r"}, invalid_block_ids={3}))
    assert setting.half.counts.load_failures == 1
    (job,) = setting.half.build(step(r=(list(range(1, 10)), 256, 844))).stores
    assert [len(span.digests) for span in job.spans] == [4]
    # Nobody offered a pool: the worker has to finish within the step.
    assert not job.held


def test_an_unexpected_error_turns_caching_off_and_fails_the_load(setting):
    asked = request()
    assert setting.answer(asked) == 768
    # A block table that cannot be.
    setting.half.after_allocation(asked, ([], []), 768)
    asked.all_token_ids = None
    assert setting.half.matched_tokens(request(name="other"), 0) in (None, 0, 768)
    (job,) = setting.half.build(step()).loads
    assert job.request_id == "r"
    broken = step(r=([1, 2], 0, 256))
    broken.num_scheduled_tokens = {}
    assert setting.half.build(broken).stores == []
    assert setting.half.matched_tokens(request(name="third"), 0) == 0


def test_a_worker_that_is_off_turns_everything_off(setting):
    setting.half.after_step(ended(kv_connector_worker_meta=WorkerReport(off="pages")))
    assert setting.half.matched_tokens(request(), 0) == 0
    assert setting.half.build(step(r=([1, 2, 3], 0, 300))).stores == []


def test_requests_in_flight_neither_store_nor_load_after_a_reset(setting):
    asked = request()
    setting.answer(asked)
    setting.half.reset()
    assert setting.half.matched_tokens(asked, 0) == 0
    assert setting.half.build(step(r=([1, 2, 3], 0, 300))).stores == []
    assert setting.answer(request(name="new")) == 768


def test_sessions_whose_tokens_change_have_no_keys(setting):
    session = request()
    session.resumable = True
    assert setting.half.matched_tokens(session, 0) == 0
    assert setting.half.build(step(r=([1, 2, 3], 0, 300))).stores == []
