"""The command: quick to start, exit statuses, data apart from talk, no traceback for an error."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest

from kvstore import __version__, app, cli, doctor, errors
from kvstore.cli.status import render
from kvstore.cli.tables import align
from kvstore.client import sync
from kvstore.config import Config
from kvstore.protocol.messages import (
    ArenaStats,
    DaemonStats,
    NamespaceStats,
    TenantStats,
    TierStats,
)
from kvstore.protocol.stats import CodecStats

HEAVY = ("numpy", "aiohttp", "msgspec", "redis", "uvloop", "asyncio", "prometheus_client", "torch")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        monkeypatch.delenv(name)


def make_stats(**changes: object) -> DaemonStats:
    fields: dict[str, object] = {
        "version": "9.9",
        "pid": 7,
        "state": "ready",
        "socket": "/run/x.sock",
        "uptime_seconds": 5400.0,
        "resident_bytes": 10 * 2**20,
        "sessions": 3,
        "leases": 2,
        "reservations": 1,
        "tiers": [
            TierStats(
                tier="host",
                capacity_bytes=2**30,
                used_bytes=2**28,
                largest_free_bytes=2**20,
                chunks=1234,
            )
        ],
        "namespaces": [
            NamespaceStats(
                namespace="ab" * 16,
                model="llama",
                revision="1",
                dtype="bfloat16",
                group="full",
                chunk_tokens=256,
                chunk_bytes=2**20,
                chunks=5,
            )
        ],
        "namespaces_count": 1,
        "arena": ArenaStats(
            kind="memfd", size_bytes=2**30, prefaulted_bytes=2**29, huge_pages=False
        ),
        "counters": {"requests": 12345, "evict_chunks": 0},
    }
    return DaemonStats(**(fields | changes))


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for a daemon: what it answers, and how it was asked."""
    daemon = SimpleNamespace(stats=make_stats(), error=None, asked=[])

    class Client:
        @classmethod
        def connect(cls, path: Path, *, timeout_seconds: float) -> Client:
            daemon.asked.append(path)
            if daemon.error is not None:
                raise daemon.error
            return cls()

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def stats(self) -> DaemonStats:
            return daemon.stats

    monkeypatch.setattr(sync, "Client", Client)
    return daemon


def run_kvstore(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvstore", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environ}
    )


# --- starting up -------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    outcome = run_kvstore("--help")
    assert outcome.returncode == 0
    assert outcome.stderr == ""
    for name in ("serve", "status", "doctor", "config", "bench", "version"):
        assert f"\n    {name} " in outcome.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kvstore.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print('heavy:', sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    command = [sys.executable, "-c", code]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    assert outcome.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["status", "--output", "xml"],
        ["status", "--sock", "/x"],
        ["config"],
        ["bench"],
        ["bench", "nonsense"],
        ["version", "more"],
    ],
)
def test_wrong_usage_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: kvstore")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"kvstore {__version__}\n"


# --- errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UnavailableError("no answer"), 3),
        (errors.DeadlineError("too late"), 3),
        (errors.RefusedError("not you"), 4),
        (errors.VersionError("too old"), 4),
        (errors.InternalError("broken"), 1),
        (errors.AddressInUseError("taken"), 1),
    ],
)
def test_an_error_gives_its_status_and_one_line(
    daemon: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    error: errors.KVStoreError,
    status: int,
) -> None:
    daemon.error = error
    assert cli.main(["status"]) == status
    assert capsys.readouterr() == ("", f"kvstore: {error}\n")


def test_a_daemon_that_is_not_there_gives_3_without_a_traceback(tmp_path: Path) -> None:
    outcome = run_kvstore("status", "--socket", str(tmp_path / "none.sock"))
    assert outcome.returncode == 3
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("kvstore: ")
    assert outcome.stderr.count("\n") == 1
    assert str(tmp_path / "none.sock") in outcome.stderr


def test_wrong_configuration_gives_2_and_a_line_a_problem(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["serve", "--set", "log.level=x", "--set", "log.format=y"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[:2] for line in err.splitlines()] == [["kvstore", " --set"]] * 2


def test_an_optimised_interpreter_is_refused() -> None:
    command = [sys.executable, "-O", "-m", "kvstore", "serve"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert "-O" in outcome.stderr
    assert outcome.stderr.startswith("kvstore: ")


def test_an_interrupt_gives_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "run", interrupted)
    monkeypatch.setattr("kvstore.logs.configure", lambda *_: None)
    assert cli.main(["serve"]) == 130


@pytest.mark.parametrize("words", [["config", "schema"], ["version"]])
def test_a_reader_that_leaves_early_sees_no_traceback(words: list[str]) -> None:
    command = [sys.executable, "-m", "kvstore", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


# --- serve, status -----------------------------------------------------------------------


def test_serve_runs_the_daemon_as_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: list[Config] = []
    logged: list[tuple[str, str]] = []
    monkeypatch.setattr(app, "run", lambda config, reread: served.append(config) or 5)
    monkeypatch.setattr("kvstore.logs.configure", lambda *words: logged.append(words))
    monkeypatch.setenv("KVSTORE_LOG__FORMAT", "json")
    file = tmp_path / "kvstore.toml"
    file.write_text('log.level = "debug"\n')
    words = ["serve", "--config", str(file), "--set", "leases.ttl=3s", "--set", "leases.ttl=4s"]
    assert cli.main(words) == 5
    assert served[0].leases.ttl_seconds == 4.0
    assert logged == [("debug", "json")]


def test_status_is_a_table_for_people(
    daemon: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--socket", "/x.sock"]) == 0
    assert daemon.asked == [Path("/x.sock")]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "daemon  kvstore 9.9, ready, pid 7",
        "up      1.5 h",
        "socket  /run/x.sock",
        "memory  10.0 MiB resident",
        "arena   memfd, 1.00 GiB, 50% backed, huge pages off",
        "in use  3 sessions, 2 leases, 1 reservations",
        "",
        "tier  capacity     used       largest free  chunks  hits",
        "host  1.00 GiB  256 MiB  25%      1.00 MiB   1,234     0",
        "",
        "namespace     model  group  dtype     codec  tokens/chunk  bytes/chunk  chunks",
        "abababababab  llama  full   bfloat16  raw             256     1.00 MiB       5",
        "",
        "requests  12,345",
    ]


def test_status_shows_what_codecs_save() -> None:
    disk = TierStats(
        tier="disk",
        capacity_bytes=2**30,
        used_bytes=2**20,
        largest_free_bytes=2**20,
        chunks=1,
        write="back",
        codec="int4kv",
    )
    codecs = [
        CodecStats(tier="host", codec="int8kv", stored_bytes=2**20, raw_bytes=2**21),
        CodecStats(tier="disk", codec="int8kv", stored_bytes=2**20, raw_bytes=7 * 2**19),
    ]
    lines = render(make_stats(tiers=[*make_stats().tiers, disk], codecs=codecs)).splitlines()
    assert "codec           tier       raw    stored  ratio" in lines
    assert "int8kv          host  2.00 MiB  1.00 MiB   2.00" in lines
    assert "int8kv, int4kv  disk  3.50 MiB  1.00 MiB   3.50" in lines
    plain = [CodecStats(tier="host", codec="raw", stored_bytes=5, raw_bytes=5)]
    assert "ratio" not in render(make_stats(codecs=plain))


def test_status_shows_slower_tiers_and_tenants() -> None:
    slower = TierStats(
        tier="redis",
        capacity_bytes=0,
        used_bytes=3 * 2**20,
        largest_free_bytes=0,
        chunks=7,
        hit_chunks=3,
        state="failing",
        write="back",
        queued_chunks=2,
        queued_bytes=65_536,
        read_bytes_per_second=2**30,
        write_bytes_per_second=2**20,
        read_seconds=0.0125,
        counters={"timeouts": 4, "reconnects": 0},
    )
    tenant = TenantStats(
        tenant="", tier="host", chunks=1, used_bytes=0, quota_bytes=2**30, floor_bytes=2**20
    )
    shown = render(make_stats(tiers=[slower], tenants=[tenant]))
    lines = [line.split() for line in shown.splitlines()]
    assert ["redis", "-", "3.00", "MiB", "-", "-", "7", "3"] in lines
    assert [
        "redis",
        "failing",
        "back",
        "2",
        "chunks",
        "64.0",
        "KiB",
        "1.00",
        "GiB/s",
        "1.00",
        "MiB/s",
        "12.5",
        "ms",
    ] in lines
    assert ["(none)", "host", "1", "0", "B", "1.00", "GiB", "1.00", "MiB"] in lines
    assert ["redis", "timeouts", "4"] in lines
    assert "reconnects" not in shown


def test_status_as_json_is_the_whole_answer(
    daemon: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--output", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["tiers"][0]["used_bytes"] == 2**28
    assert content["counters"] == {"requests": 12345, "evict_chunks": 0}


def test_status_asks_the_configured_daemon(
    daemon: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_SERVER__SOCKET", "/elsewhere.sock")
    assert cli.main(["status"]) == 0
    assert daemon.asked == [Path("/elsewhere.sock")]


def test_an_empty_daemon_has_a_short_status() -> None:
    text = render(make_stats(namespaces=[], namespaces_count=0, counters={}, uptime_seconds=0.25))
    assert "up      0.2 s" in text
    assert "namespace" not in text
    assert text.splitlines()[-1].split() == [
        "host",
        "1.00",
        "GiB",
        "256",
        "MiB",
        "25%",
        "1.00",
        "MiB",
        "1,234",
        "0",
    ]


def test_namespaces_that_are_not_listed_are_counted() -> None:
    assert "and 41 more" in render(make_stats(namespaces_count=42)).splitlines()


def test_a_table_shows_nothing_that_a_terminal_would_obey() -> None:
    assert align([("a\x1b[2J", "b\nc")]) == ["a?[2J  b?c"]


# --- doctor, config, bench ---------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "status"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_fails_when_a_check_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verdict: doctor.Verdict,
    status: int,
) -> None:
    finding = doctor.Finding("memory", verdict, "little", "buy more")
    monkeypatch.setattr(doctor, "examine", lambda *_: [finding])
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().out.splitlines() == [
        f"{verdict}  memory  little",
        "      fix: buy more",
    ]
    assert cli.main(["doctor", "--output", "json"]) == status
    assert json.loads(capsys.readouterr().out) == [
        {"check": "memory", "verdict": verdict, "found": "little", "fix": "buy more"}
    ]


def test_config_show_prints_a_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "--set", "tiers.host.capacity=64GiB"]) == 0
    content = tomllib.loads(capsys.readouterr().out)
    assert content["tiers"]["host"]["capacity"] == "64GiB"
    assert content["server"]["allowed_uids"] == []


def test_config_show_tells_origins_as_comments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVSTORE_LOG__LEVEL", "debug")
    assert cli.main(["config", "show", "--origin", "--set", "leases.ttl=3s"]) == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)["log"]["level"] == "debug"
    ends = {line.split(" = ")[0]: line.partition("# ")[2] for line in out.splitlines()}
    assert ends["log.level"] == "KVSTORE_LOG__LEVEL"
    assert ends["leases.ttl"] == "--set"
    assert ends["log.format"] == "default"


def test_config_check_tells_good_from_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kvstore.toml"
    file.write_text('log.level = "info"\n')
    assert cli.main(["config", "check", str(file)]) == 0
    assert capsys.readouterr() == (f"{file}: ok\n", "")
    file.write_text('log.level = "x"\nlog.form = "y"\n')
    assert cli.main(["config", "check", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": ")[0] for line in err.splitlines()] == [f"{file}:1", f"{file}:2"]


def test_config_check_looks_at_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_LOG__LEVEL", "nonsense")
    file = tmp_path / "kvstore.toml"
    file.write_text("")
    assert cli.main(["config", "check", str(file)]) == 0


def test_config_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False


@pytest.mark.parametrize("name", ["transfer", "lookup", "codec"])
def test_a_benchmark_reads_its_own_arguments(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given: list[list[str]] = []
    bench = SimpleNamespace(main=lambda words: given.append(words) or 1)
    monkeypatch.setitem(sys.modules, f"kvstore.bench.{name}", bench)
    assert cli.main(["bench", name, "--output", "json", "--help"]) == 1
    assert given == [["--output", "json", "--help"]]


def test_connectors_vllm_prints_what_vllm_takes(capsys):
    assert cli.main(["connectors", "vllm", "--print", "--socket", "/run/x.sock"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"socket": "/run/x.sock"},
    }


def test_connectors_vllm_says_how_to_start_it(capsys):
    assert cli.main(["connectors", "vllm"]) == 0
    command, config = capsys.readouterr().out.strip().rstrip("'").split("'")
    assert command == "vllm serve MODEL --kv-transfer-config "
    assert "kv_connector_extra_config" not in json.loads(config)


def test_connectors_sglang_prints_what_sglang_takes(capsys):
    assert cli.main(["connectors", "sglang", "--print", "--socket", "/run/x.sock"]) == 0
    *flags, extra = shlex.split(capsys.readouterr().out)
    assert flags[-1] == "--hicache-storage-backend-extra-config"
    assert json.loads(extra) == {
        "backend_name": "kvstore",
        "module_path": "kvstore.connectors.sglang",
        "class_name": "KVStoreHiCache",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "socket": "/run/x.sock",
    }
    assert cli.main(["connectors", "sglang"]) == 0
    assert "socket" not in json.loads(shlex.split(capsys.readouterr().out)[-1])
