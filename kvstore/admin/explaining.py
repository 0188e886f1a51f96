"""Answers to `/v1/prefixes/explain`: why was this a miss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvstore.admin import schema
from kvstore.admin.naming import digest_of, namespace_of, tier_names
from kvstore.admin.routes import Call, Refusal, Route
from kvstore.hashing import chunk_digests
from kvstore.limits import (
    ADMIN_PROMPT_BODY_MAX_BYTES,
    EXPLAINED_CHUNKS_MAX,
    EXPLAINED_GEOMETRIES_MAX,
    KEYS_PER_REQUEST_MAX,
)
from kvstore.store.explanation import Explained, explain

if TYPE_CHECKING:
    from kvstore.admin.subject import Subject
    from kvstore.store.namespace import Namespace
    from kvstore.types import Digest

_SHOWN_BEFORE = 4
_MICROSECOND = 1e-6


class _Question(NamedTuple):
    """A prefix in one namespace, and how many of its chunks a look-up counted (None: unknown)."""

    space: Namespace
    digests: Sequence[Digest]
    recompute_seconds: float
    looked_up_hits: int | None = None
    others: tuple[tuple[str, Sequence[Digest]], ...] = ()


class Explaining:
    """Answers questions about prefixes; changes nothing."""

    def __init__(self, subject: Subject) -> None:
        self._store = subject.store

    def routes(self) -> list[Route]:
        """Return the one route."""
        return [
            Route(
                *("POST", "/v1/prefixes/explain", "explain", "Why was this a miss?"),
                self._explain,
                schema.Explained,
                asked=schema.ExplainAsked,
                problems=(404,),
                body_max_bytes=ADMIN_PROMPT_BODY_MAX_BYTES,
            )
        ]

    async def _explain(self, call: Call) -> schema.Explained:
        asked: schema.ExplainAsked = call.body
        given = [name for name in ("token_ids", "digests", "request") if _has(asked, name)]
        if len(given) != 1:
            raise Refusal(400, "give one of token_ids, digests and request")
        question = self._question(asked)
        if question is None:
            text = "No engine has stored anything, or looked anything up, since the daemon started."
            return self._nothing(asked, text)
        if not question.digests:
            return self._nothing(asked, "The prompt is shorter than one chunk: nothing is stored.")
        return self._answer(question)

    def _question(self, asked: schema.ExplainAsked) -> _Question | None:
        cost = asked.recompute_us * _MICROSECOND
        if asked.request is not None:
            lookup = self._store.recent.find(asked.request)
            if lookup is None:
                raise Refusal(404, "no look-up of that name is remembered")
            cost = cost or lookup.recompute_seconds
            return _Question(lookup.space, lookup.digests, cost, lookup.hits)
        spaces = [space for space in self._store.index.namespaces if not space.is_unused]
        if asked.namespace is not None:
            spaces = [namespace_of(self._store, asked.namespace)]
        if not spaces:
            return None
        if asked.digests is not None:
            digests = [digest_of(text) for text in asked.digests[:KEYS_PER_REQUEST_MAX]]
            return _Question(self._best(spaces, digests), digests, cost)
        return self._of_tokens(asked, spaces, cost)

    def _of_tokens(
        self, asked: schema.ExplainAsked, spaces: Sequence[Namespace], cost: float
    ) -> _Question:
        """Return the question in the namespace that knows most of these tokens."""
        scope = None if asked.scope is None else digest_of(asked.scope)
        sizes = sorted({space.manifest.chunk_tokens for space in spaces})
        best: _Question | None = None
        most = -1
        for size in sizes[:EXPLAINED_GEOMETRIES_MAX]:
            tokens = (asked.token_ids or [])[: size * KEYS_PER_REQUEST_MAX]
            digests = chunk_digests(tokens, size, scope=scope)
            plain = chunk_digests(tokens, size) if scope is not None else []
            fitting = [space for space in spaces if space.manifest.chunk_tokens == size]
            space = self._best(fitting, digests)
            known = len(self._store.index.leading(space, digests))
            if known > most:
                others = (("no scope", plain),) if plain else ()
                most, best = known, _Question(space, digests, cost, None, others)
        assert best is not None, "there is a namespace"
        return best

    def _best(self, spaces: Sequence[Namespace], digests: Sequence[Digest]) -> Namespace:
        """Return the namespace with most of *digests*; without any, the one with most sessions."""
        leading = self._store.index.leading

        def rank(space: Namespace) -> tuple[int, int, int]:
            first = bool(digests) and digests[0] in space.ready
            known = len(leading(space, digests)) if first else 0
            return known, space.entered, len(space.ready)

        return max(spaces, key=rank)

    def _answer(self, question: _Question) -> schema.Explained:
        store, space = self._store, question.space
        explanation = explain(
            store,
            space,
            question.digests,
            recompute_seconds=question.recompute_seconds,
            other_scopes=question.others,
        )
        hits = explanation.hits
        missed = explanation.chunks[hits] if hits < len(explanation.chunks) else None
        start = max(0, hits - _SHOWN_BEFORE)
        shown = explanation.chunks[start : start + EXPLAINED_CHUNKS_MAX]
        return schema.Explained(
            namespace=space.id.hex(),
            chunks_asked=len(question.digests),
            hits=hits,
            looked_up_hits=question.looked_up_hits,
            cause=None if missed is None else missed.cause,
            text="All of it can be loaded." if missed is None else missed.text,
            chunks=[_shown(number, one) for number, one in enumerate(shown, start)],
            history=self._history(),
        )

    def _nothing(self, asked: schema.ExplainAsked, text: str) -> schema.Explained:
        return schema.Explained(
            namespace=asked.namespace,
            chunks_asked=len(asked.digests or ()),
            hits=0,
            looked_up_hits=None,
            cause="never_stored" if asked.digests else None,
            text=text,
            chunks=[],
            history=self._history(),
        )

    def _history(self) -> schema.HistoryShown:
        history = self._store.history
        return schema.HistoryShown(
            entries=history.entries, overwritten=history.overwritten, since_at=history.began_at
        )


def _has(asked: schema.ExplainAsked, name: str) -> bool:
    return getattr(asked, name) is not None


def _shown(number: int, one: Explained) -> schema.ChunkExplained:
    names = tier_names(one.tier)
    return schema.ChunkExplained(
        number=number,
        digest=one.digest.hex(),
        verdict=one.verdict,
        cause=one.cause,
        text=one.text,
        tiers=tier_names(one.tiers),
        tier=names[0] if names else None,
        at=one.at or None,
        differences=[schema.Difference(**each._asdict()) for each in one.differences],
    )
