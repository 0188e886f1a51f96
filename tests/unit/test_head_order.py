"""The order of heads in device memory: no interleaving that CUDA allows publishes wrong bytes.

Every rule of gpu/heads.py is also broken on purpose, and some interleaving must show it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kvstore.compression.twins import CODEC_TWINS
from kvstore.errors import LimitError
from kvstore.gpu.device import DeviceError, DeviceLostError, Event, StuckError, Urgency
from kvstore.gpu.heads import Desk, Heads, Step
from kvstore.gpu.lanes import LaneSettings
from kvstore.gpu.standin import Standin
from kvstore.gpu.transfers import Transfer
from kvstore.gpu.windows import Run
from kvstore.limits import HEADS_ROOM_BYTES
from tests.support.device import World, settings
from tests.support.head_scenes import Pooled, fetch_scene, store_scene, stuck_scene

SEEDS = range(25)
Scene = Callable[[Pooled], bool]


def pooled_at(
    seed: int, told: LaneSettings, *, desk: type[Desk] = Desk, codec: str = "int4kv"
) -> Pooled:
    device = Standin(np.random.default_rng(seed), twins=CODEC_TWINS)
    return Pooled(World(device, seed, codec=codec), told, desk=desk)


def play(scene: Scene, seed: int, told: LaneSettings, **words: Any) -> bool:
    pooled = pooled_at(seed, told, **words)
    try:
        return scene(pooled)
    except AssertionError:
        return False


PATIENT, IMPATIENT = settings(), settings(patience=8)


@pytest.mark.parametrize(
    ("scene", "told"), [(store_scene, PATIENT), (fetch_scene, PATIENT), (stuck_scene, IMPATIENT)]
)
def test_heads_come_where_they_belong(scene: Scene, told: LaneSettings) -> None:
    for seed in SEEDS:
        pooled = pooled_at(seed, told, codec="hq4" if seed % 2 else "int4kv")
        if scene is stuck_scene:
            # What is begun before it may take its time, too.
            pooled.stores.settings = PATIENT
            pooled.encode = _then(pooled, pooled.encode, IMPATIENT)  # type: ignore[method-assign]
        assert scene(pooled), f"seed {seed}"
        pooled.close()


def _then(pooled: Pooled, encode: Callable[..., Transfer], told: LaneSettings) -> Any:
    """Return *encode*, behind whose transfer the device is waited for as *told*."""

    def run(pages: list[list[int]]) -> Transfer:
        transfer = encode(pages)
        finish = transfer.finish

        def finish_and_tell() -> Any:
            found = finish()
            pooled.stores.settings = told
            return found

        transfer.finish = finish_and_tell  # type: ignore[method-assign]
        return transfer

    return run


# --- and no rule can be spared -------------------------------------------------------------------


def no_wait(event: Event) -> None:
    """Take for done what is not."""
    event.is_done()


class HastyDigest(Desk):
    """Digests in a stream of its own, which nothing orders behind the heads."""

    def __init__(self, device: Standin, urgency: Urgency) -> None:
        super().__init__(device, urgency)
        self._other = device.stream(urgency)

    def digest(self, count: int, size_bytes: int) -> None:
        ours, self.stream = self.stream, self._other
        super().digest(count, size_bytes)
        event, self.stream = self._other.record(), ours
        ours.wait(event)


def hasty_reports(pooled: Pooled) -> bool:
    """Write heads of what encoders have not reported yet."""
    pooled.stores.settings = settings()._replace(wait=no_wait)
    pooled.encode = _then(pooled, pooled.encode, PATIENT)  # type: ignore[method-assign]
    return store_scene(pooled)


def hasty_commit(pooled: Pooled) -> bool:
    """Commit chunks whose heads are not there yet."""
    pooled.encode = _then(pooled, pooled.encode, settings()._replace(wait=no_wait))  # type: ignore[method-assign]
    return store_scene(pooled)


def hasty_form(pooled: Pooled) -> bool:
    """Make a form of a head that has not come."""
    pooled.loads.settings = settings()._replace(wait=no_wait)
    return fetch_scene(pooled, steps=1)


def hasty_room(pooled: Pooled) -> bool:
    """Give room back while heads are on their way there."""
    pooled.encode = _then(pooled, pooled.encode, IMPATIENT)  # type: ignore[method-assign]
    over, Step.is_over = Step.is_over, lambda _: True  # type: ignore[method-assign]
    try:
        return stuck_scene(pooled)
    finally:
        Step.is_over = over  # type: ignore[method-assign]


MUTANTS: dict[str, tuple[Scene, type[Desk]]] = {
    "a head is made of reports that have not come": (hasty_reports, Desk),
    "blocks are digested before their head is there": (store_scene, HastyDigest),
    "a chunk is committed before its head is there": (hasty_commit, Desk),
    "a form is made of a head that has not come": (hasty_form, Desk),
    "room is given back while a head is on its way": (hasty_room, Desk),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_rule_is_noticed(mutant: str) -> None:
    scene, desk = MUTANTS[mutant]
    assert any(not play(scene, seed, PATIENT, desk=desk) for seed in SEEDS)


# --- what is refused, and what fails -------------------------------------------------------------


def test_more_heads_than_there_is_room_for_are_refused() -> None:
    pooled = pooled_at(0, PATIENT)
    heads: Heads = pooled.store_heads
    most = Heads.capacity(64 * 1024)
    assert most == HEADS_ROOM_BYTES // (64 * 1024)
    with pytest.raises(LimitError, match="33 heads of 65536 bytes"):
        heads.fetch([pooled.place(0)] * (most + 1), 64 * 1024)
    with pytest.raises(LimitError, match="1 heads of 24 bytes"):
        heads.put([pooled.place(0)], [bytes(24)])
    with pytest.raises(LimitError, match=f"in one step of {HEADS_ROOM_BYTES}"):
        heads.fetch_run(Run(pooled.place(0), HEADS_ROOM_BYTES + 1))


def fetch(pooled: Pooled, places: Sequence[int] = (0,)) -> Step:
    return pooled.load_heads.fetch([pooled.place(number) for number in places], 256)


def test_without_memory_for_heads_nothing_is_begun_and_it_is_tried_again() -> None:
    pooled = pooled_at(0, PATIENT)
    for what in ("allocate", "pin"):
        used = pooled.world.device.used_bytes
        pooled.world.device.fail(what)
        with pytest.raises(DeviceError, match=f"{what} failed"):
            fetch(pooled).finish()
        assert pooled.world.device.used_bytes == used
    assert pooled.world.counters.failed_transfers == 2
    fetch(pooled).finish()
    pooled.close()


def test_heads_behind_those_that_are_stuck_are_not_begun_and_their_memory_stays() -> None:
    pooled = pooled_at(0, PATIENT)
    fetch(pooled).finish()
    pooled.loads.settings = IMPATIENT
    pooled.world.device.stall()
    first = fetch(pooled)
    with pytest.raises(StuckError):
        first.finish()
    with pytest.raises(DeviceError, match="still under way"):
        fetch(pooled).finish()
    used = pooled.world.device.used_bytes
    pooled.load_heads.close()
    assert pooled.world.device.used_bytes == used
    pooled.world.device.resume()
    pooled.world.device.drain()
    assert first.is_over()
    pooled.loads.settings = PATIENT
    fetch(pooled).finish()
    pooled.load_heads.close()
    assert pooled.world.device.used_bytes < used


def test_a_lost_device_ends_the_lane_and_what_was_given_is_never_over() -> None:
    pooled = pooled_at(0, PATIENT)
    step = fetch(pooled)
    pooled.world.device.lose()
    with pytest.raises(DeviceLostError):
        step.finish()
    assert not step.is_over()
    assert pooled.loads.off
    with pytest.raises(DeviceError):
        fetch(pooled).finish()
