"""A vLLM engine in a process of its own, so that each test has a fresh one and can end it.

`Engine` is the face in the test; `Driver` is what runs in the other process.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
# Engines of several processes start slowly, above all where cores are few.
_ANSWER_SECONDS_MAX = 400.0
# What takes seconds to import and starts no thread: a server has it, and each engine is a fork of
# that server, as fresh as if it had imported them itself.
PRELOADED = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "kvstore.connectors.vllm",
)


class Output(NamedTuple):
    """What an engine made of one prompt. *logprobs* has (token, logprob) pairs per position."""

    tokens: list[int]
    logprobs: list[list[tuple[int, float]]]
    reused: int


class Planned(NamedTuple):
    """A request, and after how many steps it is aborted (0: never)."""

    name: str
    prompt: list[int]
    tokens: int
    steps: int = 0


class Engine:
    """An engine in another process. Leave the `with` block to end it.

    *prepare* is called there before vLLM is imported: such a process is no fork.
    """

    def __init__(
        self,
        model: Path,
        *,
        socket: Path | None = None,
        dtype: str = "float32",
        processes: bool = False,
        extra: dict[str, object] | None = None,
        environment: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        **arguments: object,
    ) -> None:
        context = multiprocessing.get_context("forkserver" if prepare is None else "spawn")
        context.set_forkserver_preload([__name__, *PRELOADED])
        self._pipe, theirs = context.Pipe()
        settings = {"socket": str(socket), **(extra or {})} if socket is not None else None
        given = dict(model=str(model), dtype=dtype, **arguments)
        self._process = context.Process(
            target=_serve, args=(theirs, settings, processes, environment or {}, prepare, given)
        )
        self._process.start()
        theirs.close()
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine the way an application does."""
        if self._process.is_alive():
            self.call("close")
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        tokens: int = 8,
        salt: str | None = None,
        adapter: Path | None = None,
    ) -> list[Output]:
        """Return what the engine makes of *prompts*, all at once."""
        return self.call("generate", [list(prompt) for prompt in prompts], tokens, salt, adapter)

    def call(self, name: str, *arguments: object) -> Any:
        """Run a method of `Driver` and return its result."""
        self._pipe.send((name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(_ANSWER_SECONDS_MAX):
            self._process.kill()
            raise AssertionError("the engine does not answer")
        kind, content = self._pipe.recv()
        if kind == "error":
            raise EngineError(content)
        return content


class EngineError(Exception):
    """The other process raised; holds what it said."""


def _serve(
    pipe: Connection,
    settings: dict[str, object] | None,
    processes: bool,
    environment: dict[str, str],
    prepare: Callable[[], None] | None,
    arguments: dict[str, Any],
) -> None:
    os.environ.update(
        ENVIRONMENT | environment, VLLM_ENABLE_V1_MULTIPROCESSING="1" if processes else "0"
    )
    driver = None
    while True:
        try:
            if driver is None:
                if prepare is not None:
                    prepare()
                driver = Driver(settings, arguments)
                pipe.send(("ok", None))
                continue
            name, given = pipe.recv()
            pipe.send(("ok", getattr(driver, name)(*given)))
            if name == "close":
                return
        except Exception as error:  # noqa: BLE001  # the test is told
            pipe.send(("error", f"{type(error).__name__}: {error}"))
            if driver is None:
                return


class Driver:
    """Holds the `LLM`; every public method can be called from the test."""

    last_blocks: tuple[list[int], ...]

    # How vLLM numbers the adapters that it has been given.
    adapters: dict[Path, int]

    def __init__(self, settings: dict[str, object] | None, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        from kvstore.connectors.vllm_launch import transfer_config

        if settings is not None:
            config = json.loads(transfer_config(None)) | {"kv_connector_extra_config": settings}
            config["kv_role"] = arguments.pop("role", config["kv_role"])
            arguments["kv_transfer_config"] = config
        defaults = {
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "max_model_len": 4352,
            "seed": 0,
            "disable_log_stats": False,
        }
        self.in_process = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.adapters = {}
        if arguments.pop("events", False):
            from vllm.config import KVEventsConfig

            arguments["kv_events_config"] = KVEventsConfig(
                enable_kv_cache_events=True, publisher="null"
            )
        self.llm = LLM(**(defaults | arguments))

    def generate(
        self, prompts: list[list[int]], tokens: int, salt: str | None, adapter: Path | None
    ) -> list[Output]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        params = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, max_tokens=tokens, logprobs=5
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        for request in requests:
            if salt is not None:
                request["cache_salt"] = salt
        self._watch_blocks()
        lora = None
        if adapter is not None:
            number = self.adapters.setdefault(adapter, len(self.adapters) + 1)
            lora = LoRARequest(adapter.name, number, str(adapter))
        results = self.llm.generate(requests, params, use_tqdm=False, lora_request=lora)
        return [_output(result) for result in results]

    def hand_over(
        self, prompt: list[int], params: dict[str, Any] | None, tokens: int
    ) -> tuple[Output, dict[str, Any] | None]:
        """Return what is made of *prompt* under *params*, and what is given for the next engine."""
        from vllm import SamplingParams

        asked = SamplingParams(
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            max_tokens=tokens,
            logprobs=5,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        (result,) = self.llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        return _output(result), result.kv_transfer_params

    def abort_waiting(self, prompt: list[int], params: dict[str, Any]) -> None:
        """Begin a request under *params* and abort it while it waits for its load."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        asked = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
        engine.add_request("waiting", {"prompt_token_ids": prompt}, asked)
        for _ in range(3):
            engine.step()
        assert engine.has_unfinished_requests(), "it waits"
        engine.abort_request(["waiting"])

    def stepped_free_blocks(self) -> tuple[int, int]:
        """Return `free_blocks` behind one more step."""
        self.llm.llm_engine.engine_core.get_output()
        return self.free_blocks()

    def chunks_moved(self) -> tuple[int, int]:
        """Return how many chunks the worker's half has loaded, and how many did not come."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        counts = get_kv_transfer_group()._worker.counts
        return counts.chunks_loaded, counts.chunks_failed

    def load_seconds(self) -> float:
        """Return how long the worker's half has been loading chunks, waits for them included."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker.counts.load_seconds

    def computed_tokens(self) -> int:
        """Return how many tokens of prompts the engine has computed itself."""
        return self._metric("vllm:prompt_tokens") - self._metric("vllm:prompt_tokens_cached")

    def handoffs_kept(self) -> int:
        """Return how many hand-offs the scheduler's half still feeds."""
        return len(self.scheduler.connector._scheduler._handoffs._productions)

    def manifest(self) -> Any:
        """Return the manifest of the first group."""
        return self.scheduler.connector._scheduler._caches[0].manifest

    def first_token(self, prompt: list[int]) -> tuple[float, float]:
        """Return the seconds until the first token of *prompt*, and this process' CPU seconds."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, detokenize=False, max_tokens=1)
        wall, cpu = time.perf_counter(), time.process_time()
        self.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return time.perf_counter() - wall, time.process_time() - cpu

    def churn(self, plan: list[Planned], at_once: int) -> dict[str, list[int]]:
        """Run the requests of *plan*, *at_once* at a time; return the tokens of the finished.

        A request is aborted when it has seen as many steps as planned.
        """
        from vllm import SamplingParams

        engine, waiting = self.llm.llm_engine, list(reversed(plan))
        steps_left: dict[str, int] = {}
        finished: dict[str, list[int]] = {}
        while waiting or steps_left:
            while waiting and len(steps_left) < at_once:
                request = waiting.pop()
                params = SamplingParams(
                    temperature=0, ignore_eos=True, detokenize=False, max_tokens=request.tokens
                )
                engine.add_request(request.name, {"prompt_token_ids": request.prompt}, params)
                steps_left[request.name] = request.steps
            for result in engine.step():
                if result.finished:
                    finished[result.request_id] = list(result.outputs[0].token_ids)
                    steps_left.pop(result.request_id, None)
            for name in [name for name, left in steps_left.items() if left == 1]:
                engine.abort_request([name])
                del steps_left[name]
            for name in steps_left:
                steps_left[name] -= 1
        while engine.has_unfinished_requests():
            engine.step()
        self.settle()
        return finished

    def preemptions(self) -> int:
        """Return how often requests have been preempted."""
        return self._metric("vllm:num_preemptions")

    def external_hits(self) -> int:
        """Return how many tokens connectors have brought, whoever's they are."""
        return self._metric("vllm:external_prefix_cache_hits")

    def _metric(self, name: str) -> int:
        for metric in self.llm.get_metrics():
            if metric.name == name:
                return int(metric.value)
        raise AssertionError(f"vLLM does not count {name}")

    def watch_events(self) -> None:
        """Remember what is published from now on."""
        publisher = self.scheduler.kv_event_publisher
        self.batches: list[Any] = []
        publisher.publish = self.batches.append

    def published(self) -> list[tuple[str, str | None, str | None, list[Any]]]:
        """Return the events since the last call: kind, medium, owner and hashes."""
        batches, self.batches[:] = list(self.batches), []
        return [
            (type(event).__name__, event.medium, event.ownership, list(event.block_hashes))
            for batch in batches
            for event in batch.events
            if hasattr(event, "medium")
        ]

    def hit_sources(self) -> dict[str, int]:
        """Return how many external tokens vLLM has counted for each source."""
        sources: dict[str, int] = {}
        for metric in self.llm.get_metrics():
            source = metric.labels.get("source")
            if source is not None and hasattr(metric, "value"):
                sources[f"{metric.name} {source}"] = int(metric.value)
        return sources

    def settle(self) -> None:
        """Let the engine step until every store is finished."""
        connector = self.scheduler.connector
        while connector is not None and connector.has_pending_push_work():
            self.llm.llm_engine.engine_core.get_output()

    def forget(self) -> None:
        """Drop all that the engine itself has cached."""
        self.settle()
        assert self.llm.reset_prefix_cache(), "blocks are still in use"

    def reset(self) -> None:
        """Forget what is stored, too, as after new weights."""
        self.settle()
        assert self.scheduler.reset_prefix_cache(reset_connector=True)

    def free_blocks(self) -> tuple[int, int]:
        """Return how many blocks are free, and how many there are."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1

    def counts(self) -> dict[str, int]:
        """Return what the scheduler's half has counted."""
        counts = self.scheduler.connector._scheduler.counts
        return {name: getattr(counts, name) for name in counts.__slots__}

    def tracked(self) -> int:
        """Return how many requests the scheduler's half still knows."""
        return len(self.scheduler.connector._scheduler._requests)

    def is_connected(self) -> bool:
        """Whether both halves have found the daemon; steps are not needed for that."""
        return all(cache.is_connected for cache in self._caches())

    def kill_at(self, moment: str, pid: int) -> None:
        """Kill process *pid* when next a *moment* ("lookup", "load", "store") comes."""
        moment = {"lookup": "find"}.get(moment, moment)
        for cache in self._caches():
            ask = getattr(cache, moment)

            def kill(*arguments: Any, ask: Any = ask, **options: Any) -> Any:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return ask(*arguments, **options)

            setattr(cache, moment, kill)

    def _caches(self) -> list[Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker = get_kv_transfer_group()._worker
        return [*worker._caches, *self.scheduler.connector._scheduler._caches]

    def value_sample(self, token: int) -> bytes:
        """Return the values of *token* of the last prompt, in the last layer, as stored."""
        layer = self.runner.kv_caches[-1]
        _, heads, block_tokens, width = layer.shape
        groups = self.scheduler.kv_cache_config.kv_cache_groups
        last = f".{len(self.runner.kv_caches) - 1}."
        (blocks,) = (
            blocks
            for blocks, group in zip(self.last_blocks, groups, strict=True)
            if any(last in name for name in group.layer_names)
        )
        block = blocks[token // block_tokens]
        page = layer[block].reshape(heads, -1)
        start = (block_tokens + token % block_tokens) * (width // 2)
        return page[0, start : start + width // 2].numpy().tobytes()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _watch_blocks(self) -> None:
        """Remember the blocks of the last request that was allocated any."""
        connector = self.scheduler.connector if self.in_process else None
        if connector is None or hasattr(connector, "watched"):
            return
        connector.watched = connector.update_state_after_alloc

        def watch(request: Any, blocks: Any, tokens: int) -> None:
            self.last_blocks = blocks.get_block_ids()
            connector.watched(request, blocks, tokens)

        connector.update_state_after_alloc = watch

    @property
    def runner(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler


def _output(result: Any) -> Output:
    completion = result.outputs[0]
    logprobs = [
        [(token, value.logprob) for token, value in position.items()]
        for position in completion.logprobs
    ]
    return Output(list(completion.token_ids), logprobs, result.num_cached_tokens)
