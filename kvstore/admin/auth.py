"""Who may do what over the admin API: bearer tokens, scopes, and the rate of requests."""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.errors import ConfigError
from kvstore.limits import (
    ADMIN_ADDRESSES_MAX,
    ADMIN_TOKEN_FILE_MAX_BYTES,
    ADMIN_TOKEN_MAX_CHARS,
    ADMIN_TOKEN_MIN_CHARS,
    ADMIN_TOKENS_MAX,
)

_WORLD_READABLE: Final = 0o004


class Scope(IntEnum):
    """What a token allows; each includes those before it."""

    READ = 1
    WRITE = 2
    ADMIN = 3


class Grant(NamedTuple):
    """One token, as its digest, and its place in the file, which is how logs name it."""

    scope: Scope
    digest: bytes
    line: int


class Tokens:
    """All tokens of one file."""

    def __init__(self, grants: tuple[Grant, ...]) -> None:
        self._grants = grants

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._grants)

    def judge(self, token: str) -> Grant | None:
        """Return what *token* allows, or None. Takes equally long whichever it is, or none."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found: Grant | None = None
        for grant in self._grants:
            if hmac.compare_digest(grant.digest, digest):
                found = grant
        return found


def read_tokens(path: str) -> Tokens:
    """Return the tokens in the file *path* (none for an empty path).

    A line holds a scope and a token of at least 128 bits. Raises `ConfigError` naming the file
    and the line, never what it holds.
    """
    if not path:
        return Tokens(())
    try:
        with Path(path).open("rb") as file:
            raw = file.read(ADMIN_TOKEN_FILE_MAX_BYTES + 1)
            mode = Path(path).stat().st_mode
    except OSError as error:
        raise ConfigError(f"admin.token_file {path}: cannot be read: {error.strerror}") from None
    if mode & _WORLD_READABLE:
        raise ConfigError(f"admin.token_file {path}: everybody can read it; take that away (0600)")
    if len(raw) > ADMIN_TOKEN_FILE_MAX_BYTES or not raw.isascii():
        raise ConfigError(
            f"admin.token_file {path}: at most {ADMIN_TOKEN_FILE_MAX_BYTES} bytes of ASCII"
        )
    lines = enumerate(raw.decode("ascii").splitlines(), start=1)
    grants = tuple(
        _grant(path, number, line) for number, line in lines if line.strip() and line[0] != "#"
    )
    if not 0 < len(grants) <= ADMIN_TOKENS_MAX:
        raise ConfigError(
            f"admin.token_file {path}: {len(grants)} tokens, 1 to {ADMIN_TOKENS_MAX} are allowed"
        )
    return Tokens(grants)


def _grant(path: str, number: int, line: str) -> Grant:
    words = line.split()
    scopes = {scope.name.lower(): scope for scope in Scope}
    if len(words) != 2 or words[0] not in scopes:
        raise ConfigError(
            f"admin.token_file {path}:{number}: a line is one of {', '.join(scopes)}, and a token"
        )
    if not ADMIN_TOKEN_MIN_CHARS <= len(words[1]) <= ADMIN_TOKEN_MAX_CHARS:
        raise ConfigError(
            f"admin.token_file {path}:{number}: a token of {len(words[1])} characters; "
            f"{ADMIN_TOKEN_MIN_CHARS} to {ADMIN_TOKEN_MAX_CHARS} are allowed (openssl rand -hex 32)"
        )
    return Grant(scopes[words[0]], hashlib.sha256(words[1].encode()).digest(), number)


class Pace:
    """How often each address may ask: *burst* at once, *per_second* in the long run.

    Remembers a bounded number of addresses; the one not heard of for longest is forgotten.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, address: str) -> bool:
        """Return whether *address* has anything left, without taking it."""
        return self._now_left(address) >= 1.0

    def take(self, address: str) -> bool:
        """Return whether *address* may ask once more, and count it."""
        left = self._now_left(address)
        self._left[address] = (max(0.0, left - 1.0), self._clock())
        self._left.move_to_end(address)
        if len(self._left) > ADMIN_ADDRESSES_MAX:
            self._left.popitem(last=False)
        return left >= 1.0

    def _now_left(self, address: str) -> float:
        left, at = self._left.get(address, (self._burst, self._clock()))
        return min(self._burst, left + (self._clock() - at) * self._per_second)
