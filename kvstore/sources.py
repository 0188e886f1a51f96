"""Where settings come from: a TOML file, variables, flags. Nothing is judged here."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.errors import ConfigError

ENVIRONMENT_PREFIX: Final = "KVSTORE_"

# Variables that are no settings: switches of other parts, and those that Kubernetes sets in
# every pod beside a service that happens to be called kvstore.
_NO_SETTINGS: Final = re.compile(
    r"KVSTORE_(NO_NATIVE|(\w+_)?SERVICE_(HOST|PORT(_\w+)?)|(\w+_)?PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
)


class Found(NamedTuple):
    """A value that somebody gave, before anyone has looked at it."""

    path: str
    raw: object
    origin: str
    spelled: str
    """The name as it was written there: a path, or a variable."""


def from_file(file: Path | None, is_table: Callable[[str], bool]) -> Iterator[Found]:
    """Yield what *file* holds; *is_table* tells tables from values."""
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
    for path, raw in _flatten(content, "", is_table):
        yield Found(path, raw, f"{file}:{_line_of(path, lines)}", path)


def _syntax_problem(file: Path, error: tomllib.TOMLDecodeError) -> str:
    """Put the line where every other problem has it."""
    position = re.search(r" \(at line (\d+), column \d+\)$", str(error))
    if position is None:
        return f"{file}: is not TOML: {error}"
    return f"{file}:{position[1]}: is not TOML: {str(error)[: position.start()]}"


def _flatten(
    table: Mapping[str, object], prefix: str, is_table: Callable[[str], bool]
) -> Iterator[tuple[str, object]]:
    for name, raw in table.items():
        path = f"{prefix}{name}"
        if isinstance(raw, dict) and is_table(path):
            yield from _flatten(raw, f"{path}.", is_table)
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


def from_environment(environ: Mapping[str, str]) -> Iterator[Found]:
    """Yield what variables say."""
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX) and not _NO_SETTINGS.fullmatch(name):
            path = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            yield Found(path, environ[name], name, name)


def variable_of(path: str) -> str:
    """Return the name of the variable for *path*."""
    return ENVIRONMENT_PREFIX + path.upper().replace(".", "__")


def from_overrides(overrides: Iterable[str]) -> Iterator[Found]:
    """Yield what flags say."""
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: write path=value")
        yield Found(path.strip(), text.strip(), "--set", path.strip())
