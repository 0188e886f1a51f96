"""The directory of the disk tier: that it is ours, that nobody else has it, and its manifests.

`kvstore-disk.json` says whose directory this is and in which format, `lock` is held by the daemon
that uses it, `manifests/` has a file for each namespace; `disk_volume` has the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from xxhash import xxh3_64_intdigest

from kvstore.errors import ConfigError
from kvstore.limits import (
    DISK_MARKER_MAX_BYTES,
    MANIFEST_SIZE_MAX_BYTES,
    NAMESPACE_ID_SIZE_BYTES,
    NAMESPACES_MAX,
)
from kvstore.tiers.disk_layout import FORMAT
from kvstore.tiers.disk_volume import sync_directory
from kvstore.types import NamespaceId

MARKER_NAME: Final = "kvstore-disk.json"
_LOCK_NAME: Final = "lock"
_MANIFESTS_NAME: Final = "manifests"
_WRITING: Final = ".new"
# A new file system has one of its own; the others are ours, from a start that was cut short.
_NOT_FOREIGN: Final = frozenset({"lost+found", _LOCK_NAME, MARKER_NAME + _WRITING})
_DIRECTORY_MODE: Final = 0o700
_FILE_MODE: Final = 0o600
_KIND: Final = "kvstore disk tier"
_CHECKSUM_BYTES: Final = 8
# With what the store adds to a manifest of its own.
_MANIFEST_MAX_BYTES: Final = 2 * MANIFEST_SIZE_MAX_BYTES

_log = logging.getLogger(__name__)


class Marker(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """What the marker file says. *seed* sets the fingerprints of this directory apart."""

    kind: str
    format: int
    seed: int


class DiskDirectory:
    """A directory that is ours and locked, until `close` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Claim *path*, made when it is absent.

        Raises `ConfigError` when it is not ours, of another format, in use, or not usable; then
        nothing in it has changed.
        """
        self.path = path
        try:
            path.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
            read_marker(path)
            self._lock = _claim(path)
            try:
                self.seed = (read_marker(path) or _write_marker(path)).seed
                (path / _MANIFESTS_NAME).mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
                for unfinished in (path / _MANIFESTS_NAME).glob("*" + _WRITING):
                    unfinished.unlink()
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise ConfigError(f"tiers.disk.path {path} cannot be used: {error.strerror}") from error

    def introduce(self, namespace: NamespaceId, manifest: bytes) -> None:
        """Put *manifest* into a file of its own, whole or not at all. Raises `OSError`."""
        path = self.path / _MANIFESTS_NAME / namespace.hex()
        if not path.exists() or _read_manifest(path) != manifest:
            checksum = xxh3_64_intdigest(manifest).to_bytes(_CHECKSUM_BYTES, "little")
            _write_whole(path, checksum + manifest)

    def manifests(self) -> dict[NamespaceId, bytes]:
        """Return all manifests that are whole. Raises `OSError`."""
        found: dict[NamespaceId, bytes] = {}
        for path in sorted((self.path / _MANIFESTS_NAME).iterdir()):
            namespace, manifest = _namespace_of(path), _read_manifest(path)
            if namespace is None or manifest is None:
                _log.warning("manifest is damaged and left out", extra={"file": str(path)})
            else:
                found[namespace] = manifest
        return found

    def limit_manifests(self, used: Callable[[], set[NamespaceId]]) -> None:
        """Once there are as many manifests as may be, drop those that are not *used*."""
        found = self.manifests()
        if len(found) >= NAMESPACES_MAX:
            for namespace in found.keys() - used():
                (self.path / _MANIFESTS_NAME / namespace.hex()).unlink(missing_ok=True)

    def probe(self) -> None:
        """Write something that says nothing new to the medium. Raises `OSError`."""
        os.pwrite(self._lock, _owner(), 0)
        os.fdatasync(self._lock)

    def close(self) -> None:
        """Give the directory up."""
        os.close(self._lock)


def read_marker(path: Path) -> Marker | None:
    """Return the marker of the directory *path*; None where there is nothing yet.

    Raises `ConfigError` when something else lies there, or another format. Changes nothing.
    """
    try:
        with (path / MARKER_NAME).open("rb") as file:
            text = file.read(DISK_MARKER_MAX_BYTES)
    except FileNotFoundError:
        foreign = sorted({found.name for found in path.iterdir()} - _NOT_FOREIGN)
        if foreign:
            raise ConfigError(
                f"tiers.disk.path {path} is not empty and not a disk tier ({foreign[0]} lies "
                "there); choose an empty directory"
            ) from None
        return None
    try:
        marker = msgspec.json.decode(text, type=Marker)
    except msgspec.DecodeError:
        marker = Marker("", 0, 0)
    if marker.kind != _KIND:
        raise ConfigError(
            f"tiers.disk.path {path} is not a disk tier: {MARKER_NAME} does not say so; choose "
            "another directory"
        )
    if marker.format != FORMAT:
        raise ConfigError(
            f"tiers.disk.path {path} has format {marker.format}, this kvstore knows {FORMAT}; "
            "choose another directory, or empty this one"
        )
    return marker


def _write_marker(path: Path) -> Marker:
    marker = Marker(_KIND, FORMAT, secrets.randbits(64))
    _write_whole(path / MARKER_NAME, msgspec.json.encode(marker) + b"\n")
    sync_directory(path.parent)
    return marker


def _claim(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    lock = os.open(path / _LOCK_NAME, flags, _FILE_MODE)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise ConfigError(
            f"tiers.disk.path {path} is in use by another daemon (pid {owner})"
        ) from None
    except OSError:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.write(lock, _owner())
    return lock


def _owner() -> bytes:
    return f"{os.getpid()}\n".encode()


def _write_whole(path: Path, text: bytes) -> None:
    """Put *text* at *path* so that a crash leaves all of it or nothing; it is on the medium."""
    new = path.with_name(path.name + _WRITING)
    try:
        with new.open("wb") as file:
            os.fchmod(file.fileno(), _FILE_MODE)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _namespace_of(path: Path) -> NamespaceId | None:
    try:
        found = bytes.fromhex(path.name)
    except ValueError:
        return None
    return NamespaceId(found) if len(found) == NAMESPACE_ID_SIZE_BYTES else None


def _read_manifest(path: Path) -> bytes | None:
    with path.open("rb") as file:
        text = file.read(_CHECKSUM_BYTES + _MANIFEST_MAX_BYTES + 1)
    checksum, manifest = text[:_CHECKSUM_BYTES], text[_CHECKSUM_BYTES:]
    is_whole = len(text) > _CHECKSUM_BYTES and len(manifest) <= _MANIFEST_MAX_BYTES
    if is_whole and int.from_bytes(checksum, "little") == xxh3_64_intdigest(manifest):
        return manifest
    return None
