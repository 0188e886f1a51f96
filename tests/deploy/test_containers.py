"""Dockerfile and compose file: judged by what can be without a Docker engine.

The steps of the image are not run here as the image would run them: its wheel is built and the
entry point is started on a read-only root by `test_the_entry_point_serves_on_a_read_only_root`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvstore.client.sync import Client
from kvstore.config import load
from kvstore.errors import KVStoreError
from tests.support.daemon import DEADLINE_SECONDS, REPOSITORY
from tests.support.waiting import wait_until

DOCKER = REPOSITORY / "deploy" / "docker"
COMPOSE_FILE = REPOSITORY / "deploy" / "compose.yaml"
COMPOSE = yaml.safe_load(COMPOSE_FILE.read_text())
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
TOOLS = Path(sys.executable).parent


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"make test installs {name}")
    return found


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing():
    run(tool("hadolint"), DOCKER / "Dockerfile")


def test_the_compose_file_keeps_to_its_specification():
    schema = ("--builtin-schema", "vendor.compose-spec")
    run(tool("check-jsonschema"), *schema, COMPOSE_FILE)


def test_images_run_as_nobody_in_particular_and_look_after_themselves():
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    final = [stage for stage in stages if re.match(r".* AS (cpu|cuda)\n", stage)]
    assert len(final) == 2
    for stage in final:
        assert "USER 10001:10001" in stage
        assert "HEALTHCHECK" in stage
        assert 'ENTRYPOINT ["kvstore"]' in stage
        assert stage.index("USER ") > stage.index("RUN ")


def test_everything_that_is_copied_is_there_and_sent():
    sent = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for name in (line[1:] for line in sent if line.startswith("!")):
        assert (REPOSITORY / name).exists(), name
    for path in re.findall(r"^COPY (?!--from|\.)(\S+)", DOCKERFILE, flags=re.MULTILINE):
        assert f"!{path}" in sent
    # What the build reads: a wheel needs all of it.
    assert {"!kvstore", "!hatch_build.py", "!pyproject.toml", "!README.md", "!LICENSE"} <= set(sent)


def test_services_share_a_socket_and_no_memory_namespace():
    for name, service in COMPOSE["services"].items():
        assert "ipc" not in service, name
        assert "shm_size" not in service, name
        assert not service.get("privileged"), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is reached from this host alone"
    assert "socket:/run/kvstore" in COMPOSE["services"]["engine"]["volumes"]
    assert "socket:/run/kvstore" in COMPOSE["services"]["daemon"]["volumes"]
    # Who may reach the admin API without a token: what watches, and never the engine.
    inside = set(COMPOSE["services"]["engine"]["networks"])
    assert not inside & set(COMPOSE["services"]["daemon"]["networks"])


def test_files_that_are_mounted_are_there():
    for name, service in COMPOSE["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (COMPOSE_FILE.parent / source).exists(), (name, source)
            else:
                assert source in COMPOSE["volumes"], (name, source)


def test_the_daemon_accepts_what_compose_sets():
    environ = {
        name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))
        for name, value in COMPOSE["services"]["daemon"]["environment"].items()
    }
    config = load(DOCKER / "kvstore.toml", environ, ())
    assert config.tiers.redis.url == "redis://redis:6379"
    assert config.admin.insecure
    assert config.admin.allowed_hosts == ("localhost", "daemon")
    assert str(config.server.socket) == "/run/kvstore/kvstore.sock"


def test_the_entry_point_serves_on_a_read_only_root(tmp_path):
    """As the image would: nothing but two volumes and /tmp can be written, no capability."""
    bwrap = shutil.which("bwrap")
    if bwrap is None or os.getuid() != 0:
        pytest.skip("Debian's package bubblewrap is not installed, or this is not root")
    volumes = [tmp_path / "run", tmp_path / "lib"]
    for volume in volumes:
        volume.mkdir()
    cage = [bwrap, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]
    for place in ("/work", str(REPOSITORY), str(TOOLS.parent)):
        cage += ["--ro-bind-try", place, place]
    cage += ["--tmpfs", "/run", "--bind", str(volumes[0]), "/run/kvstore"]
    cage += ["--tmpfs", "/var/lib", "--bind", str(volumes[1]), "/var/lib/kvstore"]
    cage += ["--cap-drop", "ALL", "--die-with-parent", "--clearenv"]
    settings = ["tiers.host.capacity=1MiB", "admin.listen="]
    settings += ["tiers.disk.path=/var/lib/kvstore/disk", "tiers.disk.capacity=1MiB"]
    words = [word for setting in settings for word in ("--set", setting)]
    serve = [TOOLS / "kvstore", "serve", "--config", DOCKER / "kvstore.toml", *words]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*cage, *map(str, serve)], stderr=log, cwd="/")
    try:
        wait_until(lambda: answers(volumes[0]) or process.poll() is not None, what="it serves")
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert (volumes[1] / "disk").is_dir()
    finally:
        process.terminate()
        process.wait(DEADLINE_SECONDS)
    first = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert first["message"] in {"draining", "ready"}


def answers(directory: Path) -> bool:
    try:
        with Client.connect(directory / "kvstore.sock") as client:
            return client.stats().state == "ready"
    except KVStoreError:
        return False
