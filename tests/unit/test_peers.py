"""Processes are told apart by pid and start, and a process that cannot be seen counts as alive."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from kvstore.daemon import peers
from kvstore.daemon.peers import owner_of, watch
from kvstore.tiers.record_layout import Owner


@pytest.fixture
def child():
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as process:
        yield process
        process.kill()


async def ends(owner: Owner, grace_seconds: float) -> bool:
    """Wait until *owner* is found to have ended, or the grace is over."""
    process = watch(owner)
    if process is None:
        return True
    ended = asyncio.Event()
    process.when_gone(asyncio.get_running_loop(), grace_seconds, ended.set)
    return await ended.wait()


def test_a_process_is_known_by_its_start_too(child):
    owner = owner_of(child.pid)
    assert owner.pid == child.pid
    assert owner.started > 0
    assert owner.pid_space == owner_of(os.getpid()).pid_space > 0
    process = watch(owner)
    assert process is not None
    process.close()


def test_a_pid_that_is_another_process_now_is_that_of_one_that_has_ended(child):
    owner = owner_of(child.pid)
    assert watch(owner._replace(started=owner.started - 1)) is None


def test_a_process_that_has_ended_is_not_watched(child):
    owner = owner_of(child.pid)
    child.kill()
    child.wait()
    assert watch(owner) is None
    assert owner_of(child.pid) == Owner()


async def test_the_end_of_a_process_is_noticed_without_any_grace_passing(child):
    owner = owner_of(child.pid)
    waiting = asyncio.create_task(ends(owner, 1000.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    child.kill()
    assert await waiting


@pytest.mark.parametrize("hidden", [Owner(), Owner(1, 1, 1)])
async def test_a_process_that_cannot_be_seen_counts_as_alive_until_the_grace_is_over(hidden):
    process = watch(hidden)
    assert process is not None
    process.close()
    assert await ends(hidden, 0.0)


def test_where_there_are_no_pid_namespaces_all_are_in_one(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "_PID_SPACE", tmp_path / "absent")
    assert owner_of(os.getpid()).pid_space == 0
    process = watch(owner_of(os.getpid()))
    assert process is not None
    process.close()
