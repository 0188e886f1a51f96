"""One store or one load of a device: groups of chunks that are alike, one transfer each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.client.gpu_forms import Forms
    from kvstore.client.gpu_steps import Arenas, Held
    from kvstore.client.sync import Space
    from kvstore.gpu.counters import DeviceCounters
    from kvstore.gpu.device import Fence
    from kvstore.gpu.heads import Heads
    from kvstore.gpu.lanes import LoadLane, StoreLane


class Parts(NamedTuple):
    """What all calls of one `DeviceCache` share."""

    stores: StoreLane
    loads: LoadLane
    arenas: Arenas
    held: Held
    forms: Forms
    counters: DeviceCounters
    store_heads: Heads
    load_heads: Heads


class Asked(NamedTuple):
    """What a call moves: chunk i is in `pages[i]`, behind the fence *after*."""

    parts: Parts
    pages: Sequence[Sequence[int]]
    after: Fence | None

    def part(self, start: int, stop: int) -> Asked:
        """Return the chunks from number *start* up to *stop*."""
        return self._replace(pages=self.pages[start:stop])


class Call:
    """One call of one session, which uses its arena while it lasts."""

    def __init__(self, asked: Asked, space: Space) -> None:
        self._parts = parts = asked.parts
        self._pages = asked.pages
        self._after = asked.after
        self._space = space
        self._arena = parts.arenas.use(space.attached.arena)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.arenas.done(self._arena)

    def _until_over(self, let_go: Callable[[], None]) -> Callable[[], None]:
        """Keep the arena registered, and return what ends that and calls *let_go*."""
        arenas, arena = self._parts.arenas, self._arena
        arenas.hold(arena)

        def end() -> None:
            arenas.done(arena)
            let_go()

        return end
