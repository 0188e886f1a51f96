"""The units: what systemd's own tools say of them, and a real systemd that runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.config import load
from tests.support.daemon import REPOSITORY

UNITS = REPOSITORY / "deploy" / "systemd"
MANAGER = Path("/lib/systemd/systemd")
EXPOSURE_MAX_TENTHS = {"cpu": 30, "gpu": 40}

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="Debian's package systemd is not installed"
)


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as they would be installed, but for the program, which verify looks for."""
    for name in ("kvstore.service", "kvstore.socket"):
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/bin/kvstore ", f"{sys.executable} "))
    return tmp_path


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_units(installed):
    said = run(
        "systemd-analyze", "verify", installed / "kvstore.service", installed / "kvstore.socket"
    )
    assert [line for line in said.splitlines() if "kvstore" in line] == []


@needs_systemd
@pytest.mark.parametrize("kind", EXPOSURE_MAX_TENTHS)
def test_the_service_is_exposed_to_little(installed, kind):
    if kind == "gpu":
        (installed / "kvstore.service.d").mkdir()
        shutil.copy(UNITS / "gpu.conf", installed / "kvstore.service.d")
    threshold = f"--threshold={EXPOSURE_MAX_TENTHS[kind]}"
    run("systemd-analyze", "security", "--offline=true", threshold, installed / "kvstore.service")


def test_socket_service_and_configuration_agree_on_the_path():
    config = load(UNITS / "kvstore.toml", {}, ())
    assert f"ListenStream={config.server.socket}\n" in (UNITS / "kvstore.socket").read_text()
    assert (
        f"RuntimeDirectory={config.server.socket.parent.name}\n"
        in (UNITS / "kvstore.service").read_text()
    )
    assert config.tiers.host.arena.startswith("/dev/shm/kvstore/")
    assert "d /dev/shm/kvstore " in (UNITS / "kvstore.tmpfiles").read_text()


def can_unshare() -> bool:
    command = ["unshare", "-mpf", "--mount-proc", "true"]
    tried = subprocess.run(command, capture_output=True, check=False)
    return os.getuid() == 0 and MANAGER.exists() and tried.returncode == 0


def test_a_real_systemd_starts_reloads_watches_and_activates_the_service(tmp_path):
    if not can_unshare():
        pytest.skip("needs root, systemd and namespaces")
    kvstore = Path(sys.executable).with_name("kvstore")
    script = Path(__file__).with_name("live_systemd.sh")
    seen = run(
        *("unshare", "-mpf", "--kill-child", "--mount-proc", "bash"),
        *(script, UNITS, kvstore, tmp_path),
        timeout=100,
    )
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert [line for line in seen.splitlines() if not line.startswith("refused")] == [
        "before: inactive",
        "activated: active",
        "status: serving 1MiB",
        "reloaded: active",
        "watchdog: restarted 1 time",
        "restarted: active",
        "stopped: success",
    ], log
    assert "refused: configuration not reloaded:" in seen
    assert "nonsense" in seen
    assert "applied=server.drain_timeout needs_restart=none" in log
