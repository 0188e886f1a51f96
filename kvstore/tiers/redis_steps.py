"""What is done with a shard over one lane, in a thread: look, check, store, publish, withdraw.

A shard is published last: its stripes are there before its meta record is. Commands about a
slot that is moving between nodes are repeated at its new node, each behind an ASKING.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

from kvstore.limits import REDIS_SHARDS_PER_CHUNK_MAX
from kvstore.tiers.base import Shard
from kvstore.tiers.redis_records import (
    Label,
    Names,
    Stripe,
    Unreadable,
    field_of,
    heads_of,
    pack_label,
    read_label,
)
from kvstore.tiers.redis_wire import Command, Fetched, Lane, Reply, ReplyError, Target, is_ask
from kvstore.types import Digest, NamespaceId


class RefusedError(Exception):
    """A server has refused a command for a reason that this step cannot answer."""

    def __init__(self, reply: ReplyError) -> None:
        super().__init__(str(reply))
        self.reply = reply


class Presence(Enum):
    """What stands where a shard is to be written."""

    ABSENT = auto()
    """Nothing, or parts of what another writer left."""

    PRESENT = auto()
    FOREIGN = auto()
    """Keys of another program: never overwritten."""

    NEWER = auto()
    """The same shard in a format that this version does not know: better left alone."""


class Plan(NamedTuple):
    """One shard with all its names, and how it is moved."""

    shard: Shard
    names: Names
    meta: bytes
    field: bytes
    stripes: list[Stripe]
    ttl_ms: int
    window: int

    @classmethod
    def of(cls, shard: Shard, names: Names, *, ttl_ms: int, window: int) -> Plan:
        """Return the plan of *shard*."""
        key = shard.key
        return cls(
            shard,
            names,
            names.meta(key.namespace, key.digest),
            field_of(key.heads),
            names.stripes(shard),
            ttl_ms,
            window,
        )

    @property
    def label(self) -> bytes:
        """The meta record, which only writers need."""
        return pack_label(self.shard, None)


class Asked(NamedTuple):
    """One stripe that another node has to be asked for, and who said so."""

    stripe: Stripe
    reply: ReplyError


def ping(lane: Lane) -> None:
    """Let the server show that it serves."""
    _refuse_errors(lane.call([(b"PING",)]))


# --- writing -----------------------------------------------------------------------------


def check(lane: Lane, plan: Plan) -> Presence:
    """Return what is there already; when it is the whole shard, its time starts anew."""
    lengths: list[Command] = [(b"STRLEN", stripe.name) for stripe in plan.stripes]
    kept, *found = lane.call([(b"HGET", plan.meta, plan.field), *lengths])
    if any(isinstance(it, ReplyError) and it.word == "WRONGTYPE" for it in (kept, *found)):
        return Presence.FOREIGN
    _refuse_errors([it for it in (kept, *found) if not is_ask(it)])
    label = read_label(kept) if isinstance(kept, bytes) else None
    if label is Unreadable.NEWER:
        return Presence.NEWER
    whole = [stripe.value_bytes for stripe in plan.stripes]
    if kept != plan.label or found != whole:
        return Presence.ABSENT
    _refuse_errors(lane.call(_expiries(plan)))
    return Presence.PRESENT


def store(
    lane: Lane,
    plan: Plan,
    stripes: Sequence[Stripe],
    source: memoryview,
    *,
    asking: bool = False,
) -> list[Asked]:
    """Set *stripes*; return those that another node has to be asked for."""
    met = lane.store(stripes, source, ttl_ms=plan.ttl_ms, window=plan.window, asking=asking)
    _refuse_errors([reply for reply in met if not is_ask(reply)])
    return [
        Asked(stripe, reply)
        for stripe, reply in zip(stripes, met, strict=True)
        if reply is not None
    ]


def publish(lane: Lane, plan: Plan, *, asking: bool = False) -> ReplyError | None:
    """Put the meta record; return the reply that sends us elsewhere, if one does.

    Whatever other bytes it stood for before are removed, and nobody can add to them unseen:
    the old record is taken in the same transaction.
    """
    commands: list[Command] = [
        (b"HGET", plan.meta, plan.field),
        (b"HSET", plan.meta, plan.field, plan.label),
    ]
    if plan.ttl_ms:
        commands.append((b"PEXPIRE", plan.meta, b"%d" % plan.ttl_ms))
    if asking:
        replies = lane.call([word for command in commands for word in ((b"ASKING",), command)])[
            1::2
        ]
    else:
        replies = _transaction(lane, commands)
    for reply in replies:
        if is_ask(reply):
            assert isinstance(reply, ReplyError)
            return reply
    _refuse_errors(replies)
    _remove_replaced(lane, plan, replies[0])
    return None


class Put(NamedTuple):
    """How far `put` has come."""

    presence: Presence
    """What was there before."""

    left: list[Asked]
    is_published: bool


def put(lane: Lane, plan: Plan, source: memoryview) -> Put:
    """Check, store and publish over one lane, without going back to the event loop.

    Nothing is published while stripes are left for other nodes.
    """
    presence = check(lane, plan)
    if presence is not Presence.ABSENT:
        return Put(presence, [], is_published=presence is Presence.PRESENT)
    left = store(lane, plan, plan.stripes, source)
    return Put(presence, left, is_published=not left and publish(lane, plan) is None)


def _remove_replaced(lane: Lane, plan: Plan, former: Reply) -> None:
    """Remove the stripes of the shard that *former*, a meta record, stood for."""
    label = read_label(former) if isinstance(former, bytes) else None
    if isinstance(label, Label) and label.shard.root != plan.shard.root:
        # What is not removed ends with its time; the shard is published either way.
        lane.call([(b"UNLINK", stripe.name) for stripe in plan.names.stripes(label.shard)])


def _expiries(plan: Plan) -> list[Command]:
    if not plan.ttl_ms:
        return []
    ttl = b"%d" % plan.ttl_ms
    return [(b"PEXPIRE", name, ttl) for name in (plan.meta, *(it.name for it in plan.stripes))]


# --- reading -----------------------------------------------------------------------------


def fetch(
    lane: Lane, plan: Plan, stripes: Sequence[Stripe], target: Target, *, asking: bool = False
) -> tuple[list[Fetched], list[Asked]]:
    """Get *stripes*; return what became of each, and those that are left for other nodes."""
    met = lane.fetch(stripes, target, window=plan.window, asking=asking)
    _refuse_errors([reply for reply in met if not is_ask(reply)])
    return (
        [it for it in met if isinstance(it, Fetched)],
        [
            Asked(stripe, reply)
            for stripe, reply in zip(stripes, met, strict=True)
            if isinstance(reply, ReplyError)
        ],
    )


def look(
    lane: Lane, names: Names, namespace: NamespaceId, digests: Sequence[Digest], *, asking: bool
) -> list[Reply]:
    """Return fields and values of each chunk's hash, at most so many, or the error in its place."""
    limit = b"%d" % REDIS_SHARDS_PER_CHUNK_MAX
    commands: list[Command] = [
        (b"HRANDFIELD", names.meta(namespace, digest), limit, b"WITHVALUES") for digest in digests
    ]
    if asking:
        return lane.call([word for command in commands for word in ((b"ASKING",), command)])[1::2]
    return lane.call(commands)


class Found(NamedTuple):
    """The shards of one chunk, and what else stood there."""

    shards: list[Shard]
    damaged: list[bytes]
    """Fields of ours whose record is none, or of another chunk."""

    is_newer: bool
    is_foreign: bool


def shards_in(reply: Reply, namespace: NamespaceId, digest: Digest) -> Found:
    """Return what a hash says about the chunk *digest*."""
    if isinstance(reply, ReplyError):
        return Found([], [], is_newer=False, is_foreign=reply.word == "WRONGTYPE")
    words = reply if isinstance(reply, list) else []
    shards: list[Shard] = []
    damaged: list[bytes] = []
    is_newer = is_foreign = False
    for field, value in zip(words[::2], words[1::2], strict=False):
        heads = heads_of(field) if isinstance(field, bytes) else None
        if heads is None or not isinstance(field, bytes) or not isinstance(value, bytes):
            is_foreign = True
            continue
        label = read_label(value)
        if label is Unreadable.NEWER:
            is_newer = True
        elif isinstance(label, Label) and label.shard.key == (namespace, digest, heads):
            shards.append(label.shard)
        else:
            damaged.append(field)
    return Found(shards, damaged, is_newer, is_foreign)


# --- removing ----------------------------------------------------------------------------


def withdraw(lane: Lane, plan: Plan) -> bool:
    """Remove the stripes, and the meta record if it is about them; return whether it was."""
    (kept,) = lane.call([(b"HGET", plan.meta, plan.field)])
    if isinstance(kept, ReplyError) and kept.word == "WRONGTYPE":
        return False
    _refuse_errors([kept])
    label = read_label(kept) if isinstance(kept, bytes) else None
    is_ours = isinstance(label, Label) and label.shard.root == plan.shard.root
    commands: list[Command] = [(b"HDEL", plan.meta, plan.field)] if is_ours else []
    commands += [(b"UNLINK", stripe.name) for stripe in plan.stripes]
    replies = _transaction(lane, commands)
    _refuse_errors(replies)
    return is_ours and replies[0] == 1


def discard(lane: Lane, fields: Sequence[tuple[bytes, bytes]]) -> None:
    """Remove damaged records: pairs of hash and field."""
    _refuse_errors(lane.call([(b"HDEL", meta, field) for meta, field in fields]))


def introduce(lane: Lane, name: bytes, manifest: bytes, ttl_ms: int) -> Reply:
    """Put *manifest* under *name* unless something is there; return what is there then."""
    expiry = (b"PX", b"%d" % ttl_ms) if ttl_ms else ()
    put, found = lane.call([(b"SET", name, manifest, b"NX", *expiry), (b"GET", name)])
    _refuse_errors([put])
    if found == manifest and put is None and ttl_ms:
        _refuse_errors(lane.call([(b"PEXPIRE", name, b"%d" % ttl_ms)]))
    return found


def _transaction(lane: Lane, commands: Sequence[Command]) -> list[Reply]:
    """Return the replies of *commands*, of which no other client sees a part."""
    begun, *queued, done = lane.call([(b"MULTI",), *commands, (b"EXEC",)])
    errors: list[Reply] = [it for it in (begun, *queued, done) if isinstance(it, ReplyError)]
    if errors:
        return errors
    return done if isinstance(done, list) else [done]


def _refuse_errors(replies: Sequence[object]) -> None:
    for reply in replies:
        if isinstance(reply, ReplyError):
            raise RefusedError(reply)
