"""The daemon's configuration: defaults < TOML file < environment < `--set`.

`load` refuses what it does not know or what is out of range, and says where it stands, what
the nearest known name is and what is allowed. Names in a file are those of people
(`capacity = "64GiB"`); fields here carry their unit (`capacity_bytes`).
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, TypeVar, get_args

import msgspec

from kvstore.errors import ConfigError
from kvstore.limits import (
    ARENA_SIZE_MAX_BYTES,
    ARENA_SIZE_MIN_BYTES,
    GIB,
    LEASE_TTL_MAX_SECONDS,
    LEASE_TTL_MIN_SECONDS,
    SESSIONS_MAX,
)
from kvstore.settings import (
    ArenaKind,
    ChoiceKind,
    CountKind,
    DurationKind,
    FlagKind,
    IdListKind,
    Kind,
    ModeKind,
    Plain,
    Schema,
    SizeKind,
    SocketKind,
)

_Table = TypeVar("_Table", bound=msgspec.Struct)

ENVIRONMENT_PREFIX: Final = "KVSTORE_"
DEFAULT_ORIGIN: Final = "default"

# Variables that are no settings: switches of other parts, and those that Kubernetes sets in
# every pod beside a service that happens to be called kvstore.
_NO_SETTINGS: Final = re.compile(
    r"KVSTORE_(NO_NATIVE|(\w+_)?SERVICE_(HOST|PORT(_\w+)?)|(\w+_)?PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
)


def default_socket_path(environ: Mapping[str, str]) -> Path:
    """Return where daemon and clients of this user meet when nobody says otherwise."""
    if os.geteuid() == 0:
        return Path("/run/kvstore/kvstore.sock")
    runtime_directory = environ.get("XDG_RUNTIME_DIR", "")
    if runtime_directory.startswith("/"):
        return Path(runtime_directory, "kvstore", "kvstore.sock")
    return Path(f"/tmp/kvstore-{os.geteuid()}/kvstore.sock")  # noqa: S108  # its directory is 0750


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The data socket and who may use it."""

    socket: Annotated[Path, SocketKind()] = msgspec.field(
        default_factory=lambda: default_socket_path(os.environ)
    )
    socket_mode: Annotated[int, ModeKind()] = 0o660
    allowed_uids: Annotated[tuple[int, ...], IdListKind()] = ()
    """Besides root and the daemon's own user."""
    allowed_gids: Annotated[tuple[int, ...], IdListKind()] = ()
    sessions_max: Annotated[int, CountKind(1, 4096)] = SESSIONS_MAX
    drain_timeout_seconds: Annotated[float, DurationKind(0.0, 600.0)] = msgspec.field(
        default=10.0, name="drain_timeout"
    )


class HostTierConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arena: shared memory that engines map."""

    capacity_bytes: Annotated[int, SizeKind(ARENA_SIZE_MIN_BYTES, ARENA_SIZE_MAX_BYTES)] = (
        msgspec.field(default=4 * GIB, name="capacity")
    )
    arena: Annotated[str, ArenaKind()] = "memfd"
    huge_pages: Annotated[Literal["auto", "off"], ChoiceKind(("auto", "off"))] = "auto"
    prefault: Annotated[bool, FlagKind()] = True
    eviction: Annotated[Literal["s3fifo", "lru"], ChoiceKind(("s3fifo", "lru"))] = "s3fifo"
    checksum: Annotated[Literal["xxh3", "off"], ChoiceKind(("xxh3", "off"))] = "xxh3"
    verify_commit: Annotated[
        Literal["root", "sample", "full"], ChoiceKind(("root", "sample", "full"))
    ] = "sample"
    verify_load: Annotated[bool, FlagKind()] = True


class TiersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where chunks are kept, fastest first."""

    host: HostTierConfig = HostTierConfig()


class LeasesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long chunks in use are held for their readers."""

    ttl_seconds: Annotated[float, DurationKind(LEASE_TTL_MIN_SECONDS, LEASE_TTL_MAX_SECONDS)] = (
        msgspec.field(default=60.0, name="ttl")
    )
    orphan_grace_seconds: Annotated[float, DurationKind(0.0, 600.0)] = msgspec.field(
        default=10.0, name="orphan_grace"
    )
    """How long room of an ended session is kept while its process may still write to it."""


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is logged, and how."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        ChoiceKind(("debug", "info", "warning", "error")),
    ] = "info"
    format: Annotated[Literal["text", "json"], ChoiceKind(("text", "json"))] = "text"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. `Config()` holds the defaults."""

    server: ServerConfig = msgspec.field(default_factory=ServerConfig)
    tiers: TiersConfig = TiersConfig()
    leases: LeasesConfig = LeasesConfig()
    log: LogConfig = LogConfig()


class TracedConfig(NamedTuple):
    """A configuration, and for every setting where its value comes from.

    An origin is `default`, `file:line`, the name of a variable, or `--set`.
    """

    config: Config
    origins: Mapping[str, str]


def load(file: Path | None, environ: Mapping[str, str], overrides: Sequence[str]) -> Config:
    """Return the configuration; raises `ConfigError` with one line per problem."""
    return load_traced(file, environ, overrides).config


def load_traced(
    file: Path | None, environ: Mapping[str, str], overrides: Sequence[str]
) -> TracedConfig:
    """Like `load`, with the origin of every value."""
    values: dict[str, object] = {"server.socket": default_socket_path(environ)}
    origins = dict.fromkeys(settings(), DEFAULT_ORIGIN)
    problems: list[str] = []
    for found in (*_from_file(file), *_from_environment(environ), *_from_overrides(overrides)):
        try:
            values[found.path] = _read(found)
            origins[found.path] = found.origin
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return TracedConfig(_build(Config, values), origins)


def plain(config: Config) -> dict[str, Plain]:
    """Return path -> value of every setting, as a file would hold it."""
    return {
        path: setting.kind.write(functools.reduce(getattr, setting.fields, config))
        for path, setting in settings().items()
    }


def json_schema() -> Schema:
    """Return the JSON schema of a configuration file."""
    root: Schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "kvstore configuration",
        **_table_schema(Config),
    }
    return root


class Setting(NamedTuple):
    """One setting: what it accepts, and the fields that lead to its value."""

    kind: Kind
    fields: tuple[str, ...]


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Return path -> setting, in the order of declaration."""
    return dict(_walk(Config, "", ()))


class _Found(NamedTuple):
    """A value that somebody gave, before anyone has looked at it."""

    path: str
    raw: object
    origin: str
    spelled: str
    """The name as it was written there: a path, or a variable."""


def _walk(
    table: type[msgspec.Struct], prefix: str, fields: tuple[str, ...]
) -> Iterator[tuple[str, Setting]]:
    for field in msgspec.structs.fields(table):
        path = f"{prefix}{field.encode_name}"
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _walk(field.type, f"{path}.", (*fields, field.name))
        else:
            yield path, Setting(_kind_of(field), (*fields, field.name))


def _kind_of(field: msgspec.structs.FieldInfo) -> Kind:
    kind: Kind = get_args(field.type)[1]
    return kind


def _build(table: type[_Table], values: Mapping[str, object], prefix: str = "") -> _Table:
    """Make *table* and all below it; what is not among *values* keeps its default."""
    chosen: dict[str, object] = {}
    for field in msgspec.structs.fields(table):
        path = f"{prefix}{field.encode_name}"
        if path in values:
            chosen[field.name] = values[path]
        elif path not in settings():
            chosen[field.name] = _build(field.type, values, f"{path}.")
    return table(**chosen)


def _read(found: _Found) -> object:
    """Return the checked value; raises `ConfigError` that says what would be right."""
    setting = settings().get(found.path)
    if setting is None:
        raise ConfigError(_unknown(found))
    try:
        return setting.kind.read(found.raw)
    except ValueError as error:
        raise ConfigError(
            f"{found.origin}: {found.path}: {error}; it must be {setting.kind.allowed}"
        ) from None


def _unknown(found: _Found) -> str:
    if found.path in _tables():
        return f"{found.origin}: {found.path} is a table, not a setting"
    known = _tables() if isinstance(found.raw, dict) else tuple(settings())
    nearest = difflib.get_close_matches(found.path, known, n=1, cutoff=0.0)[0]
    is_variable = found.spelled != found.path
    advice = f"{_variable(nearest)} ({nearest})" if is_variable else nearest
    if nearest in settings():
        advice += f", which must be {settings()[nearest].kind.allowed}"
    return f"{found.origin}: unknown setting {found.spelled}; the nearest is {advice}"


@functools.cache
def _tables() -> tuple[str, ...]:
    """Return the paths of all tables."""
    parts = (path.split(".")[:-1] for path in settings())
    paths = (".".join(names[:end]) for names in parts for end in range(1, len(names) + 1))
    return tuple(dict.fromkeys(paths))


# --- where values come from ------------------------------------------------------------


def _from_file(file: Path | None) -> Iterator[_Found]:
    if file is None:
        return
    try:
        text = file.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_problem(file, error)) from None
    lines = _line_numbers(text)
    for path, raw in _flatten(content, ""):
        yield _Found(path, raw, f"{file}:{_line_of(path, lines)}", path)


def _syntax_problem(file: Path, error: tomllib.TOMLDecodeError) -> str:
    """Put the line where every other problem has it."""
    position = re.search(r" \(at line (\d+), column \d+\)$", str(error))
    if position is None:
        return f"{file}: is not TOML: {error}"
    return f"{file}:{position[1]}: is not TOML: {str(error)[: position.start()]}"


def _flatten(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, raw in table.items():
        path = f"{prefix}{name}"
        if isinstance(raw, dict) and path in _tables():
            yield from _flatten(raw, f"{path}.")
        else:
            yield path, raw


_TABLE_LINE: Final = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]")
_VALUE_LINE: Final = re.compile(r"""\s*([A-Za-z0-9_\-."' \t]+?)\s*=""")


def _line_numbers(text: str) -> dict[str, int]:
    """Return path -> line of every table header and value (tomllib does not tell)."""
    lines: dict[str, int] = {}
    prefix = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE_LINE.match(line):
            path = _bare(header[1])
            prefix = f"{path}."
        elif value := _VALUE_LINE.match(line):
            path = prefix + _bare(value[1])
        else:
            continue
        lines.setdefault(path, number)
    return lines


def _bare(name: str) -> str:
    """Return a dotted name without the quotes and spaces that TOML allows in it."""
    return ".".join(part.strip().strip("\"'") for part in name.split("."))


def _line_of(path: str, lines: Mapping[str, int]) -> int:
    """Return the line of *path*, or of the table that it stands in."""
    while path and path not in lines:
        # `[tiers.hosts]` is seen as a value of `tiers`, which has no line of its own.
        below = [number for known, number in lines.items() if known.startswith(f"{path}.")]
        if below:
            return min(below)
        path = path.rpartition(".")[0]
    return lines.get(path, 1)


def _from_environment(environ: Mapping[str, str]) -> Iterator[_Found]:
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX) and not _NO_SETTINGS.fullmatch(name):
            path = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            yield _Found(path, environ[name], name, name)


def _variable(path: str) -> str:
    return ENVIRONMENT_PREFIX + path.upper().replace(".", "__")


def _from_overrides(overrides: Iterable[str]) -> Iterator[_Found]:
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: write path=value")
        yield _Found(path.strip(), text.strip(), "--set", path.strip())


# --- for editors -----------------------------------------------------------------------


def _table_schema(table: type[msgspec.Struct], prefix: str = "") -> Schema:
    properties: dict[str, Schema] = {}
    defaults = plain(Config())
    for field in msgspec.structs.fields(table):
        path = f"{prefix}{field.encode_name}"
        setting = settings().get(path)
        if setting is None:
            properties[field.encode_name] = _table_schema(field.type, f"{path}.")
            continue
        properties[field.encode_name] = {
            "description": f"Must be {setting.kind.allowed}.",
            **setting.kind.schema(),
        }
        if path != "server.socket":  # its default depends on the user
            properties[field.encode_name]["default"] = defaults[path]
    return {
        "type": "object",
        "description": (table.__doc__ or "").strip(),
        "additionalProperties": False,
        "properties": properties,
    }
