"""Configuration: who wins, what is refused and with which words, and where values come from."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from kvstore.config import (
    Config,
    default_socket_path,
    load,
    load_traced,
    named_settings,
    plain,
    settings,
)
from kvstore.config_schema import json_schema
from kvstore.errors import ConfigError
from kvstore.limits import GIB, MIB


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kvstore.toml"


def refusal(
    file: Path | None = None,
    content: str = "",
    environ: dict[str, str] | None = None,
    overrides: tuple[str, ...] = (),
) -> str:
    """Return why this configuration is refused."""
    if file is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load(file, environ or {}, overrides)
    return str(caught.value)


# --- defaults and precedence -------------------------------------------------------------


def test_without_anything_the_defaults_hold() -> None:
    config = load(None, {}, ())
    assert config.server.socket_mode == 0o660
    assert config.server.allowed_uids == ()
    assert config.server.sessions_max == 256
    assert config.server.drain_timeout_seconds == 10.0
    assert config.tiers.host.capacity_bytes == 4 * GIB
    assert config.tiers.host.arena == "memfd"
    assert config.tiers.host.eviction == "s3fifo"
    assert config.tiers.host.verify_commit == "sample"
    assert config.leases.ttl_seconds == 60.0
    assert config.leases.orphan_grace_seconds == 10.0
    assert (config.log.level, config.log.format) == ("info", "text")


def test_a_bare_config_is_what_nothing_loads() -> None:
    assert Config() == load(None, os.environ | {}, ())


def test_flags_win_over_the_environment_over_the_file_over_defaults(file: Path) -> None:
    file.write_text(
        '[tiers.host]\ncapacity = "1GiB"\neviction = "lru"\nprefault = false\n'
        '[leases]\nttl = "5s"\n'
    )
    environ = {"KVSTORE_TIERS__HOST__CAPACITY": "2GiB", "KVSTORE_TIERS__HOST__EVICTION": "s3fifo"}
    traced = load_traced(file, environ, ("tiers.host.capacity=3GiB",))
    host = traced.config.tiers.host
    assert (host.capacity_bytes, host.eviction, host.prefault) == (3 * GIB, "s3fifo", False)
    assert traced.config.leases.ttl_seconds == 5.0
    assert traced.origins["tiers.host.capacity"] == "--set"
    assert traced.origins["tiers.host.eviction"] == "KVSTORE_TIERS__HOST__EVICTION"
    assert traced.origins["tiers.host.prefault"] == f"{file}:4"
    assert traced.origins["leases.ttl"] == f"{file}:6"
    assert traced.origins["log.level"] == "default"


def test_of_two_flags_the_last_wins() -> None:
    assert load(None, {}, ("log.level=debug", "log.level=error")).log.level == "error"


def test_every_setting_has_an_origin() -> None:
    assert set(load_traced(None, {}, ()).origins) == set(settings())


@pytest.mark.parametrize("text", ["1000,1001", "[1000, 1001]", " 1000 , 1001 ", "[1000,1001,]"])
def test_a_list_is_read_from_a_flag(text: str) -> None:
    assert load(None, {}, (f"server.allowed_uids={text}",)).server.allowed_uids == (1000, 1001)


def test_an_empty_list_is_read_from_a_variable() -> None:
    assert load(None, {"KVSTORE_SERVER__ALLOWED_GIDS": ""}, ()).server.allowed_gids == ()


def test_dotted_and_inline_and_quoted_names_are_one_toml(file: Path) -> None:
    file.write_text('tiers.host = { capacity = "8MiB" }\n"log".level = "debug"\n')
    traced = load_traced(file, {}, ())
    assert traced.config.tiers.host.capacity_bytes == 8 * MIB
    assert traced.origins["tiers.host.capacity"] == f"{file}:1"
    assert traced.origins["log.level"] == f"{file}:2"


def test_a_number_in_a_file_is_a_size_in_bytes(file: Path) -> None:
    file.write_text("tiers.host.capacity = 2097152\n")
    assert load(file, {}, ()).tiers.host.capacity_bytes == 2 * MIB


def test_an_arena_may_be_a_path() -> None:
    config = load(None, {}, ("tiers.host.arena=/dev/shm/kvstore",))
    assert config.tiers.host.arena == "/dev/shm/kvstore"


# --- refusals: unknown names -------------------------------------------------------------


def test_an_unknown_setting_in_a_file_is_refused_with_line_and_nearest_and_range(
    file: Path,
) -> None:
    content = '# sizes\n[tiers.host]\n\ncapcity = "1GiB"\n'
    assert refusal(file, content).startswith(
        f"{file}:4: unknown setting tiers.host.capcity; the nearest is tiers.host.capacity, "
        "which must be from 1MiB to 16TiB"
    )


def test_an_unknown_table_is_refused_with_line_and_nearest(file: Path) -> None:
    content = '[log]\nlevel = "info"\n[tiers.hosts]\ncapacity = "1GiB"\n'
    expected = f"{file}:3: unknown setting tiers.hosts; the nearest is tiers.host"
    assert refusal(file, content) == expected


def test_an_unknown_table_that_only_a_deeper_header_names_has_a_line(file: Path) -> None:
    expected = f"{file}:2: unknown setting disks; the nearest is tiers.disk"
    assert refusal(file, "\n[disks.fast]\nx = 1\n") == expected


def test_an_unknown_variable_is_refused_with_the_nearest_variable() -> None:
    why = refusal(environ={"KVSTORE_TIERS_HOST_CAPACITY": "1GiB"})
    assert why.startswith(
        "KVSTORE_TIERS_HOST_CAPACITY: unknown setting KVSTORE_TIERS_HOST_CAPACITY; the nearest is "
        "KVSTORE_TIERS__HOST__CAPACITY (tiers.host.capacity), which must be from 1MiB to 16TiB"
    )


def test_an_unknown_flag_is_refused_with_the_nearest() -> None:
    why = refusal(overrides=("log.levle=info",))
    assert why == (
        "--set: unknown setting log.levle; the nearest is log.level, "
        "which must be one of debug, info, warning, error"
    )


@pytest.mark.parametrize(
    "name",
    [
        "KVSTORE_NO_NATIVE",
        "KVSTORE_SERVICE_HOST",
        "KVSTORE_SERVICE_PORT_METRICS",
        "KVSTORE_PORT",
        "KVSTORE_PORT_9000_TCP_ADDR",
        "KVSTORE_REDIS_SERVICE_HOST",
        "KVSTORE_REDIS_PORT_6379_TCP",
    ],
)
def test_variables_that_are_no_settings_are_left_alone(name: str) -> None:
    assert load(None, {name: "tcp://10.0.0.1:9000"}, ()) == Config()


def test_a_flag_without_a_value_is_refused() -> None:
    assert refusal(overrides=("log.level",)) == "--set log.level: write path=value"


def test_a_table_given_as_a_value_is_refused(file: Path) -> None:
    assert refusal(file, "tiers = 3\n") == f"{file}:1: tiers is a table, not a setting"
    assert refusal(overrides=("log=debug",)) == "--set: log is a table, not a setting"


def test_a_value_given_as_a_table_is_refused(file: Path) -> None:
    why = refusal(file, "[leases.ttl]\nseconds = 3\n")
    assert why.startswith(f"{file}:1: leases.ttl: {{'seconds': 3}} is not a text with a unit")


# --- refusals: values --------------------------------------------------------------------

BAD_VALUES = [
    ("tiers.host.capacity", '"1KiB"', "'1KiB' is out of range; it must be from 1MiB to 16TiB"),
    ("tiers.host.capacity", '"17TiB"', "'17TiB' is out of range; it must be from 1MiB to 16TiB"),
    ("tiers.host.capacity", "64", "64 is out of range; it must be from 1MiB to 16TiB"),
    ("tiers.host.capacity", '"64 Gib/s"', "'64 Gib/s' is not understood"),
    ("tiers.host.capacity", "1.5", "1.5 is not a whole number"),
    ("tiers.host.capacity", "true", "True is not a whole number"),
    ("tiers.host.eviction", '"lfu"', "'lfu' is not accepted; it must be one of s3fifo, lru"),
    ("tiers.host.eviction", "1", "1 is not accepted; it must be one of s3fifo, lru"),
    ("tiers.host.eviction", "[]", "[] is not accepted; it must be one of s3fifo, lru"),
    ("tiers.host.arena", '"shm"', "'shm' is not an absolute path; it must be memfd, or"),
    ("tiers.host.verify_load", '"maybe"', "'maybe' is not accepted; it must be true or false"),
    ("tiers.host.verify_load", "1", "1 is not accepted; it must be true or false"),
    ("leases.ttl", '"500ms"', "'500ms' is out of range; it must be from 1s to 1h"),
    ("leases.ttl", '"2h"', "'2h' is out of range; it must be from 1s to 1h"),
    ("leases.ttl", "60", "60 is not a text with a unit; it must be from 1s to 1h"),
    ("leases.orphan_grace", '"11min"', "'11min' is out of range; it must be from 0s to 10min"),
    ("server.sessions_max", "0", "0 is out of range; it must be a whole number from 1 to 4096"),
    ("server.sessions_max", "4097", "4097 is out of range; it must be a whole number"),
    ("server.sessions_max", "1.0", "1.0 is not a whole number; it must be a whole number"),
    ("server.sessions_max", '"many"', "'many' is not a whole number; it must be"),
    ("server.socket_mode", "660", "660 is not accepted; it must be a text of four octal digits"),
    ("server.socket_mode", '"0444"', "'0444' is not accepted; it must be a text of four octal"),
    ("server.socket_mode", '"0888"', "'0888' is not accepted; it must be a text of four octal"),
    ("server.socket", '"kvstore.sock"', "'kvstore.sock' is not an absolute path; it must be"),
    ("server.socket", '"/a\\u0000b"', "is not an absolute path"),
    ("server.socket", '"/' + "x" * 107 + '"', "has 108 bytes; it must be an absolute path of at"),
    ("server.allowed_uids", "1000", "1000 is not a list; it must be a list of numeric ids"),
    ("server.allowed_uids", "[-1]", "[-1] is out of range; it must be a list of numeric ids"),
    ("server.allowed_uids", '["root"]', "'root' is not a whole number; it must be a list of"),
    (
        "log.level",
        '"loud"',
        "'loud' is not accepted; it must be one of debug, info, warning, error",
    ),
]


@pytest.mark.parametrize(("path", "value", "reason"), BAD_VALUES)
def test_a_bad_value_in_a_file_is_refused_with_line_and_what_is_allowed(
    file: Path, path: str, value: str, reason: str
) -> None:
    table, _, name = path.rpartition(".")
    why = refusal(file, f"\n[{table}]\n{name} = {value}\n")
    assert why.startswith(f"{file}:3: {path}: ")
    assert reason in why
    assert settings()[path].kind.allowed in why


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("tiers.host.capacity", "lots"),
        ("tiers.host.prefault", "yes"),
        ("leases.ttl", "60"),
        ("server.allowed_uids", "1000,root"),
        ("server.allowed_uids", "1000, ]["),
        ("server.sessions_max", "-1"),
        ("server.sessions_max", ""),
    ],
)
def test_a_bad_value_in_a_variable_or_flag_is_refused_with_what_is_allowed(
    path: str, text: str
) -> None:
    variable = "KVSTORE_" + path.upper().replace(".", "__")
    allowed = settings()[path].kind.allowed
    from_variable = refusal(environ={variable: text})
    from_flag = refusal(overrides=(f"{path}={text}",))
    assert from_variable.startswith(f"{variable}: {path}: ")
    assert from_flag.startswith(f"--set: {path}: ")
    assert allowed in from_variable
    assert allowed in from_flag


def test_all_problems_are_told_at_once_one_a_line(file: Path) -> None:
    why = refusal(
        file, '[log]\nlevle = "x"\nformat = "xml"\n', {"KVSTORE_LOG__LEVEL": "x"}, ("a.b=1",)
    )
    starts = [f"{file}:2:", f"{file}:3:", "KVSTORE_LOG__LEVEL:", "--set:"]
    lines = why.splitlines()
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


# --- refusals: files ---------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load(missing, {}, ())


def test_a_file_that_is_no_toml_is_refused_with_its_line(file: Path) -> None:
    assert refusal(file, "[log]\nlevel = \n").startswith(f"{file}:2: is not TOML: ")


def test_a_file_that_ends_too_early_is_refused(file: Path) -> None:
    assert refusal(file, "[log").startswith(f"{file}")


def test_a_file_that_is_no_text_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"kvstore\.toml: is not UTF-8 text"):
        load(file, {}, ())


# --- writing -----------------------------------------------------------------------------


def test_what_is_shown_loads_to_the_same(file: Path) -> None:
    overrides = ("tiers.host.capacity=1536MiB", "leases.ttl=90s", "server.allowed_uids=7")
    config = load(None, {}, overrides)
    lines = [f"{path} = {json.dumps(value)}" for path, value in plain(config).items()]
    file.write_text("\n".join(lines))
    assert load(file, {}, ()) == config


def test_the_schema_knows_every_setting_and_nothing_else() -> None:
    found: set[str] = set()

    def walk(schema: dict, prefix: str) -> None:
        assert schema["additionalProperties"] is False
        for name, inner in schema["properties"].items():
            if name in {"tenants", "peers"}:
                assert set(inner["additionalProperties"]["properties"]) == set(named_settings(name))
            elif "properties" in inner:
                walk(inner, f"{prefix}{name}.")
            else:
                assert inner["description"].startswith("Must be ")
                found.add(prefix + name)

    walk(json.loads(json.dumps(json_schema())), "")
    assert found == set(settings())


def test_the_schema_has_the_defaults_as_people_write_them() -> None:
    host = json_schema()["properties"]["tiers"]["properties"]["host"]["properties"]
    assert host["capacity"]["default"] == "4GiB"
    assert "default" not in json_schema()["properties"]["server"]["properties"]["socket"]


def test_all_defaults_are_what_their_own_kind_accepts() -> None:
    for path, value in plain(Config()).items():
        assert settings()[path].kind.write(settings()[path].kind.read(value)) == value


# --- where the socket is -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "environ", "path"),
    [
        (0, {"XDG_RUNTIME_DIR": "/run/user/0"}, "/run/kvstore/kvstore.sock"),
        (7, {"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/kvstore/kvstore.sock"),
        (7, {}, "/tmp/kvstore-7/kvstore.sock"),
        (7, {"XDG_RUNTIME_DIR": "relative"}, "/tmp/kvstore-7/kvstore.sock"),
    ],
)
def test_the_default_socket_depends_on_the_user(
    monkeypatch: pytest.MonkeyPatch, uid: int, environ: dict[str, str], path: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert default_socket_path(environ) == Path(path)
    assert load(None, environ, ()).server.socket == Path(path)


def test_toml_reads_what_json_writes() -> None:
    text = 'quote " back \\ newline \n tab \t é'
    assert tomllib.loads(f"x = {json.dumps(text)}")["x"] == text
