"""A pretended engine with paged KV, in the Python of the store it uses, told what to do by lines.

`PYTHON host_engines.py KIND SETTINGS`, which `tests.bench.host_peers` starts: two for each store,
one that stores and one that loads. A line on stdin is a command in JSON, a line on stdout its
answer. Peers are not installed with kvstore, so nothing but NumPy is imported before it is needed.

Contents come from a file that all engines map: pass n of all of them stores the same bytes, in
pages that each shuffles as it likes, and what has been loaded is compared byte by byte.
"""

from __future__ import annotations

import abc
import ctypes
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
import numpy.typing as npt

PAGE_TOKENS: Final = 16
CHUNK_PAGES: Final = 16
CHUNK_TOKENS: Final = PAGE_TOKENS * CHUNK_PAGES
STEP_BYTES: Final = 4096
PASSES_MAX: Final = 256
TIMEOUT_SECONDS: Final = 60.0
WARM_UPS: Final = 2

Bytes = npt.NDArray[np.uint8]
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What an engine is told when it starts."""

    layers: int
    heads: int
    head_dim: int
    blocks: int
    contents: str
    address: str
    servers: list[int]
    """The processes whose time counts as that of the store."""
    role: int
    canonical: bool = False

    @property
    def planes(self) -> int:
        """Keys and values of every layer."""
        return 2 * self.layers

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one plane, in bfloat16."""
        return PAGE_TOKENS * self.heads * self.head_dim * 2

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk."""
        return self.planes * CHUNK_PAGES * self.page_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pages."""
        return self.planes * self.blocks * self.page_bytes


@dataclass(frozen=True, slots=True)
class Request:
    """Consecutive chunks of one prompt: its name, and the pages of each chunk."""

    name: str
    tokens: list[int]
    pages: npt.NDArray[np.int64]


class Engine(abc.ABC):
    """KV memory, and one store's way from and to it. `prepare` is not timed, the rest is."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._contents: Bytes = np.memmap(settings.contents, np.uint8, "r")
        self._planes = self.open()

    @abc.abstractmethod
    def open(self) -> Sequence[Bytes]:
        """Connect, and return the memory of every plane as [blocks, bytes of a page]."""

    @abc.abstractmethod
    def prepare(self, request: Request) -> Any:
        """Return *request* as the store takes it."""

    @abc.abstractmethod
    def store(self, prepared: Any) -> int:
        """Store; return how many chunks are new."""

    @abc.abstractmethod
    def find(self, prepared: Any) -> int:
        """Look up; return how many leading chunks are there."""

    @abc.abstractmethod
    def load(self, prepared: Any) -> int:
        """Load what was found; return how many chunks have come."""

    def settle(self, prepared: Any, *, found_only: bool = False) -> None:
        """End what a call has left behind, perhaps a look-up without its load; not timed."""
        return

    def look_ups(self) -> dict[str, Callable[[Any], int]]:
        """Return the ways to look up, by what they begin with."""
        return {"keys": self.find}

    @abc.abstractmethod
    def clear(self) -> None:
        """Have the store forget everything."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the session, and what this process shares."""

    def fill(self, number: int) -> Answer:
        """Put the contents of pass *number* into all pages."""
        for plane, contents in zip(self._planes, self._expected(number), strict=True):
            plane[...] = contents
        return {}

    def do_store(self, number: int, requests: int, chunks: int) -> Answer:
        """Store the pass, request by request."""
        prepared = [self.prepare(one) for one in self._requests(number, requests, chunks)]
        answer = self._timed([partial(self.store, one) for one in prepared])
        assert answer.pop("counts") == [chunks] * requests, "every chunk is stored"
        for one in prepared:
            self.settle(one)
        return answer

    def do_load(self, number: int, requests: int, chunks: int) -> Answer:
        """Wipe all pages, load the pass request by request, compare every byte."""
        for plane in self._planes:
            plane[...] = 0
        prepared = [self.prepare(one) for one in self._requests(number, requests, chunks)]
        answer = self._timed([partial(self._found_and_loaded, one) for one in prepared])
        assert answer.pop("counts") == [chunks] * requests, "every chunk is loaded"
        for one in prepared:
            self.settle(one)
        pages = [self._pages(number, requests, chunks, role).ravel() for role in (0, 1)]
        for plane, contents in zip(self._planes, self._expected(number), strict=True):
            mine, theirs = plane[pages[self.settings.role]], contents[pages[0]]
            assert np.array_equal(mine, theirs), "what is loaded is what was stored"
        return answer

    def do_find(self, number: int, chunks: int, asked: int, times: int) -> Answer:
        """Look up the first *asked* chunks of a prompt of *chunks*, with all of them stored."""
        whole = next(iter(self._requests(number, 1, chunks)))
        answer: Answer = {}
        for kind, find in self.look_ups().items():
            parts = [
                _first(whole, asked, f"{whole.name}-{kind}{asked}-{turn}")
                for turn in range(times + WARM_UPS)
            ]
            seconds = []
            for one in [self.prepare(part) for part in parts]:
                timed = self._timed([partial(find, one)])
                assert timed["counts"] == [asked], "every chunk is found"
                self.settle(one, found_only=True)
                seconds += timed["seconds"]
            answer[kind] = seconds[WARM_UPS:]
        return answer

    def _found_and_loaded(self, prepared: Any) -> int:
        found = self.find(prepared)
        loaded = self.load(prepared)
        return min(found, loaded)

    def _timed(self, calls: Sequence[Callable[[], int]]) -> Answer:
        """Run *calls* in turn; return the seconds of each, and CPU seconds of all processes."""
        seconds, counts = [], []
        before = self._cpu_seconds()
        for call in calls:
            began = time.perf_counter()
            counts.append(call())
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "counts": counts, "cpu": self._cpu_seconds() - before}

    def _cpu_seconds(self) -> float:
        total_ns = 0
        for process in self.settings.servers:
            for thread in Path(f"/proc/{process}/task").iterdir():
                total_ns += int((thread / "schedstat").read_text().split()[0])
        return total_ns / 1e9 + time.process_time()

    def _expected(self, number: int) -> npt.NDArray[np.uint8]:
        held = self.settings
        start = number % PASSES_MAX * STEP_BYTES
        part = self._contents[start : start + held.pool_bytes]
        return part.reshape(held.planes, held.blocks, held.page_bytes)

    def _pages(self, number: int, requests: int, chunks: int, role: int) -> npt.NDArray[np.int64]:
        table = np.random.default_rng([number, role]).permutation(self.settings.blocks)
        return table[: requests * chunks * CHUNK_PAGES].reshape(requests, chunks, CHUNK_PAGES)

    def _requests(self, number: int, requests: int, chunks: int) -> list[Request]:
        """Return the requests of pass *number*: the same tokens in every engine, pages its own."""
        shape = (requests, chunks * CHUNK_TOKENS)
        tokens = np.random.default_rng(number).integers(0, 100_000, shape, dtype=np.uint32)
        pages = self._pages(number, requests, chunks, self.settings.role)
        name = f"{self.settings.role}-{number}-{chunks}"
        return [Request(f"{name}-{n}", tokens[n].tolist(), pages[n]) for n in range(requests)]


def _first(request: Request, chunks: int, name: str) -> Request:
    return Request(name, request.tokens[: chunks * CHUNK_TOKENS], request.pages[:chunks])


def _delete(digests: Sequence[Any], space: Any) -> None:
    space.delete(digests)


class Kvstore(Engine):
    """`PrefixCache`, as connectors use it; KV in private memory."""

    def open(self) -> Sequence[Bytes]:
        from kvstore.client.cache import PrefixCache
        from kvstore.protocol.manifest import Manifest

        held = self.settings
        self._cache = PrefixCache(
            Manifest(
                model="bench/host-peers",
                revision=f"{held.canonical}",
                dtype="bfloat16" if held.canonical else "opaque",
                layout="canonical" if held.canonical else "opaque",
                layers=held.layers,
                kv_heads=held.heads if held.canonical else 1,
                head_dim=held.head_dim,
                chunk_tokens=CHUNK_TOKENS,
                opaque_bytes=0 if held.canonical else held.chunk_bytes,
            ),
            socket=held.address,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        assert self._cache.is_connected, "the daemon is ready"
        memory = np.frombuffer(mmap.mmap(-1, held.pool_bytes, mmap.MAP_PRIVATE), np.uint8)
        memory[...] = 1
        self._memory = memory.reshape(held.planes, held.blocks, held.page_bytes)
        self._stored: list[Any] = []
        return list(self._memory)

    def prepare(self, request: Request) -> Any:
        from kvstore.hashing import chunk_digests

        digests = chunk_digests(request.tokens, CHUNK_TOKENS)
        return digests, [self._runs(pages) for pages in request.pages], request.tokens

    def _runs(self, pages: npt.NDArray[np.int64]) -> Any:
        from kvstore.transfer.copies import Runs

        held = self.settings
        start = self._memory.__array_interface__["data"][0]
        heads = held.heads if held.canonical else 1
        inner = PAGE_TOKENS if held.canonical and heads > 1 else 1
        return Runs.of_pages(
            [start + plane * held.blocks * held.page_bytes for plane in range(held.planes)],
            pages,
            page_stride_bytes=held.page_bytes,
            piece_bytes=held.page_bytes // heads // inner,
            head_count=heads,
            head_stride_bytes=held.head_dim * 2 if heads > 1 else 0,
            inner_count=inner,
            inner_stride=heads * held.head_dim * 2 if inner > 1 else 0,
            owner=self._memory,
        )

    def store(self, prepared: Any) -> int:
        self._stored.append(prepared[0])
        return self._cache.store(prepared[0], prepared[1]).stored

    def find(self, prepared: Any) -> int:
        return self._cache.lookup(prepared[0])

    def look_ups(self) -> dict[str, Callable[[Any], int]]:
        return {"keys": self.find, "tokens": self._find_by_tokens}

    def _find_by_tokens(self, prepared: Any) -> int:
        from kvstore.hashing import chunk_digests

        return self._cache.lookup(chunk_digests(prepared[2], CHUNK_TOKENS))

    def load(self, prepared: Any) -> int:
        return self._cache.load(prepared[0], prepared[1])

    def clear(self) -> None:
        for digests in self._stored:
            self._cache.ask(partial(_delete, digests), None)
        self._stored.clear()

    def close(self) -> None:
        self._cache.close()


class Lmcache(Engine):
    """LMCache's own client: its server copies from and to KV tensors in shared memory."""

    def open(self) -> Sequence[Bytes]:
        import torch
        from lmcache.utils import EngineType  # type: ignore[import-not-found]
        from lmcache.v1.multiprocess.group_view import EngineGroupInfo  # type: ignore[import-not-found]
        from lmcache.v1.multiprocess.transfer_context import create_transfer_context  # type: ignore[import-not-found]
        from lmcache.v1.multiprocess.transport.factory import RequestClientFactory  # type: ignore[import-not-found]

        held = self.settings
        self._client = RequestClientFactory.create(held.address)
        shape = (2, held.blocks, PAGE_TOKENS, held.heads, held.head_dim)
        self._tensors = {
            f"layer.{n}": torch.zeros(shape, dtype=torch.bfloat16) for n in range(held.layers)
        }
        self._context = create_transfer_context(
            self._tensors,
            mode="lmcache_driven",
            instance_id=1000 + held.role,
            req_client=self._client,
        )
        group = EngineGroupInfo(
            engine_group_id=0,
            layer_indices=tuple(range(held.layers)),
            tokens_per_block=PAGE_TOKENS,
        )
        self._context.register(
            self._tensors,
            "bench",
            1,
            CHUNK_PAGES,
            TIMEOUT_SECONDS,
            layout_hints={"kv_layout": "NHD"},
            engine_group_infos=[group],
            engine_type=EngineType.VLLM,
        )
        pages = (2, held.blocks, held.page_bytes)
        # Registering has moved the tensors to shared memory.
        planes = [
            tensor.view(torch.int16).numpy().view(np.uint8).reshape(pages)
            for tensor in self._tensors.values()
        ]
        return [plane[side] for plane in planes for side in (0, 1)]

    def prepare(self, request: Request) -> Any:
        from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey  # type: ignore[import-not-found]

        def key(worker: int | None) -> Any:
            return IPCCacheServerKey(
                model_name="bench",
                world_size=1,
                num_kv_readers=1,
                worker_id=worker,
                token_ids=tuple(request.tokens),
                start=0,
                end=len(request.tokens),
                request_id=request.name,
            )

        return request.name, key(None), key(0), [request.pages.ravel().tolist()]

    def store(self, prepared: Any) -> int:
        name, _, key, blocks = prepared
        event = self._context.create_recorded_event()
        stored = self._context.submit_store(
            name, key, self._tensors, blocks, event, CHUNK_PAGES
        ).result(timeout=TIMEOUT_SECONDS)
        return len(blocks[0]) // CHUNK_PAGES if stored else 0

    def find(self, prepared: Any) -> int:
        name, key, _, _ = prepared
        self._client.lookup(key, 1).result(timeout=TIMEOUT_SECONDS)
        found = self._client.wait_prefetch_status(name, TIMEOUT_SECONDS)
        return int(found.result(timeout=TIMEOUT_SECONDS) or 0)

    def look_ups(self) -> dict[str, Callable[[Any], int]]:
        return {"tokens": self.find}

    def load(self, prepared: Any) -> int:
        name, _, key, blocks = prepared
        event = self._context.create_recorded_event()
        loaded = self._context.submit_retrieve(
            name, key, self._tensors, blocks, event, CHUNK_PAGES, skip_first_n_tokens=0
        ).result(timeout=TIMEOUT_SECONDS)
        return len(blocks[0]) // CHUNK_PAGES if loaded else 0

    def settle(self, prepared: Any, *, found_only: bool = False) -> None:
        if found_only:
            self._client.free_lookup_locks(prepared[1], 1).result(timeout=TIMEOUT_SECONDS)
        self._client.end_session(prepared[0]).result(timeout=TIMEOUT_SECONDS)

    def clear(self) -> None:
        self._client.clear(True).result(timeout=TIMEOUT_SECONDS)

    def close(self) -> None:
        left = self._context.unregister()
        if left is not None:
            left.result(timeout=TIMEOUT_SECONDS)
        self._context.close()
        self._client.close()


class Mooncake(Engine):
    """Mooncake's dummy client: KV in the pool that it shares with the store's own process."""

    def open(self) -> Sequence[Bytes]:
        from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

        held = self.settings
        self._store = MooncakeDistributedStore()
        spare = 64 << 20
        size = -(-held.pool_bytes // (2 << 20)) * (2 << 20)
        assert self._store.setup_dummy(size + spare, spare, held.address) == 0
        start = self._store.alloc_from_mem_pool(size)
        assert self._store.register_buffer(start, size) == 0
        self._start = start
        raw = (ctypes.c_uint8 * held.pool_bytes).from_address(start)
        memory = np.ctypeslib.as_array(raw)
        memory[...] = 1
        return list(memory.reshape(held.planes, held.blocks, held.page_bytes))

    def prepare(self, request: Request) -> Any:
        held = self.settings
        # Named by their tokens alone, so that both engines name them alike.
        prompt = np.asarray(request.tokens[:CHUNK_TOKENS], np.uint32).tobytes()[:28].hex()
        keys = [f"{prompt}-{n:07}" for n in range(len(request.pages))]
        starts = self._start + np.arange(held.planes) * held.blocks * held.page_bytes
        pointers = [
            (starts[:, None] + pages * held.page_bytes).ravel().tolist() for pages in request.pages
        ]
        return keys, pointers, [[held.page_bytes] * len(pointers[0])] * len(keys)

    def store(self, prepared: Any) -> int:
        return list(self._store.batch_put_from_multi_buffers(*prepared)).count(0)

    def find(self, prepared: Any) -> int:
        return list(self._store.batch_is_exist(prepared[0])).count(1)

    def load(self, prepared: Any) -> int:
        sizes = self._store.batch_get_into_multi_buffers(*prepared)
        return list(sizes).count(self.settings.chunk_bytes)

    def clear(self) -> None:
        self._store.remove_all(True)

    def close(self) -> None:
        self._store.close()


KINDS: Final[dict[str, type[Engine]]] = {
    "kvstore": Kvstore,
    "lmcache": Lmcache,
    "mooncake": Mooncake,
}


def main(words: Sequence[str]) -> None:
    # Libraries print to stdout too, so answers have a way of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = KINDS[words[0]](Settings(**json.loads(words[1])))
    answers.write("{}\n")
    answers.flush()
    serve(engine, sys.stdin, answers)
    engine.close()


def serve(engine: Engine, commands: TextIO, answers: TextIO) -> None:
    """Do what every line of *commands* says, until there are no more."""
    for line in commands:
        command = json.loads(line)
        answer = getattr(engine, command.pop("do"))(**command) or {}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
