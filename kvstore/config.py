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
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, TypeVar, get_args

import msgspec

from kvstore.errors import ConfigError
from kvstore.limits import (
    ARENA_SIZE_MAX_BYTES,
    ARENA_SIZE_MIN_BYTES,
    DISK_SIZE_MAX_BYTES,
    DISK_SIZE_MIN_BYTES,
    GIB,
    LEASE_TTL_MAX_SECONDS,
    LEASE_TTL_MIN_SECONDS,
    POOL_SIZE_MAX_BYTES,
    SESSIONS_MAX,
    TENANT_NAME_MAX_CHARS,
)
from kvstore.settings import (
    AddressKind,
    ArenaKind,
    ChoiceKind,
    CodecKind,
    CountKind,
    DurationKind,
    FlagKind,
    HostListKind,
    IdListKind,
    Kind,
    ListenAddress,
    ModeKind,
    PathKind,
    PatternKind,
    Plain,
    PrefixKind,
    SizeKind,
    SocketKind,
    UrlKind,
)
from kvstore.sources import Found, from_environment, from_file, from_overrides, variable_of

_Table = TypeVar("_Table", bound=msgspec.Struct)

DEFAULT_ORIGIN: Final = "default"


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


class DeviceTierConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Memory of one GPU, which engines on it share; off without a capacity."""

    capacity_bytes: Annotated[int, SizeKind(0, POOL_SIZE_MAX_BYTES)] = msgspec.field(
        default=0, name="capacity"
    )
    gpu: Annotated[str, PatternKind(r"\d{1,3}|standin", "the number of a GPU, or standin")] = "0"
    """`standin` is host memory in its place, for tests and trials."""


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


WritePolicy = Literal["through", "back", "on_evict", "never"]
AdmissionName = Literal["all", "second_touch", "tinylfu"]
_WRITE: Final = ChoiceKind(("through", "back", "on_evict", "never"))
_ADMISSION: Final = ChoiceKind(("all", "second_touch", "tinylfu"))


class DiskTierConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A directory that keeps chunks across restarts; off without a path."""

    path: Annotated[str, PathKind()] = ""
    capacity_bytes: Annotated[int, SizeKind(DISK_SIZE_MIN_BYTES, DISK_SIZE_MAX_BYTES)] = (
        msgspec.field(default=64 * GIB, name="capacity")
    )
    write: Annotated[WritePolicy, _WRITE] = "back"
    admission: Annotated[AdmissionName, _ADMISSION] = "all"
    codec: Annotated[str, CodecKind()] = ""
    """What chunks are made smaller with on their way down; empty: they stay as they were stored."""
    eviction: Annotated[Literal["s3fifo", "lru"], ChoiceKind(("s3fifo", "lru"))] = "s3fifo"
    direct: Annotated[Literal["auto", "off"], ChoiceKind(("auto", "off"))] = "auto"


class RedisTierConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Redis or Valkey that hosts share; off without a URL."""

    url: Annotated[str, UrlKind()] = ""
    password_file: Annotated[str, PathKind()] = ""
    ca_file: Annotated[str, PathKind()] = ""
    prefix: Annotated[str, PrefixKind()] = "kvstore"
    ttl_seconds: Annotated[float, DurationKind(0.0, 365 * 86_400.0)] = msgspec.field(
        default=7 * 86_400.0, name="ttl"
    )
    """0 for none."""
    connections: Annotated[int, CountKind(1, 64)] = 4
    write: Annotated[WritePolicy, _WRITE] = "back"
    admission: Annotated[AdmissionName, _ADMISSION] = "all"
    codec: Annotated[str, CodecKind()] = ""
    """As that of the disk tier."""
    timeout_seconds: Annotated[float, DurationKind(0.05, 60.0)] = msgspec.field(
        default=1.0, name="timeout"
    )


class TiersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where chunks are kept, fastest first."""

    device: DeviceTierConfig = DeviceTierConfig()
    host: HostTierConfig = HostTierConfig()
    disk: DiskTierConfig = DiskTierConfig()
    redis: RedisTierConfig = RedisTierConfig()


class TenantConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tenant: who may act for it, and what it may take of the tiers; 0 is no quota."""

    uids: Annotated[tuple[int, ...], IdListKind()] = ()
    """Besides root and the daemon's own user."""
    shared: Annotated[bool, FlagKind()] = False
    """Whether it uses the namespaces of everybody, instead of its own."""
    quota_bytes: Annotated[int, SizeKind(0, ARENA_SIZE_MAX_BYTES)] = msgspec.field(
        default=0, name="quota"
    )
    floor_bytes: Annotated[int, SizeKind(0, ARENA_SIZE_MAX_BYTES)] = msgspec.field(
        default=0, name="floor"
    )
    disk_quota_bytes: Annotated[int, SizeKind(0, DISK_SIZE_MAX_BYTES)] = msgspec.field(
        default=0, name="disk_quota"
    )
    disk_floor_bytes: Annotated[int, SizeKind(0, DISK_SIZE_MAX_BYTES)] = msgspec.field(
        default=0, name="disk_floor"
    )


class LeasesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long chunks in use are held for their readers."""

    ttl_seconds: Annotated[float, DurationKind(LEASE_TTL_MIN_SECONDS, LEASE_TTL_MAX_SECONDS)] = (
        msgspec.field(default=60.0, name="ttl")
    )
    orphan_grace_seconds: Annotated[float, DurationKind(0.0, 600.0)] = msgspec.field(
        default=10.0, name="orphan_grace"
    )
    """How long room of an ended session is kept while its process may still write to it."""


class AdminConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The admin API: status, metrics, explanations and the dashboard; off without an address.

    Beyond loopback it needs tokens and TLS, unless *insecure* says that something else guards it.
    """

    listen: Annotated[ListenAddress | None, AddressKind()] = ListenAddress("127.0.0.1", 7411)
    token_file: Annotated[str, PathKind()] = ""
    """Lines of a scope (read, write or admin) and a token."""
    tls_cert_file: Annotated[str, PathKind()] = ""
    tls_key_file: Annotated[str, PathKind()] = ""
    allowed_hosts: Annotated[tuple[str, ...], HostListKind()] = ()
    """Names by which it may be asked for, besides its own address and localhost."""
    insecure: Annotated[bool, FlagKind()] = False


_PEER_NAME: Final = PatternKind(
    r"[A-Za-z0-9_-]{0,64}", "a name of at most 64 letters, digits, - and _, or empty"
)
_PEER_URL: Final = PatternKind(
    r"(tcp|tls)://([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}",
    "tcp://HOST:PORT, or tls://HOST:PORT",
)


class PeerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where daemons of other hosts may call; off without an address.

    Beyond loopback it needs TLS, unless *insecure* says that something else guards the network.
    """

    listen: Annotated[ListenAddress | None, AddressKind()] = None
    name: Annotated[str, _PEER_NAME] = ""
    """What other daemons call this one, in their tables `peers.NAME`; empty: its host name."""
    token_file: Annotated[str, PathKind()] = ""
    """What callers must know, and those who are called where they have no file of their own."""
    tls_cert_file: Annotated[str, PathKind()] = ""
    tls_key_file: Annotated[str, PathKind()] = ""
    insecure: Annotated[bool, FlagKind()] = False
    share: Annotated[bool, FlagKind()] = False
    """Whether to let peers have what the host tier holds, and to ask them; needs a Redis tier."""
    transport: Annotated[Literal["tcp", "nixl"], ChoiceKind(("tcp", "nixl"))] = "tcp"
    """How bytes of hand-offs come: `nixl` needs the extra `nixl` and *insecure*, on both hosts."""


class RemoteConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One daemon of another host, which hand-offs and chunks are taken from."""

    url: Annotated[str, _PEER_URL] = ""
    token_file: Annotated[str, PathKind()] = ""
    ca_file: Annotated[str, PathKind()] = ""
    """Who signs its certificate; empty for those whom this system trusts."""


_SPANS_URL: Final = PatternKind(
    r"(https?://[A-Za-z0-9_.:\[\]-]+/\S*)?",
    "the URL of an OTLP/HTTP receiver, such as http://127.0.0.1:4318/v1/traces, or empty for none",
)


class TracingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where requests that belong to an engine's trace are told of; off without an endpoint."""

    endpoint: Annotated[str, _SPANS_URL] = ""
    """Needs the extra `otel`."""


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is logged, and how."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        ChoiceKind(("debug", "info", "warning", "error")),
    ] = "info"
    format: Annotated[Literal["text", "json"], ChoiceKind(("text", "json"))] = "text"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. `Config()` holds the defaults.

    Tenants and peers have the names that one gives them.
    """

    server: ServerConfig = msgspec.field(default_factory=ServerConfig)
    tiers: TiersConfig = TiersConfig()
    leases: LeasesConfig = LeasesConfig()
    admin: AdminConfig = AdminConfig()
    peer: PeerConfig = PeerConfig()
    tracing: TracingConfig = TracingConfig()
    log: LogConfig = LogConfig()
    tenants: dict[str, TenantConfig] = {}
    peers: dict[str, RemoteConfig] = {}


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
    sources = (from_file(file, _is_table), from_environment(environ), from_overrides(overrides))
    for found in chain(*sources):
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
    shown = {
        path: setting.kind.write(functools.reduce(getattr, setting.fields, config))
        for path, setting in settings().items()
    }
    for table in NAMED_TABLES:
        for name, one in getattr(config, table).items():
            for field, setting in named_settings(table).items():
                value = functools.reduce(getattr, setting.fields, one)
                shown[f"{table}.{name}.{field}"] = setting.kind.write(value)
    return shown


class Setting(NamedTuple):
    """One setting: what it accepts, and the fields that lead to its value."""

    kind: Kind
    fields: tuple[str, ...]


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Return path -> setting, in the order of declaration; of tenants and peers see below."""
    return dict(_walk(Config, "", ()))


# Tables of tables, each with a name that one gives it.
NAMED_TABLES: Final[Mapping[str, type[msgspec.Struct]]] = {
    "tenants": TenantConfig,
    "peers": RemoteConfig,
}


@functools.cache
def named_settings(table: str) -> Mapping[str, Setting]:
    """Return name -> setting of what every table `tenants.NAME`, or `peers.NAME`, may hold."""
    return dict(_walk(NAMED_TABLES[table], "", ()))


_NAMED_PATH: Final = re.compile(
    rf"({'|'.join(NAMED_TABLES)})\.([A-Za-z0-9_-]{{1,{TENANT_NAME_MAX_CHARS}}})(?:\.(\w+))?"
)


def setting_at(path: str) -> Setting | None:
    """Return the setting at *path*, that of a tenant or a peer included, or None."""
    named = _NAMED_PATH.fullmatch(path)
    return named_settings(named[1]).get(named[3] or "") if named else settings().get(path)


def _walk(
    table: type[msgspec.Struct], prefix: str, fields: tuple[str, ...]
) -> Iterator[tuple[str, Setting]]:
    for field in msgspec.structs.fields(table):
        path = f"{prefix}{field.encode_name}"
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _walk(field.type, f"{path}.", (*fields, field.name))
        elif path not in NAMED_TABLES:
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
        elif path in NAMED_TABLES:
            chosen[field.name] = _build_named(path, values)
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            chosen[field.name] = _build(field.type, values, f"{path}.")
    return table(**chosen)


def _build_named(table: str, values: Mapping[str, object]) -> dict[str, msgspec.Struct]:
    fields: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        named = _NAMED_PATH.fullmatch(path)
        if named and named[1] == table:
            (field,) = named_settings(table)[named[3]].fields
            fields.setdefault(named[2], {})[field] = value
    return {name: NAMED_TABLES[table](**chosen) for name, chosen in fields.items()}


def _is_table(path: str) -> bool:
    named = _NAMED_PATH.fullmatch(path)
    return path in _tables() or path in NAMED_TABLES or (named is not None and named[3] is None)


def _read(found: Found) -> object:
    """Return the checked value; raises `ConfigError` that says what would be right."""
    setting = setting_at(found.path)
    if setting is None:
        raise ConfigError(_unknown(found))
    try:
        return setting.kind.read(found.raw)
    except ValueError as error:
        raise ConfigError(
            f"{found.origin}: {found.path}: {error}; it must be {setting.kind.allowed}"
        ) from None


def _unknown(found: Found) -> str:
    if _is_table(found.path):
        return f"{found.origin}: {found.path} is a table, not a setting"
    known = _tables() if isinstance(found.raw, dict) else _settings_near(found.path)
    nearest = difflib.get_close_matches(found.path, known, n=1, cutoff=0.0)[0]
    is_variable = found.spelled != found.path
    advice = f"{variable_of(nearest)} ({nearest})" if is_variable else nearest
    setting = setting_at(nearest)
    if setting is not None:
        advice += f", which must be {setting.kind.allowed}"
    return f"{found.origin}: unknown setting {found.spelled}; the nearest is {advice}"


def _settings_near(path: str) -> Sequence[str]:
    """Return the settings that *path* could stand for: those of its tenant, or its peer."""
    parts = path.split(".")
    if parts[0] in NAMED_TABLES and len(parts) > 2:
        return [f"{parts[0]}.{parts[1]}.{field}" for field in named_settings(parts[0])]
    return tuple(settings())


@functools.cache
def _tables() -> tuple[str, ...]:
    """Return the paths of all tables."""
    parts = (path.split(".")[:-1] for path in settings())
    paths = (".".join(names[:end]) for names in parts for end in range(1, len(names) + 1))
    return tuple(dict.fromkeys(paths))
