"""The scheduler's half by itself: bounded waits, and errors that cost only the cache."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from kvstore.client.cache import Hits
from kvstore.client.tracing import current_traceparent
from kvstore.connectors.vllm_events import NoEvents, events_for
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
        self.trace = ""
        self.gate = threading.Event()
        self.gate.set()

    def find(self, digests: list[bytes], *, window: int = 0, name: str = "") -> Hits:
        assert self.gate.wait(20)
        self.trace = current_traceparent()
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


def later_step(name: str, computed: int, tokens: int, blocks: list[int]) -> SimpleNamespace:
    """A step of a request that has run before: *blocks* are added to those it has."""
    made = step()
    made.scheduled_cached_reqs = SimpleNamespace(
        req_ids=[name],
        new_block_ids=[(blocks,)],
        num_computed_tokens=[computed],
        resumed_req_ids=set(),
    )
    made.num_scheduled_tokens = {name: tokens}
    made.total_num_scheduled_tokens = tokens
    return made


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


def test_what_is_asked_and_moved_for_a_request_belongs_to_its_trace(setting):
    asked, trace = request(), f"00-{'a' * 32}-{'b' * 16}-01"
    asked.trace_headers = {"traceparent": trace}
    setting.answer(asked)
    assert setting.cache.trace == trace
    setting.half.after_allocation(asked, (list(range(1, 10)),), 768)
    metadata = setting.half.build(step(r=(list(range(1, 10)), 768, 332)))
    assert [job.trace for job in metadata.loads + metadata.stores] == [trace, trace]
    setting.answer(request(name="nobody traces it"))
    assert setting.cache.trace == ""


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


# --- ranks ------------------------------------------------------------------------------


def test_chunks_that_one_rank_lacks_are_no_hit():
    setting = Setting(hits=3, ranks=2)
    setting.caches[1].hits = 2
    assert setting.answer(request()) == 512
    setting.half.close()


def test_a_rank_may_report_its_failure_before_the_others_are_done():
    setting = Setting(hits=3, ranks=2)
    asked = request()
    setting.answer(asked)
    setting.half.after_allocation(asked, (list(range(1, 10)),), 768)
    setting.half.after_step(ended(invalid_block_ids={3}))
    assert setting.half.counts.load_failures == 0
    setting.half.after_step(ended(finished_recving={"r"}))
    assert setting.half.counts.load_failures == 1
    (job,) = setting.half.build(step(r=(list(range(1, 10)), 256, 844))).stores
    assert [len(span.digests) for span in job.spans] == [4]
    setting.half.close()


# --- what is stored -----------------------------------------------------------------------


@pytest.mark.parametrize("decoded", [True, False])
def test_answers_are_stored_when_asked_for(decoded):
    setting = Setting(hits=0, store_decoded=decoded)
    asked = request(tokens=300)
    assert setting.answer(asked) == 0
    (first,) = setting.half.build(step(r=([1, 2, 3], 0, 300))).stores
    assert [len(span.digests) for span in first.spans] == [1]
    # It has answered 212 tokens.
    asked.all_token_ids += range(300, 512)
    asked.num_tokens = 512
    stores = setting.half.build(later_step("r", 511, 1, [4])).stores
    assert [span.blocks for job in stores for span in job.spans] == ([[3, 4]] if decoded else [])
    setting.half.close()


def test_adapters_never_meet_each_other_or_the_base(tmp_path):
    for name in ("poet", "clerk"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
    setting = Setting(hits=0)
    digests = []
    for name in ("", "poet", "clerk"):
        asked = request(name=name or "base")
        if name:
            asked.lora_request = SimpleNamespace(lora_name=name, lora_path=str(tmp_path / name))
        assert setting.answer(asked) == 0
        blocks = list(range(1, 10))
        (job,) = setting.half.build(step(**{asked.request_id: (blocks, 0, 1100)})).stores
        digests += [digest for span in job.spans for digest in span.digests]
    assert len(set(digests)) == len(digests) == 3 * 4
    setting.half.close()


# --- where hits come from -------------------------------------------------------------------


def test_hits_are_counted_by_tier(setting):
    setting.cache.tiers = [(TierKind.HOST | TierKind.DISK, 1), (TierKind.DISK, 1), (8, 1)]
    asked = request()
    assert setting.answer(asked, local=128) == 640
    setting.half.after_allocation(asked, (list(range(1, 10)),), 640)
    sources = setting.half.hit_sources(asked, 640)
    assert sources == {TierKind.HOST: 128, TierKind.DISK: 256, TierKind.REDIS: 256}
    counts = setting.half.counts
    assert (counts.tokens_hit_host, counts.tokens_hit_disk, counts.tokens_hit_redis) == (
        128,
        256,
        256,
    )
    assert counts.tokens_hit == 640


def test_a_number_of_tokens_that_was_not_planned_is_the_hosts(setting):
    assert setting.half.hit_sources(request(), 256) == {TierKind.HOST: 256}


# --- what routers are told ------------------------------------------------------------------


class Pool:
    def __init__(self) -> None:
        self.blocks = list(range(64))

    def touch(self, blocks: list[int]) -> None:
        pass

    def free_blocks(self, blocks: list[int]) -> None:
        pass


def told(hits: int, **config: object) -> Setting:
    """A setting whose events are vLLM's own."""
    wanted = SimpleNamespace(enable_kv_cache_events=True)
    spec = SimpleNamespace(block_size=BLOCK)
    groups = [SimpleNamespace(kv_cache_spec=spec)]
    kv_cache_config = SimpleNamespace(kv_cache_groups=groups, hash_block_size=None, **config)
    events = events_for(SimpleNamespace(kv_events_config=wanted), kv_cache_config, CHUNK)
    setting = Setting(hits, events=events)
    setting.half.bind_block_pool(Pool())
    return setting


def hashed(**changes: object) -> SimpleNamespace:
    asked = request(**changes)
    asked.block_hashes = [b"%8d" % number for number in range(asked.num_tokens // BLOCK)]
    return asked


def store(setting: Setting, asked: SimpleNamespace, **report: object) -> None:
    (job,) = setting.half.build(step(r=(list(range(1, 10)), 0, 1100))).stores
    finished = WorkerReport({job.job_id: 1}, **{name: {job.job_id} for name in report})
    setting.half.after_step(ended(kv_connector_worker_meta=finished))


def test_routers_are_told_of_blocks_once_they_are_kept():
    setting = told(hits=0)
    asked = hashed()
    assert setting.answer(asked) == 0
    assert setting.half.take_events() == []
    store(setting, asked)
    events = setting.half.take_events()
    assert [type(event).__name__ for event in events] == ["BlockStored"] * 4
    assert [len(event.block_hashes) for event in events] == [2] * 4
    assert [event.parent_block_hash for event in events[1:]] == [
        event.block_hashes[-1] for event in events[:-1]
    ]
    assert events[0].parent_block_hash is None
    assert [token for event in events for token in event.token_ids] == list(range(1024))
    assert {(event.medium, event.block_size) for event in events} == {("CPU", BLOCK)}
    assert setting.half.take_events() == []
    setting.half.close()


def test_routers_are_not_told_of_what_found_no_room():
    setting = told(hits=0)
    asked = hashed()
    setting.answer(asked)
    store(setting, asked, incomplete=True)
    assert setting.half.take_events() == []
    setting.half.close()


def test_routers_are_told_of_what_others_have_stored_and_where():
    setting = told(hits=3)
    setting.cache.tiers = [(TierKind.HOST, 2), (TierKind.DISK, 1)]
    asked = hashed()
    assert setting.answer(asked) == 768
    setting.half.after_allocation(asked, (list(range(1, 10)),), 768)
    events = setting.half.take_events()
    assert [event.medium for event in events] == ["CPU", "CPU", "STORAGE"]
    setting.half.close()


def test_routers_are_told_when_blocks_are_found_missing():
    setting = told(hits=0)
    asked = hashed()
    setting.answer(asked)
    store(setting, asked)
    known = setting.half.take_events()
    setting.cache.hits = 2
    again = hashed(name="again")
    assert setting.answer(again) == 512
    gone = setting.half.take_events()
    assert [type(event).__name__ for event in gone] == ["BlockRemoved"] * 2
    assert [event.block_hashes for event in gone] == [event.block_hashes for event in known[2:]]
    setting.half.reset()
    assert len(setting.half.take_events()) == 2
    setting.half.close()


def test_an_engine_without_events_makes_none():
    made = events_for(SimpleNamespace(kv_events_config=None), None, CHUNK)
    assert isinstance(made, NoEvents)
