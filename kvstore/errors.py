"""Every error that kvstore raises on purpose, with its wire code.

A miss is a value, never an error. An error says whose fault it is by its class, names the
thing and the limit in its text, and says in `retryable` whether the same call can succeed
later without a change. Codes are part of the wire protocol (protocol/VERSION.md): they are
never renumbered.
"""

from __future__ import annotations

from typing import ClassVar


class KVStoreError(Exception):
    """Root of all errors raised by kvstore."""

    code: ClassVar[int] = 99
    retryable: ClassVar[bool] = False


class ConfigError(KVStoreError):
    """The configuration names something unknown or out of range; the daemon does not start."""

    code = 60


class UnavailableError(KVStoreError):
    """The daemon cannot be reached, or did not answer in time."""

    code = 61
    retryable = True


class AddressInUseError(KVStoreError):
    """Another daemon already serves this socket."""

    code = 62


class InternalError(KVStoreError):
    """The daemon failed on its own account; its log has the reason."""

    code = 99
    retryable = True


class ProtocolError(KVStoreError):
    """The peer broke the protocol; the session ends."""

    code = 1


class FrameError(ProtocolError):
    """A frame is empty, longer than the limit, or not one known message."""

    code = 2


class OrderError(ProtocolError):
    """A message arrived in a session state that does not allow it."""

    code = 3


class VersionError(ProtocolError):
    """The peer speaks another protocol version."""

    code = 4


class RefusedError(KVStoreError):
    """The peer is not allowed to use this daemon."""

    code = 5


class ManifestError(KVStoreError):
    """A manifest does not parse, is absurd, or contradicts itself."""

    code = 10


class RequestError(KVStoreError):
    """A well-formed request asks for something that its session or namespace cannot have."""

    code = 11


class CodecError(KVStoreError):
    """A codec or a policy is unknown, or is asked for what it does not do."""

    code = 12


class NoSpaceError(KVStoreError):
    """Nothing more can be evicted: all that is left is leased, pinned or being written."""

    code = 20
    retryable = True


class TooLargeError(KVStoreError):
    """A chunk is larger than the tier could ever hold."""

    code = 21


class LeaseError(KVStoreError):
    """The lease is unknown, has ended, or belongs to another session."""

    code = 30


class ReservationError(KVStoreError):
    """The reservation is unknown, has ended, or belongs to another session."""

    code = 31


class ChecksumError(KVStoreError):
    """Bytes do not match their checksum; they are not served and not published."""

    code = 32


class ContainerError(KVStoreError):
    """A stored container contradicts itself, its checksums, or the geometry it is read with."""

    code = 33


class UnfitError(KVStoreError):
    """A chunk cannot be encoded into the room it was given; it is not stored."""

    code = 34


class HandoffError(KVStoreError):
    """The hand-off is unknown, another's, or in a state that does not allow this."""

    code = 35


class LimitError(KVStoreError):
    """A session asks for more at once than limits.py allows."""

    code = 40
    retryable = True


class DeadlineError(KVStoreError):
    """The request could not be answered before its deadline."""

    code = 41
    retryable = True


class DrainingError(KVStoreError):
    """The daemon is shutting down and takes nothing new."""

    code = 42
    retryable = True


class TierError(KVStoreError):
    """The medium of a tier failed or did not answer; what it keeps is not known to have changed."""

    code = 50
    retryable = True


def _by_code() -> dict[int, type[KVStoreError]]:
    found: dict[int, type[KVStoreError]] = {}
    pending: list[type[KVStoreError]] = [KVStoreError]
    while pending:
        kind = pending.pop()
        pending.extend(kind.__subclasses__())
        if kind is not KVStoreError:
            assert kind.code not in found, f"code {kind.code} is used twice"
            found[kind.code] = kind
    return found


_BY_CODE = _by_code()


def from_code(code: int, message: str) -> KVStoreError:
    """Return the error that *code* stands for; an unknown code gives `InternalError`."""
    return _BY_CODE.get(code, InternalError)(message)
