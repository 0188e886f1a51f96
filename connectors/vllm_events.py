"""KV events: what vLLM's own publisher tells routers of the blocks that the daemon holds.

They are in vLLM's words, its hashes of its blocks, so that a router that knows an engine's own
blocks finds the same ones here. A removal is told when it is noticed: in a look-up that finds
less than has been told.
"""

from __future__ import annotations

import importlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from kvstore.limits import KV_EVENT_CHUNKS_MAX
from kvstore.types import Digest, TierKind

log = logging.getLogger("vllm.kvstore")

_OWNER: Final = "kvstore"
_MEMORY: Final = "CPU"
_STORAGE: Final = "STORAGE"
_IN_MEMORY: Final = frozenset({TierKind.DEVICE, TierKind.HOST})
# Of a request, in a step: vLLM sends all events of a step in one message.
_EVENTS_MAX: Final = 4096


class _Told(NamedTuple):
    """What was said of a chunk."""

    hashes: list[Any]
    medium: str


class Events(Protocol):
    """Takes note of what is stored and what is gone."""

    def stored(
        self, request: Any, group: int, first: int, digests: Sequence[Digest], tier: TierKind
    ) -> None:
        """Say that *digests*, the chunks of *request* from *first* on, are kept in *tier*."""
        ...

    def missing(self, group: int, digests: Sequence[Digest]) -> None:
        """Say of those of *digests* that were stored that they are gone."""
        ...

    def forget(self) -> None:
        """Say that all that was stored is gone."""
        ...

    def take(self) -> list[Any]:
        """Return the events since the last call."""
        ...


class NoEvents:
    """Nobody wants to know."""

    def stored(
        self, request: Any, group: int, first: int, digests: Sequence[Digest], tier: TierKind
    ) -> None:
        """Do nothing."""

    def missing(self, group: int, digests: Sequence[Digest]) -> None:
        """Do nothing."""

    def forget(self) -> None:
        """Do nothing."""

    def take(self) -> list[Any]:
        """Return nothing."""
        return []


class BlockEvents:
    """Events of vLLM's classes, for blocks of *block_tokens* as `request.block_hashes` has them."""

    def __init__(self, words: Any, *, block_tokens: int, chunk_tokens: int, groups: int) -> None:
        self._words = words
        self._block_tokens = block_tokens
        self._chunk_tokens = chunk_tokens
        self._names_groups = groups > 1
        self._told: OrderedDict[tuple[int, Digest], _Told] = OrderedDict()
        self._events: list[Any] = []
        self._outer = _outer_hash()

    def stored(
        self, request: Any, group: int, first: int, digests: Sequence[Digest], tier: TierKind
    ) -> None:
        """Say that *digests* are kept in *tier*, as far as it was not said before."""
        medium = _MEMORY if tier in _IN_MEMORY else _STORAGE
        each = self._chunk_tokens // self._block_tokens
        for chunk, digest in enumerate(digests, first):
            told = self._told.get((group, digest))
            hashes = request.block_hashes[chunk * each : (chunk + 1) * each]
            if len(hashes) < each or (told is not None and told.medium == medium):
                continue
            outer = [self._outer(found) for found in hashes]
            self._remember(group, digest, _Told(outer, medium))
            before = request.block_hashes[chunk * each - 1] if chunk else None
            parent = None if before is None else self._outer(before)
            self._say(self._stored(request, group, chunk, outer, parent, medium))

    def missing(self, group: int, digests: Sequence[Digest]) -> None:
        """Say of those of *digests* that were said to be stored that they are gone."""
        for digest in digests:
            if (told := self._told.pop((group, digest), None)) is not None:
                self._remove(group, told)

    def forget(self) -> None:
        """Say of everything that it is gone."""
        for (group, _), told in self._told.items():
            self._remove(group, told)
        self._told.clear()

    def take(self) -> list[Any]:
        """Return the events since the last call, in the order in which they came."""
        events, self._events = self._events[:_EVENTS_MAX], self._events[_EVENTS_MAX:]
        return events

    def _stored(
        self,
        request: Any,
        group: int,
        chunk: int,
        hashes: Sequence[Any],
        parent: Any,
        medium: str,
    ) -> Any:
        lora = request.lora_request
        start = chunk * self._chunk_tokens
        return self._make(
            self._words.BlockStored,
            block_hashes=list(hashes),
            parent_block_hash=parent,
            token_ids=list(request.all_token_ids[start : start + self._chunk_tokens]),
            block_size=self._block_tokens,
            lora_id=None if lora is None else lora.lora_int_id,
            lora_name=None if lora is None else lora.lora_name,
            medium=medium,
            group_idx=group if self._names_groups else None,
            ownership=_OWNER,
        )

    def _remove(self, group: int, told: _Told) -> None:
        self._say(
            self._make(
                self._words.BlockRemoved,
                block_hashes=told.hashes,
                medium=told.medium,
                group_idx=group if self._names_groups else None,
                ownership=_OWNER,
            )
        )

    def _make(self, kind: Any, **fields: Any) -> Any:
        """Return an event with those of *fields* that this vLLM's have."""
        return kind(**{name: fields[name] for name in fields if name in kind.__struct_fields__})

    def _say(self, event: Any) -> None:
        self._events.append(event)

    def _remember(self, group: int, digest: Digest, told: _Told) -> None:
        self._told[group, digest] = told
        while len(self._told) > KV_EVENT_CHUNKS_MAX:
            (other, _), oldest = self._told.popitem(last=False)
            # What is not remembered could not be taken back later, so it is taken back now.
            self._remove(other, oldest)


def events_for(vllm_config: Any, kv_cache_config: Any, chunk_tokens: int) -> Events:
    """Return what takes note of events, if this engine publishes any."""
    wanted = getattr(vllm_config, "kv_events_config", None)
    if wanted is None or not getattr(wanted, "enable_kv_cache_events", False):
        return NoEvents()
    try:
        words = importlib.import_module("vllm.distributed.kv_events")
    except ImportError:
        return NoEvents()
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    block_tokens = getattr(kv_cache_config, "hash_block_size", None) or specs[0].block_size
    if chunk_tokens % block_tokens:
        log.warning(
            "kvstore: no KV events: hashes are of %d tokens, which do not divide a chunk of %d",
            block_tokens,
            chunk_tokens,
        )
        return NoEvents()
    return BlockEvents(
        words, block_tokens=block_tokens, chunk_tokens=chunk_tokens, groups=len(specs)
    )


def _outer_hash() -> Callable[[Any], Any]:
    """Return how vLLM writes a block's hash in its events."""
    words = importlib.import_module("vllm.v1.core.kv_cache_utils")
    convert: Callable[[Any], Any] | None = getattr(words, "maybe_convert_block_hash", None)
    return convert or (lambda found: found)
