"""A process that is killed while it writes: what it has said to be kept is kept, whole and right,
and nothing else can be read."""

from __future__ import annotations

import asyncio
import multiprocessing
import random  # noqa: TID251  # every Random here is made from a seed
from pathlib import Path

import pytest

from tests.support import disk_writer
from tests.support.disks import disk_tier, number_of, recovered, served

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.disk_writer"])


def kill_one(path: Path, rng: random.Random, promised: set[int]) -> None:
    """Let a process work on *path* for a random number of steps, then kill it.

    Keeps in *promised* what it has said to be there.
    """
    hear, tell = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=disk_writer.run, args=(path, rng.getrandbits(32), tell))
    process.start()
    tell.close()
    assert hear.poll(60)
    assert hear.recv() == ("ready", 0)
    for _ in range(rng.randrange(40)):
        note(hear.recv(), promised)
    process.kill()
    process.join()
    # What was said before the end counts, too.
    while hear.poll():
        try:
            note(hear.recv(), promised)
        except EOFError:
            break
    hear.close()


def note(message: tuple[str, int], promised: set[int]) -> None:
    what, number = message
    if what == "kept":
        promised.add(number)
    else:
        promised.discard(number)


async def check_all(path: Path, promised: set[int]) -> set[int]:
    """Return what is there: all that was promised, and each of it whole and right."""
    async with disk_tier(path, disk_writer.CAPACITY) as tier:
        found = {number_of(shard) for shard, _ in recovered(tier)}
        assert set(await served(tier)) == found, "something partial was left behind"
        assert tier.counters.quarantined == 0
        assert promised <= found
        usage = tier.usage()
        assert usage.used_bytes <= usage.capacity_bytes
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rounds", [50])
def test_kill_nine_at_any_instant_keeps_what_was_promised(tmp_path: Path, rounds: int) -> None:
    rng = random.Random(20)
    promised: set[int] = set()
    for _ in range(rounds):
        kill_one(tmp_path, rng, promised)
        # One that was written but not yet told, or told to be removed and was not, is a gift.
        promised |= asyncio.run(check_all(tmp_path, promised))
    assert max(promised) > rounds * 5
