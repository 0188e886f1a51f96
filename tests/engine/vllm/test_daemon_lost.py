"""A daemon that dies at any moment costs no request and changes no output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kvstore.client.sync import Client
from kvstore.errors import KVStoreError
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine
from tests.support.waiting import wait_until

REQUEST_SECONDS_MAX = 30.0


class Daemon:
    """A daemon that can be killed and started again at the same place."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "kvstore.sock"
        self.start()

    def start(self) -> None:
        settings = (f"server.socket={self.socket}", "tiers.host.capacity=256MiB")
        command = [sys.executable, "-m", "kvstore", "serve"]
        for setting in settings:
            command += ["--set", setting]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self.answers, what="the daemon answers")

    def answers(self) -> bool:
        try:
            Client.connect(self.socket).close()
        except KVStoreError:
            return False
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)


class Setting(NamedTuple):
    daemon: Daemon
    engine: Engine
    expected: dict[int, list[list[int]]]

    def asked(self, seed: int) -> list[list[int]]:
        return models.prompts(3, 1100, seed=seed)

    def check(self, seed: int) -> int:
        """Generate and compare with an engine that has no connector; return tokens reused."""
        outputs = self.engine.generate(self.asked(seed))
        assert [output.tokens for output in outputs] == self.expected[seed]
        return sum(output.reused for output in outputs)

    def revive(self) -> None:
        self.daemon.kill()
        self.daemon.start()
        wait_until(lambda: self.engine.call("is_connected"), what="the engine is connected")


@pytest.fixture(scope="module")
def setting(llama, tmp_path_factory) -> Iterator[Setting]:
    with Engine(llama) as alone:
        expected = {
            seed: [output.tokens for output in alone.generate(models.prompts(3, 1100, seed=seed))]
            for seed in range(5)
        }
    daemon = Daemon(tmp_path_factory.mktemp("daemon"))
    with Engine(llama, socket=daemon.socket) as engine:
        yield Setting(daemon, engine, expected)
    daemon.kill()


def test_killed_before_a_request_and_found_again(setting):
    setting.daemon.kill()
    assert setting.check(0) == 0
    setting.revive()
    setting.engine.call("forget")
    assert setting.check(0) == 0
    setting.engine.call("forget")
    assert setting.check(0) == 3 * 1024


@pytest.mark.parametrize("moment", ["lookup", "load", "store"])
def test_killed_in_the_middle(setting, moment):
    seed = 1 + ["lookup", "load", "store"].index(moment)
    if moment != "store":
        setting.check(seed)
        setting.engine.call("forget")
    # The engine's own process kills the daemon, at the moment at which it asks.
    setting.engine.call("kill_at", moment, setting.daemon.process.pid)
    setting.check(seed)
    setting.engine.call("settle")
    assert setting.daemon.process.wait(REQUEST_SECONDS_MAX) == -signal.SIGKILL
    setting.revive()
    setting.engine.call("forget")
    setting.check(seed)
    setting.engine.call("forget")
    assert setting.check(seed) == 3 * 1024


def test_a_daemon_that_stops_answering(setting):
    setting.daemon.pause()
    assert setting.check(4) == 0
    setting.engine.call("settle")
    setting.revive()
    setting.engine.call("forget")
    setting.check(4)
    setting.engine.call("forget")
    assert setting.check(4) == 3 * 1024


def test_no_block_is_lost(setting):
    setting.engine.call("forget")
    free, all_blocks = setting.engine.call("free_blocks")
    assert free == all_blocks
