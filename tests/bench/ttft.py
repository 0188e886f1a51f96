"""Time to the first token of a 205M model with and without a stored prefix of 4,096 tokens.

Runs its own daemon. Prints medians: the engine alone, kvstore when nothing is stored, kvstore
when the prefix is; and the control: damaged bytes are caught by the checksum, and change the
logits when checksums are off.

Run from the root of the repository: python -m tests.bench.ttft [--rounds 7] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import DynamicCache, PreTrainedModel

from deploy.demo.daemon import running_daemon
from deploy.demo.models import SHAPES
from kvstore.connectors.huggingface import PrefixedCache, PrefixReuse
from tests.engine.damage import scramble


@dataclass(frozen=True)
class Times:
    """Seconds, medians. *begin* is look-up and load alone, a part of *warm*.

    The overhead of a miss is small, so it is compared in CPU seconds, which a busy machine
    disturbs less.
    """

    alone: float
    alone_cpu: float
    miss: float
    miss_cpu: float
    warm: float
    begin: float
    finish: float

    @property
    def speedup(self) -> float:
        return self.alone / self.warm


@dataclass(frozen=True)
class Control:
    """What became of one damaged chunk, the last of the prefix."""

    reused_tokens: int
    same_bits: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="large")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens that are stored")
    parser.add_argument("--suffix", type=int, default=32, help="tokens behind them")
    parser.add_argument("--rounds", type=int, default=7, help="warm runs; cold ones are two")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model]
    model = shape.make()
    ids = torch.randint(
        256,
        (1, arguments.prefix + arguments.suffix),
        generator=torch.Generator().manual_seed(1),
    )
    bench = Bench(model, ids, arguments.prefix, shape.chunk_tokens)
    with bench.daemon("xxh3") as (prefixes, pid):
        times = bench.measure(prefixes, arguments.rounds)
        same_bits = torch.equal(bench.logits(prefixes.begin(ids)), bench.expected(arguments.prefix))
        caught = bench.damage(prefixes, pid)
    with bench.daemon("off") as (prefixes, pid):
        bench.store_again(prefixes)
        missed = bench.damage(prefixes, pid)
    result = {
        "model": shape.summary,
        "prompt_tokens": ids.shape[1],
        "reused_tokens": arguments.prefix,
        "seconds": asdict(times),
        "speedup": times.speedup,
        "overhead_of_a_miss": times.miss_cpu / times.alone_cpu - 1,
        "same_bits": same_bits,
        "damaged_with_checksums": asdict(caught),
        "damaged_without_checksums": asdict(missed),
    }
    print(json.dumps(result, indent=2) if arguments.json else table(result))


class Bench:
    """One model and one prompt, and the engine's own cache of it."""

    def __init__(
        self, model: PreTrainedModel, ids: torch.Tensor, prefix: int, chunk_tokens: int
    ) -> None:
        self.model = model
        self.ids = ids
        self.prefix = prefix
        self.chunk_tokens = chunk_tokens
        self.own = DynamicCache(config=model.config)

    @contextmanager
    def daemon(self, checksum: str) -> Iterator[tuple[PrefixReuse, int]]:
        settings = ["tiers.host.capacity=512MiB", f"tiers.host.checksum={checksum}"]
        with running_daemon(settings) as (socket, process):
            model, step = self.model, self.chunk_tokens
            options = {"chunk_tokens": step, "socket": socket, "timeout_seconds": 1.0}
            with PrefixReuse(model, **options) as prefixes:
                yield prefixes, process.pid

    def measure(self, prefixes: PrefixReuse, rounds: int) -> Times:
        """Cold runs first: from then on the prefix is stored."""
        self.first_token(DynamicCache(config=self.model.config), self.ids[:, :64])
        alone, miss = [], []
        for attempt in range(2):
            self.own = DynamicCache(config=self.model.config)
            alone.append(timed(lambda: self.first_token(self.own)))
            # Another salt is another prefix: this is a miss again.
            salt = b"round %d" % attempt
            miss.append(timed(lambda s=salt: self.first_token(prefixes.begin(self.ids, salt=s))))
        finish = timed(lambda: self.store_again(prefixes))
        warm, begin = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            past = prefixes.begin(self.ids)
            begin.append(time.perf_counter() - start)
            self.first_token(past)
            warm.append(time.perf_counter() - start)
            assert past.report.reused_tokens == self.prefix, "the prefix was not found"
        return Times(
            *map(statistics.median, zip(*alone, strict=True)),
            *map(statistics.median, zip(*miss, strict=True)),
            statistics.median(warm),
            statistics.median(begin),
            finish[0],
        )

    def store_again(self, prefixes: PrefixReuse) -> None:
        """Store the prompt from the engine's own cache, without computing it again."""
        with prefixes.begin(self.ids) as past:
            for index, layer in enumerate(self.own.layers):
                past.update(layer.keys, layer.values, index)

    def damage(self, prefixes: PrefixReuse, pid: int) -> Control:
        """Flip a bit in the last stored chunk, and say what that does to the next prompt."""
        row = self.own.layers[0].keys[0, 0, self.prefix - self.chunk_tokens]
        assert scramble(pid, row.numpy().tobytes()) == 1, "the chunk was not found in the arena"
        past = prefixes.begin(self.ids)
        reused = past.report.reused_tokens
        return Control(reused, torch.equal(self.logits(past), self.expected(reused)))

    def expected(self, prefix: int) -> torch.Tensor:
        """Logits of the engine alone, continuing its own cache of *prefix* tokens."""
        past = DynamicCache(config=self.model.config)
        for index, layer in enumerate(self.own.layers):
            past.update(layer.keys[:, :, :prefix], layer.values[:, :, :prefix], index)
        return self.logits(past)

    def logits(self, past: DynamicCache | PrefixedCache) -> torch.Tensor:
        with torch.inference_mode():
            suffix = self.ids[:, past.get_seq_length() :]
            return self.model(suffix, past_key_values=past, logits_to_keep=1).logits

    def first_token(self, past: DynamicCache, ids: torch.Tensor | None = None) -> None:
        ids = self.ids if ids is None else ids
        mask = torch.ones_like(ids)
        self.model.generate(
            ids, attention_mask=mask, past_key_values=past, max_new_tokens=1, do_sample=False
        )


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that *call* takes, and its CPU seconds over all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def table(result: dict) -> str:
    times = result["seconds"]
    overhead = f"({result['overhead_of_a_miss']:+.1%} of its CPU time)"
    faster = f"({result['speedup']:.1f}x faster)"
    lines = [
        result["model"],
        f"prompt {result['prompt_tokens']:,} tokens, reused {result['reused_tokens']:,}",
        "",
        f"engine alone               {times['alone']:9.3f} s",
        f"kvstore, nothing stored    {times['miss']:9.3f} s  {overhead}",
        f"kvstore, prefix stored     {times['warm']:9.3f} s  {faster}",
        f"  of it look-up and load   {times['begin']:9.3f} s",
        f"storing, after the answer  {times['finish']:9.3f} s",
        "",
        f"logits equal to the engine's own, bit for bit: {yes(result['same_bits'])}",
        f"one bit damaged, checksums on:  {control(result['damaged_with_checksums'])}",
        f"one bit damaged, checksums off: {control(result['damaged_without_checksums'])}",
    ]
    return "\n".join(lines)


def control(found: dict) -> str:
    return f"{found['reused_tokens']:,} tokens reused, same bits: {yes(found['same_bits'])}"


def yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    main()
