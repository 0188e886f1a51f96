"""What one setting accepts: how it is read, written, and described to a person.

A value arrives as TOML gives it, or as the text of a variable or a flag. Every kind turns it
into the value that the program uses, or raises `ValueError` saying what was found.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from kvstore.units import (
    DURATION_FORMS,
    SIZE_FORMS,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

SOCKET_PATH_MAX_BYTES: Final = 107
"""What fits `sockaddr_un` with its closing zero."""

_USER_ID_MAX: Final = 2**32 - 2
_FLAG_WORDS: Final = {"true": True, "false": False}

Plain = str | int | bool | list[int | str]
"""A value as TOML and JSON write it."""

Schema = dict[str, object]


class Kind(Protocol):
    """What a setting accepts."""

    @property
    def allowed(self) -> str:
        """What is accepted, as the end of "must be ..."."""

    def read(self, raw: object) -> object:
        """Return the value that *raw* stands for; raises `ValueError`."""

    def write(self, value: object) -> Plain:
        """Return *value* so that `read` gives it back."""

    def schema(self) -> Schema:
        """Return the JSON schema of what a file may hold."""


@dataclass(frozen=True)
class SizeKind:
    """A number of bytes from *minimum* to *maximum*."""

    minimum: int
    maximum: int

    @property
    def allowed(self) -> str:
        """Both ends, and the accepted forms."""
        return f"from {format_size(self.minimum)} to {format_size(self.maximum)} ({SIZE_FORMS})"

    def read(self, raw: object) -> int:
        """Accept a text with a unit, or a whole number of bytes."""
        size = parse_size(raw) if isinstance(raw, str) else _whole(raw)
        if not self.minimum <= size <= self.maximum:
            raise ValueError(f"{raw!r} is out of range")
        return size

    def write(self, value: object) -> Plain:
        """Return the exact size with its unit."""
        return format_size(_whole(value))

    def schema(self) -> Schema:
        """Allow a text or a number."""
        return {"type": ["string", "integer"]}


@dataclass(frozen=True)
class DurationKind:
    """Seconds from *minimum* to *maximum*."""

    minimum: float
    maximum: float

    @property
    def allowed(self) -> str:
        """Both ends, and the accepted forms."""
        ends = f"from {format_duration(self.minimum)} to {format_duration(self.maximum)}"
        return f"{ends} ({DURATION_FORMS})"

    def read(self, raw: object) -> float:
        """Accept a text with a unit only: a bare 60 could mean anything."""
        if not isinstance(raw, str):
            raise ValueError(f"{raw!r} is not a text with a unit")
        seconds = parse_duration(raw)
        if not self.minimum <= seconds <= self.maximum:
            raise ValueError(f"{raw!r} is out of range")
        return seconds

    def write(self, value: object) -> Plain:
        """Return the exact duration with its unit."""
        assert isinstance(value, float)
        return format_duration(value)

    def schema(self) -> Schema:
        """Allow a text."""
        return {"type": "string"}


@dataclass(frozen=True)
class CountKind:
    """A whole number from *minimum* to *maximum*."""

    minimum: int
    maximum: int

    @property
    def allowed(self) -> str:
        """Both ends."""
        return f"a whole number from {self.minimum} to {self.maximum}"

    def read(self, raw: object) -> int:
        """Accept a number, or its digits."""
        count = _whole(raw)
        if not self.minimum <= count <= self.maximum:
            raise ValueError(f"{raw!r} is out of range")
        return count

    def write(self, value: object) -> Plain:
        """Return the number."""
        return _whole(value)

    def schema(self) -> Schema:
        """Allow a number between both ends."""
        return {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}


@dataclass(frozen=True)
class FlagKind:
    """Yes or no."""

    allowed: str = "true or false"

    def read(self, raw: object) -> bool:
        """Accept a boolean, or its word."""
        found = _FLAG_WORDS.get(raw.lower()) if isinstance(raw, str) else raw
        if not isinstance(found, bool):
            raise ValueError(f"{raw!r} is not accepted")
        return found

    def write(self, value: object) -> Plain:
        """Return the boolean."""
        return value is True

    def schema(self) -> Schema:
        """Allow a boolean."""
        return {"type": "boolean"}


@dataclass(frozen=True)
class ChoiceKind:
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def allowed(self) -> str:
        """All words."""
        return "one of " + ", ".join(self.words)

    def read(self, raw: object) -> str:
        """Accept one of the words, as it is written."""
        if raw not in self.words:
            raise ValueError(f"{raw!r} is not accepted")
        return str(raw)

    def write(self, value: object) -> Plain:
        """Return the word."""
        return str(value)

    def schema(self) -> Schema:
        """Allow the words."""
        return {"enum": list(self.words)}


@dataclass(frozen=True)
class ModeKind:
    """Permissions of the socket, in octal digits; its owner can always read and write."""

    allowed: str = 'a text of four octal digits from "0600" to "0777"'

    def read(self, raw: object) -> int:
        """Accept a text only: TOML's 660 would be decimal."""
        is_octal = isinstance(raw, str) and len(raw) in {3, 4} and set(raw) <= set("01234567")
        mode = int(str(raw), 8) if is_octal else -1
        if not 0o600 <= mode <= 0o777:
            raise ValueError(f"{raw!r} is not accepted")
        return mode

    def write(self, value: object) -> Plain:
        """Return four octal digits."""
        return f"{_whole(value):04o}"

    def schema(self) -> Schema:
        """Allow a text of octal digits."""
        return {"type": "string", "pattern": "^0?[67][0-7][0-7]$"}


@dataclass(frozen=True)
class IdListKind:
    """Numeric ids of users or groups."""

    allowed: str = f"a list of numeric ids from 0 to {_USER_ID_MAX}, such as [1000, 1001]"

    def read(self, raw: object) -> tuple[int, ...]:
        """Accept a list, or its elements separated by commas."""
        items = _split_list(raw) if isinstance(raw, str) else raw
        if not isinstance(items, list):
            raise ValueError(f"{raw!r} is not a list")
        ids = tuple(_whole(item) for item in items)
        if not all(0 <= number <= _USER_ID_MAX for number in ids):
            raise ValueError(f"{raw!r} is out of range")
        return ids

    def write(self, value: object) -> Plain:
        """Return a list."""
        assert isinstance(value, tuple)
        return list(value)

    def schema(self) -> Schema:
        """Allow a list of numbers."""
        return {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": _USER_ID_MAX},
        }


@dataclass(frozen=True)
class SocketKind:
    """Where a Unix socket lies."""

    allowed: str = f"an absolute path of at most {SOCKET_PATH_MAX_BYTES} bytes"

    def read(self, raw: object) -> Path:
        """Accept an absolute path that fits a socket address."""
        path = _absolute(raw)
        if len(bytes(path)) > SOCKET_PATH_MAX_BYTES:
            raise ValueError(f"{raw!r} has {len(bytes(path))} bytes")
        return path

    def write(self, value: object) -> Plain:
        """Return the path as a text."""
        return str(value)

    def schema(self) -> Schema:
        """Allow a text that starts at the root."""
        return {"type": "string", "pattern": "^/"}


@dataclass(frozen=True)
class ArenaKind:
    """What the arena is made of."""

    allowed: str = "memfd, or the absolute path of a file on tmpfs or hugetlbfs"

    def read(self, raw: object) -> str:
        """Accept the word, or an absolute path."""
        return "memfd" if raw == "memfd" else str(_absolute(raw))

    def write(self, value: object) -> Plain:
        """Return the word or the path."""
        return str(value)

    def schema(self) -> Schema:
        """Allow the word, or a text that starts at the root."""
        return {"type": "string", "pattern": "^(memfd|/.*)$"}


@dataclass(frozen=True)
class PathKind:
    """Where a file or a directory lies; empty stands for none."""

    allowed: str = "an absolute path, or empty for none"

    def read(self, raw: object) -> str:
        """Accept an absolute path, or nothing."""
        return "" if raw == "" else str(_absolute(raw))

    def write(self, value: object) -> Plain:
        """Return the path."""
        return str(value)

    def schema(self) -> Schema:
        """Allow nothing, or a text that starts at the root."""
        return {"type": "string", "pattern": "^(/.*)?$"}


_URL: Final = re.compile(r"(rediss?(\+(sentinel|cluster))?|unix)://\S+")
_SECRET: Final = re.compile(r"://[^/@]*:[^/@]*@")


@dataclass(frozen=True)
class UrlKind:
    """Where servers are. Never with a password: those are in files of their own."""

    allowed: str = (
        "a URL that begins with redis://, rediss://, unix://, redis+sentinel:// or "
        "redis+cluster:// and holds no password (tiers.redis.password_file names its file), "
        "or empty for none"
    )

    def read(self, raw: object) -> str:
        """Accept a URL of a known kind without a password."""
        text = raw if isinstance(raw, str) else ""
        if raw == "":
            return ""
        if _SECRET.search(text):
            raise ValueError("it holds a password")
        if not _URL.fullmatch(text):
            raise ValueError(f"{raw!r} is not accepted")
        return text

    def write(self, value: object) -> Plain:
        """Return the URL."""
        return str(value)

    def schema(self) -> Schema:
        """Allow a text."""
        return {"type": "string"}


@dataclass(frozen=True)
class PatternKind:
    """A text of one form, the whole of which *pattern* matches."""

    pattern: str
    allowed: str

    def read(self, raw: object) -> str:
        """Accept a text of that form."""
        if not isinstance(raw, str) or not re.fullmatch(self.pattern, raw):
            raise ValueError(f"{raw!r} is not accepted")
        return raw

    def write(self, value: object) -> Plain:
        """Return the text."""
        return str(value)

    def schema(self) -> Schema:
        """Allow a text of that form."""
        return {"type": "string", "pattern": f"^({self.pattern})$"}


_ADDRESS: Final = re.compile(r"(?:([A-Za-z0-9_.-]+)|\[([0-9A-Fa-f:.]+)\]):(\d{1,5})")
PORT_MAX: Final = 65_535


class ListenAddress(NamedTuple):
    """Where connections are taken: a name or a number, and a port (0: any that is free)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class AddressKind:
    """A TCP address to listen at; empty stands for none."""

    allowed: str = 'a text such as "127.0.0.1:7411" or "[::1]:7411", or empty for none'

    def read(self, raw: object) -> ListenAddress | None:
        """Accept a host, a colon and a port."""
        if raw == "":
            return None
        found = _ADDRESS.fullmatch(raw) if isinstance(raw, str) else None
        if found is None or int(found[3]) > PORT_MAX:
            raise ValueError(f"{raw!r} is not accepted")
        return ListenAddress(found[1] or found[2], int(found[3]))

    def write(self, value: object) -> Plain:
        """Return the text."""
        return "" if value is None else str(value)

    def schema(self) -> Schema:
        """Allow a text."""
        return {"type": "string"}


_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,255}|[0-9A-Fa-f:.]{2,45}")


@dataclass(frozen=True)
class HostListKind:
    """Names of hosts."""

    allowed: str = 'a list of host names or addresses, such as ["kv.example.org"]'

    def read(self, raw: object) -> tuple[str, ...]:
        """Accept a list, or its elements separated by commas."""
        items = [part.strip() for part in raw.split(",")] if isinstance(raw, str) else raw
        if items == [""]:
            return ()
        if not isinstance(items, list):
            raise ValueError(f"{raw!r} is not a list")
        for item in items:
            if not isinstance(item, str) or not _HOST_NAME.fullmatch(item):
                raise ValueError(f"{item!r} is no name of a host")
        return tuple(item.lower() for item in items)

    def write(self, value: object) -> Plain:
        """Return a list."""
        assert isinstance(value, tuple)
        return list(value)

    def schema(self) -> Schema:
        """Allow a list of texts."""
        return {"type": "array", "items": {"type": "string"}}


_PREFIX: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True)
class PrefixKind:
    """What the names of all our keys begin with."""

    allowed: str = "1 to 64 letters, digits or any of _ . : -"

    def read(self, raw: object) -> str:
        """Accept a text without anything that a server could take for more than a name."""
        if not isinstance(raw, str) or not _PREFIX.fullmatch(raw):
            raise ValueError(f"{raw!r} is not accepted")
        return raw

    def write(self, value: object) -> Plain:
        """Return the text."""
        return str(value)

    def schema(self) -> Schema:
        """Allow the characters."""
        return {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{1,64}$"}


_CODEC: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class CodecKind:
    """The name of a codec; which ones there are is found out when the daemon starts."""

    allowed: str = "the name of a codec, such as int4kv or ecsq-mid, or empty for none"

    def read(self, raw: object) -> str:
        """Accept a text that could be a name."""
        if raw != "" and not (isinstance(raw, str) and _CODEC.fullmatch(raw)):
            raise ValueError(f"{raw!r} is not accepted")
        return str(raw)

    def write(self, value: object) -> Plain:
        """Return the text."""
        return str(value)

    def schema(self) -> Schema:
        """Allow the characters."""
        return {"type": "string", "pattern": f"^({_CODEC.pattern})?$"}


def _whole(raw: object) -> int:
    if isinstance(raw, str) and raw.strip().isascii() and raw.strip().isdigit():
        return int(raw)
    if not isinstance(raw, int) or isinstance(raw, bool):
        raise ValueError(f"{raw!r} is not a whole number")
    return raw


def _absolute(raw: object) -> Path:
    if not isinstance(raw, str) or not raw.startswith("/") or "\0" in raw:
        raise ValueError(f"{raw!r} is not an absolute path")
    return Path(raw)


def _split_list(text: str) -> object:
    """Read `[1, 2]` and `1,2` alike."""
    inner = text.strip().removeprefix("[").removesuffix("]")
    try:
        return tomllib.loads(f"list = [{inner}]")["list"]
    except tomllib.TOMLDecodeError:
        return text
