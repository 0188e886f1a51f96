"""Why a prefix was not a hit: for each chunk where it is, or what became of it.

Looks and changes nothing. Every answer says what is known: what history has overwritten is
never called "never stored".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec

from kvstore.limits import EXPLAINED_CHUNKS_MAX, EXPLAINED_ELSEWHERE_MAX
from kvstore.store.history import Entry, Fate
from kvstore.store.recompute import run_lengths, worth_loading
from kvstore.types import NO_SLOT, Digest, TierKind

if TYPE_CHECKING:
    from kvstore.store.namespace import Namespace
    from kvstore.store.store import Store

_HOST: Final = TierKind.HOST
_DAMAGED: Final = frozenset({Fate.DAMAGED, Fate.DAMAGED_AT_COMMIT})

Verdict = Literal["present", "arriving", "declined", "unavailable", "miss"]
Cause = Literal[
    "present",
    "arriving",
    "declined",
    "late",
    "unavailable",
    "partial",
    "behind_gap",
    "never_stored",
    "not_remembered",
    "evicted",
    "deleted",
    "quarantined",
    "expired",
    "no_room",
    "aborted",
    "other_namespace",
    "other_scope",
]

_CAUSES: Final[dict[Fate, Cause]] = {
    Fate.EVICTED_FOR_ROOM: "evicted",
    Fate.EVICTED_FOR_QUOTA: "evicted",
    Fate.EVICTED_FOR_WINDOW: "evicted",
    Fate.FORGOTTEN: "evicted",
    Fate.DELETED: "deleted",
    Fate.DAMAGED: "quarantined",
    Fate.DAMAGED_AT_COMMIT: "quarantined",
    Fate.EXPIRED: "expired",
    Fate.LOST: "expired",
    Fate.NO_ROOM: "no_room",
    Fate.ABORTED: "aborted",
    Fate.DECLINED: "declined",
    Fate.LATE: "late",
}
_TEXTS: Final[dict[Fate, str]] = {
    Fate.EVICTED_FOR_ROOM: "It left the {tier} tier to make room for others.",
    Fate.EVICTED_FOR_QUOTA: "It left the {tier} tier because its tenant was at its quota.",
    Fate.EVICTED_FOR_WINDOW: "It left the {tier} tier to make room in one piece for a larger one.",
    Fate.FORGOTTEN: "The {tier} tier may have it, but more was there than is remembered here.",
    Fate.DELETED: "It was deleted: somebody asked for it.",
    Fate.DAMAGED: "Its bytes in the {tier} tier were damaged, so it was taken out of use.",
    Fate.DAMAGED_AT_COMMIT: "Its bytes did not match their checksum when it was stored.",
    Fate.EXPIRED: "The {tier} tier did not have it any more: it expired or was evicted there.",
    Fate.LOST: "The {tier} tier did not have it any more.",
    Fate.NO_ROOM: "It was not stored: all that could have left was leased, pinned or reserved.",
    Fate.ABORTED: "It was not stored: its writer gave up, or went away, before it was complete.",
    Fate.DECLINED: "It is in the {tier} tier, but loading it was slower than computing it.",
    Fate.LATE: "It is in the {tier} tier, but did not come up before the deadline of a load.",
}


class Difference(NamedTuple):
    """A field in which the namespace that has a chunk differs from the one that was asked."""

    field: str
    here: str
    there: str


class Explained(NamedTuple):
    """One chunk of a prefix. *at* is by the clock of the history; 0 where there is no time."""

    digest: Digest
    verdict: Verdict
    cause: Cause
    text: str
    tiers: int = 0
    tier: int = 0
    at: float = 0.0
    differences: tuple[Difference, ...] = ()


class Explanation(NamedTuple):
    """All of a prefix: *hits* leading chunks count, and *chunks* says why no more do."""

    hits: int
    chunks: list[Explained]


def explain(
    store: Store,
    space: Namespace,
    digests: Sequence[Digest],
    *,
    recompute_seconds: float = 0.0,
    other_scopes: Sequence[tuple[str, Sequence[Digest]]] = (),
) -> Explanation:
    """Say of *digests*, one prefix in order, where each is or what became of it.

    Of those that are no hits, the first `EXPLAINED_CHUNKS_MAX` are explained.
    *recompute_seconds* is what one chunk costs the engine. *other_scopes* are the same tokens
    under other roots: (name of the scope, digests).
    """
    known, slots = store.index.prefix(space, digests)
    worth = _worth(store, space, slots, recompute_seconds)
    explained: list[Explained] = []
    elsewhere = EXPLAINED_ELSEWHERE_MAX
    for number, digest in enumerate(digests[: known + EXPLAINED_CHUNKS_MAX]):
        if number < known:
            explained.append(_present(store, space, digest, is_declined=number >= worth))
            continue
        one = _not_counted(store, space, digest, is_first=number == known)
        if one.cause in {"never_stored", "not_remembered"} and elsewhere:
            elsewhere -= 1
            scopes = [(name, other[number]) for name, other in other_scopes]
            one = _elsewhere(store, space, digest, scopes) or one
        explained.append(one)
    return Explanation(worth, explained)


def _worth(store: Store, space: Namespace, slots: Sequence[int], recompute_seconds: float) -> int:
    return worth_loading(
        run_lengths(store.index.tiers(slots)),
        lambda bits, chunks: store.expected_seconds(bits, chunks, space.chunk_bytes),
        recompute_seconds,
    ).chunks


def _present(store: Store, space: Namespace, digest: Digest, *, is_declined: bool) -> Explained:
    tiers = store.index.tiers_of(space.find(digest))
    fastest = tiers & -tiers
    if is_declined:
        text = _TEXTS[Fate.DECLINED].format(tier=TierKind(fastest).name.lower())
        return Explained(digest, "declined", "declined", text, tiers, fastest)
    entry = None if tiers & _HOST else store.history.find(space, digest)
    if entry is not None and entry.fate in {Fate.DECLINED, Fate.LATE}:
        verdict: Verdict = "declined" if entry.fate is Fate.DECLINED else "present"
        return _by_fate(digest, entry, verdict, tiers)
    return Explained(digest, "present", "present", "It can be loaded.", tiers, fastest)


def _not_counted(store: Store, space: Namespace, digest: Digest, *, is_first: bool) -> Explained:
    slot, index = space.find(digest), store.index
    tiers = 0 if slot == NO_SLOT else index.tiers_of(slot)
    if store.reservations.is_arriving(space, digest):
        return Explained(digest, "arriving", "arriving", "It is being stored right now.", tiers)
    if digest in space.ready:
        if not index.is_usable(slot):
            text = "The only tier that has it does not answer at present."
            return Explained(digest, "unavailable", "unavailable", text, tiers, tiers & -tiers)
        assert not is_first, "what is usable and first is a hit"
        text = "It is there, but a chunk before it is not: a gap ends a prefix."
        return Explained(digest, "miss", "behind_gap", text, tiers)
    if slot != NO_SLOT and tiers:
        heads = ", ".join(f"{s.heads.start} to {s.heads.stop}" for s in index.shards(slot))
        text = f"Only heads {heads} of {space.manifest.kv_heads} have been stored."
        return Explained(digest, "miss", "partial", text, tiers)
    entry = store.history.find(space, digest)
    if entry is not None:
        return _by_fate(digest, entry, "miss", 0)
    if store.history.is_complete:
        text = "It was never stored here since the daemon started."
        return Explained(digest, "miss", "never_stored", text)
    text = "It was never stored here, or left so long ago that this is not remembered."
    return Explained(digest, "miss", "not_remembered", text)


def _by_fate(digest: Digest, entry: Entry, verdict: Verdict, tiers: int) -> Explained:
    text = _TEXTS[entry.fate].format(tier=entry.tier.name.lower())
    return Explained(digest, verdict, _CAUSES[entry.fate], text, tiers, entry.tier, entry.at)


def _elsewhere(
    store: Store, space: Namespace, digest: Digest, scopes: Sequence[tuple[str, Digest]]
) -> Explained | None:
    """Return where the same tokens are kept, if it is not where they were looked for."""
    for name, other in scopes:
        if other != digest and other in space.ready:
            text = f"The same tokens are kept under another scope: {name}."
            return Explained(
                *(digest, "miss", "other_scope", text),
                differences=(Difference("scope", "the one asked for", name),),
            )
    for there in store.index.namespaces:
        if there is not space and digest in there.ready:
            found = tuple(differences(space, there))
            fields = ", ".join(one.field for one in found)
            text = f"The same tokens are kept in another namespace, which differs in {fields}."
            tiers = store.index.tiers_of(there.ready[digest])
            return Explained(digest, "miss", "other_namespace", text, tiers, differences=found)
    return None


def differences(here: Namespace, there: Namespace) -> Iterator[Difference]:
    """Yield the fields in which two namespaces differ; that of a tenant is its own."""
    mine, theirs = msgspec.structs.asdict(here.manifest), msgspec.structs.asdict(there.manifest)
    for field, value in mine.items():
        if theirs[field] != value:
            yield Difference(field, str(value), str(theirs[field]))
    if here.tenant != there.tenant:
        yield Difference("tenant", here.tenant, there.tenant)
