"""The settings of the Redis tier, checked before anything is dialled; secrets come from files."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from kvstore.config import RedisTierConfig
from kvstore.errors import ConfigError
from kvstore.limits import (
    KIB,
    REDIS_CONNECTIONS_MAX,
    REDIS_PREFIX_MAX_CHARS,
    REDIS_SECRET_MAX_BYTES,
    REDIS_STRIPE_BYTES,
    REDIS_TIMEOUT_MAX_SECONDS,
    REDIS_TIMEOUT_MIN_SECONDS,
)
from kvstore.tiers.redis_dial import Access
from kvstore.tiers.redis_url import RedisUrl, parse_url
from kvstore.tiers.redis_wire import LaneError

_TTL_MAX_SECONDS: Final = 10 * 365 * 24 * 3600.0
_PREFIX_CHARS: Final = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:"
)


class Pace(NamedTuple):
    """How one shard is moved: over how many lanes, and how many bytes unanswered on each.

    A server on this host is fastest with one lane that loads and one that stores, and one full
    stripe at a time on each: more only fight for its one thread. A short last stripe goes along
    where it is loaded, not where it is stored: behind a full one it costs the server more than
    the next round trip. Over a network, more of both hide its latency.
    """

    lanes: int
    window: int
    stores_singly: bool = False

    @property
    def store_window(self) -> int:
        """The window of a lane that stores; of 0 bytes, it is one stripe."""
        return 0 if self.stores_singly else self.window


_SHORT_STRIPE_BYTES: Final = 512 * KIB
LOCAL_WINDOW_BYTES: Final = REDIS_STRIPE_BYTES + _SHORT_STRIPE_BYTES
REMOTE_WINDOW_BYTES: Final = 2 * REDIS_STRIPE_BYTES + _SHORT_STRIPE_BYTES


class RedisSettings(NamedTuple):
    """How a tier works, checked."""

    url: RedisUrl
    password_file: Path | None = None
    ca_file: Path | None = None
    prefix: str = "kvstore"
    ttl_seconds: float = 7 * 24 * 3600.0
    connections: int = 4
    timeout_seconds: float = 1.0

    def access(self, *, with_password: bool = True) -> Access:
        """Return what servers are told; the secret is read anew, for it may have changed."""
        return Access(
            self.url.username if with_password else "",
            read_secret(self.password_file) if with_password else "",
            self.url.database,
            self.url.tls,
            None if self.ca_file is None else str(self.ca_file),
            self.timeout_seconds,
        )

    @property
    def pace(self) -> Pace:
        """What suits the way to the servers."""
        is_one_host = all(seed.is_local for seed in self.url.seeds)
        if is_one_host:
            return Pace(1, LOCAL_WINDOW_BYTES, stores_singly=True)
        return Pace(self.connections, REMOTE_WINDOW_BYTES)


def check_settings(
    url: str,
    *,
    password_file: Path | None = None,
    ca_file: Path | None = None,
    prefix: str = "kvstore",
    ttl_seconds: float = 7 * 24 * 3600.0,
    connections: int = 4,
    timeout_seconds: float = 1.0,
) -> RedisSettings:
    """Return the settings; raises `ConfigError` that names what is wrong and what is allowed."""
    parsed = parse_url(url)
    if not 0 < len(prefix) <= REDIS_PREFIX_MAX_CHARS or set(prefix) - _PREFIX_CHARS:
        raise ConfigError(
            f"redis prefix {prefix!r}: 1 to {REDIS_PREFIX_MAX_CHARS} letters, digits, '-', '_', "
            "'.' or ':' are allowed"
        )
    for name, value, least, most in (
        ("ttl", ttl_seconds, 0, _TTL_MAX_SECONDS),
        ("connections", connections, 1, REDIS_CONNECTIONS_MAX),
        ("timeout", timeout_seconds, REDIS_TIMEOUT_MIN_SECONDS, REDIS_TIMEOUT_MAX_SECONDS),
    ):
        if not least <= value <= most:
            raise ConfigError(f"redis {name} is {value}; {least} to {most} is allowed")
    if ca_file is not None and not parsed.tls:
        raise ConfigError("redis ca_file is set, but the url has no TLS; write rediss://")
    try:
        read_secret(password_file)
        if ca_file is not None:
            ca_file.read_bytes()
    except (LaneError, OSError) as error:
        raise ConfigError(f"redis: {error}") from None
    return RedisSettings(
        parsed, password_file, ca_file, prefix, ttl_seconds, connections, timeout_seconds
    )


def read_secret(path: Path | None) -> str:
    """Return the first line of *path*; raises `LaneError` naming the file, never its content."""
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            content = file.read(REDIS_SECRET_MAX_BYTES + 1)
        secret = content.split(b"\n")[0].rstrip(b"\r").decode()
    except OSError as error:
        raise LaneError(f"password_file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LaneError(f"password_file {path} is not UTF-8 text") from None
    if len(content) > REDIS_SECRET_MAX_BYTES:
        raise LaneError(f"password_file {path} has more than {REDIS_SECRET_MAX_BYTES} bytes")
    return secret


def redis_settings(configured: RedisTierConfig) -> RedisSettings:
    """Return the settings that a configuration stands for; raises `ConfigError`."""
    return check_settings(
        configured.url,
        password_file=Path(configured.password_file) if configured.password_file else None,
        ca_file=Path(configured.ca_file) if configured.ca_file else None,
        prefix=configured.prefix,
        ttl_seconds=configured.ttl_seconds,
        connections=configured.connections,
        timeout_seconds=configured.timeout_seconds,
    )
