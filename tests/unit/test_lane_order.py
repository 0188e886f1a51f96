"""The order of transfers: no interleaving that CUDA allows delivers wrong bytes.

Every rule of gpu/lanes.py is also broken on purpose, and some interleaving must show it: so each
is needed, and the scenes would notice if it were lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvstore.compression.twins import CODEC_TWINS
from kvstore.errors import LimitError
from kvstore.gpu.device import Event, Fence
from kvstore.gpu.forms import Form
from kvstore.gpu.lanes import Lane, LaneSettings, LoadLane, StoreLane
from kvstore.gpu.standin import Standin
from kvstore.gpu.transfers import Encoding, Moved, Transfer
from kvstore.hashing import block_digests
from kvstore.limits import POOLED_PER_TRANSFER_MAX
from tests.support.device import (
    RUBBISH,
    World,
    abandoned_load_scene,
    abandoned_store_scene,
    load_scene,
    reports_scene,
    settings,
    store_scene,
)
from tests.support.device_measured import measured_scene, sizes_scene

SEEDS = range(60)
WAYS: dict[str, dict[str, Any]] = {
    "staged": {"direct": False, "registered": True},
    "bounced": {"direct": False, "registered": False},
    "direct": {"direct": True, "registered": True},
}
CODED_SEEDS = range(15)
CODED: dict[str, dict[str, Any]] = {
    "coded": {"direct": False, "registered": True, "codec": "int4kv"},
    "coded, bounced": {"direct": False, "registered": False, "codec": "hq4"},
}

VARYING: dict[str, dict[str, Any]] = {
    "measured": {"registered": True, "codec": "exp3"},
    "measured, bounced": {"registered": False, "codec": "exp3"},
    "measured, as it is": {"registered": True, "codec": "rans"},
}

Scene = Callable[[World, Lane, Standin], bool]


def plain(scene: Callable[..., bool], **words: bool) -> Scene:
    return lambda world, lane, _device: scene(world, lane, **words)


STORE, LOAD = plain(store_scene), plain(load_scene)
MEASURED, SIZES = plain(measured_scene), plain(sizes_scene)


def slow_bus_scene(world: World, lane: Lane, device: Standin) -> bool:
    """Load while copies stand still until all has been done that does not wait for them."""
    stored, _ = world.stored(world.content())
    world.place(0)[: stored.size] = stored
    device.stall(lane._copies)
    transfer = lane.begin([world.moved([3, 5], 0)], world.fence(), form=world.form)
    device.drain()
    device.resume()
    transfer.finish()
    return bool(np.array_equal(world.chunk_in([3, 5]), world.decoded(stored)))


def unverified_scene(world: World, lane: Lane, _device: Standin) -> bool:
    """Load without checksums; the moment that it has ended, the chunk is evicted."""
    stored, _ = world.stored(world.content())
    world.place(0)[: stored.size] = stored
    lane.begin([world.moved([3, 5], 0)], world.fence(), checksums=False, form=world.form).finish()
    world.place(0)[:] = RUBBISH
    return bool(np.array_equal(world.chunk_in([3, 5]), world.decoded(stored)))


def slow_bus_measured_scene(world: World, lane: StoreLane, device: Standin) -> bool:
    """Store what is measured first while copies stand still, whenever somebody waits."""

    def wait(event: Event) -> None:
        device.stall(lane._copies)
        device.drain()
        device.resume()
        while not event.is_done():
            pass

    lane.settings = lane.settings._replace(wait=wait)
    return measured_scene(world, lane)


def play(
    scene: Scene, kind: type[Lane], seed: int, *, way: str = "staged", told: LaneSettings
) -> bool:
    device = Standin(np.random.default_rng(seed), twins=CODEC_TWINS)
    words = (WAYS | CODED | VARYING)[way]
    world = World(device, seed, registered=words["registered"], codec=words.get("codec", "raw"))
    lane = world.lane(kind, told)
    good = scene(world, lane, device)
    device.drain()
    assert device.is_idle
    assert lane.stuck == 0
    lane.close()
    world.windows.close()
    return good


# --- all interleavings are right -------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("scene", "kind"), [(STORE, StoreLane), (LOAD, LoadLane), (unverified_scene, LoadLane)]
)
def test_what_arrives_is_what_was_there(scene: Scene, kind: type[Lane], way: str) -> None:
    told = settings(direct=WAYS[way]["direct"])
    bad = [seed for seed in SEEDS if not play(scene, kind, seed, way=way, told=told)]
    assert bad == []


def test_loads_do_not_wait_on_the_bus_for_kernels_of_those_before() -> None:
    assert play(slow_bus_scene, LoadLane, 0, told=settings())
    device = Standin(np.random.default_rng(0))
    world = World(device)
    lane = world.lane(LoadLane, settings())
    device.stall(lane._kernels)
    transfers = [lane.begin([world.moved([2 * n, 2 * n + 1], n)], None) for n in range(2)]
    device.drain()
    assert not lane._copies.queue
    device.resume()
    for transfer in transfers:
        transfer.finish()


@pytest.mark.parametrize("way", CODED)
@pytest.mark.parametrize(("scene", "kind"), [(STORE, StoreLane), (LOAD, LoadLane)])
def test_what_is_encoded_arrives_as_the_host_would_have_it(
    scene: Scene, kind: type[Lane], way: str
) -> None:
    bad = [seed for seed in CODED_SEEDS if not play(scene, kind, seed, way=way, told=settings())]
    assert bad == []


@pytest.mark.parametrize(
    ("scene", "kind", "way"),
    [
        *((MEASURED, StoreLane, way) for way in VARYING),
        (slow_bus_measured_scene, StoreLane, "measured"),
        (LOAD, LoadLane, "measured"),
        (LOAD, LoadLane, "measured, bounced"),
    ],
)
def test_what_is_measured_first_arrives_as_the_host_would_have_it(
    scene: Scene, kind: type[Lane], way: str
) -> None:
    bad = [seed for seed in CODED_SEEDS if not play(scene, kind, seed, way=way, told=settings())]
    assert bad == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("scene", "kind"), [(abandoned_store_scene, StoreLane), (abandoned_load_scene, LoadLane)]
)
def test_what_was_given_up_harms_nobody(scene: Scene, kind: type[Lane], way: str) -> None:
    told = settings(direct=WAYS[way]["direct"], patience=8)
    bad = [seed for seed in SEEDS if not play(scene, kind, seed, way=way, told=told)]
    assert bad == []


# --- and no rule can be spared ------------------------------------------------------------------


def nothing(*_: object) -> None:
    """Leave a rule out."""


def broken(kind: type[Lane], **methods: Any) -> type[Lane]:
    return type(f"Broken{kind.__name__}", (kind,), methods)


def begin_and_give_back(
    lane: Lane, chunks: list[Moved], after: Fence | None, **words: Any
) -> Transfer:
    transfer = StoreLane.begin(lane, chunks, after, **words)
    transfer._end()
    return transfer


def only_copies(lane: Lane) -> Event:
    return lane._copies.record()


def only_kernels(lane: Lane) -> Event:
    return lane._kernels.record()


def no_wait(event: Event) -> None:
    """Take for done what is not."""
    event.is_done()


HASTY = settings()._replace(wait=no_wait)
PATIENT = settings()
IMPATIENT = settings(patience=8)
CARELESS = plain(store_scene, reuse_waits=False)

MUTANTS: dict[str, tuple[Scene, type[Lane], LaneSettings]] = {
    "a page is read before it is computed": (
        STORE,
        broken(StoreLane, _behind_engine=nothing),
        PATIENT,
    ),
    "a copy takes what is not gathered yet": (
        STORE,
        broken(StoreLane, _behind_gather=nothing),
        PATIENT,
    ),
    "a block is reused before its save is done": (CARELESS, StoreLane, PATIENT),
    "a chunk is committed before it has arrived": (STORE, StoreLane, HASTY),
    "staging is overwritten in flight": (
        STORE,
        broken(StoreLane, begin=begin_and_give_back),
        PATIENT,
    ),
    "digests are read before they are made": (STORE, broken(StoreLane, _join=only_copies), PATIENT),
    "a scatter comes before its load is done": (
        slow_bus_scene,
        broken(LoadLane, _behind_copy=nothing),
        PATIENT,
    ),
    "a page is written while the engine reads it": (
        LOAD,
        broken(LoadLane, _behind_engine=nothing),
        PATIENT,
    ),
    "a chunk is evicted while it is loaded": (LOAD, LoadLane, HASTY),
    "it is evicted while it goes directly and nobody verifies it": (
        unverified_scene,
        broken(LoadLane, _join=only_kernels),
        settings(direct=True),
    ),
    "what a load has found is read before it has come": (
        LOAD,
        broken(LoadLane, _join=only_copies),
        PATIENT,
    ),
    "the engine computes what a load still writes": (
        abandoned_load_scene,
        broken(LoadLane, _engine_behind=nothing),
        IMPATIENT,
    ),
}


CODED_MUTANTS: dict[str, tuple[Scene, type[Lane], LaneSettings]] = {
    "a copy takes what is not encoded yet": MUTANTS["a copy takes what is not gathered yet"],
    "values are encoded before they are computed": MUTANTS["a page is read before it is computed"],
    "a decoder comes before its load is done": MUTANTS["a scatter comes before its load is done"],
    "values are decoded while the engine reads": MUTANTS[
        "a page is written while the engine reads it"
    ],
    "a report is read before it has come": (
        plain(reports_scene),
        broken(StoreLane, _join=only_copies),
        PATIENT,
    ),
    "a report is read before the event": (plain(reports_scene), StoreLane, HASTY),
}


def encode_and_give_back(
    lane: StoreLane, chunks: list[Moved], after: Fence | None, form: Form
) -> Encoding:
    encoding = StoreLane.encode(lane, chunks, after, form)
    encoding._end()
    return encoding


ONE_SLOT = settings(slots=1)
MEASURED_MUTANTS: dict[str, tuple[Scene, type[Lane], LaneSettings]] = {
    "sizes are read before they have come": (SIZES, StoreLane, HASTY),
    "values are measured before they are computed": (
        SIZES,
        broken(StoreLane, _behind_engine=nothing),
        PATIENT,
    ),
    "a copy takes what is measured and not placed yet": (
        MEASURED,
        broken(StoreLane, _behind_gather=nothing),
        PATIENT,
    ),
    "a block is reused when it is measured and not placed yet": (
        plain(measured_scene, reuse_waits=False),
        StoreLane,
        PATIENT,
    ),
    "staging is used again between sizes and copies": (
        MEASURED,
        broken(StoreLane, encode=encode_and_give_back),
        ONE_SLOT,
    ),
    "a chunk is committed before its copy has arrived": (
        slow_bus_measured_scene,
        broken(StoreLane, _join=only_kernels),
        PATIENT,
    ),
}


@pytest.mark.parametrize("mutant", MEASURED_MUTANTS)
def test_a_rule_of_measuring_that_is_broken_is_noticed(mutant: str) -> None:
    scene, kind, told = MEASURED_MUTANTS[mutant]
    assert any(not _survives(scene, kind, seed, told, "exp3") for seed in SEEDS)


def test_sizes_are_right_when_they_are_known() -> None:
    bad = [
        seed
        for seed in CODED_SEEDS
        if not play(SIZES, StoreLane, seed, way="measured", told=PATIENT)
    ]
    assert bad == []


@pytest.mark.parametrize("mutant", CODED_MUTANTS)
def test_a_rule_of_coding_that_is_broken_is_noticed(mutant: str) -> None:
    scene, kind, told = CODED_MUTANTS[mutant]
    assert any(not _survives(scene, kind, seed, told, "int4kv") for seed in SEEDS)


def test_reports_are_whole_when_a_store_is_finished() -> None:
    bad = [
        seed
        for seed in CODED_SEEDS
        if not play(plain(reports_scene), StoreLane, seed, way="coded", told=PATIENT)
    ]
    assert bad == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_rule_is_noticed(mutant: str) -> None:
    scene, kind, told = MUTANTS[mutant]
    assert any(not _survives(scene, kind, seed, told) for seed in SEEDS)


def test_room_that_is_used_again_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfer, "is_over", lambda _: True)
    assert any(not _survives(abandoned_store_scene, StoreLane, seed, IMPATIENT) for seed in SEEDS)


def _survives(
    scene: Scene, kind: type[Lane], seed: int, told: LaneSettings, codec: str = "raw"
) -> bool:
    device = Standin(np.random.default_rng(seed), twins=CODEC_TWINS)
    world = World(device, seed, codec=codec)
    try:
        return scene(world, world.lane(kind, told), device)
    except AssertionError:
        return False


# --- both directions at once ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_stores_and_loads_of_two_threads_do_not_meet(seed: int) -> None:
    device = Standin(np.random.default_rng(seed))
    results: dict[str, bool] = {}

    def run(name: str, scene: Scene, kind: type[Lane]) -> None:
        world = World(device, seed)
        results[name] = scene(world, world.lane(kind, settings()), device)

    threads = [
        threading.Thread(target=run, args=("store", STORE, StoreLane)),
        threading.Thread(target=run, args=("load", LOAD, LoadLane)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"store": True, "load": True}


@pytest.mark.parametrize("seed", range(3))
def test_chunks_that_stay_on_the_device_are_not_bound_by_staging(seed: int) -> None:
    world = World(Standin(np.random.default_rng(seed)), seed)
    count, size, pages = POOLED_PER_TRANSFER_MAX, world.layout.chunk_bytes, [3, 5]
    pool = world.device.allocate((count + 1) * size)
    chunks = [Moved(pages, pool.address + n * size, on_device=True) for n in range(count + 1)]
    content = world.content()
    world.write(content, pages)
    for kind in (StoreLane, LoadLane):
        lane = world.lane(kind, settings(slots=1, chunks=1))
        assert lane.capacity(lane.plain) == 1
        assert lane.capacity(lane.plain, on_device=True) == count
        for refused in (chunks, [chunks[0], world.moved(pages, 0)]):
            with pytest.raises(LimitError, match=f"{len(refused)} chunks in one transfer"):
                lane.begin(refused, world.fence())
        digests = lane.begin(chunks[:count], world.fence()).finish()
        assert digests is not None
        assert (digests == block_digests(content.tobytes())).all()
        assert digests.shape[0] == count
        lane.close()
    held = world.get(pool.address, count * size).reshape(count, -1)
    assert (held == content.ravel()).all()
