"""Time to the first token of a vLLM engine: cold, loaded from the daemon, and its own cache.

Runs its own daemon, and every engine in a process of its own: one without the connector, one
that stores, and a fresh one that loads what the other has stored. Then prompts that nobody has
seen, in turns with and without the connector: what storing every prompt costs. Medians.

Run from the root of the repository, where vLLM is installed:
python -m tests.bench.vllm_ttft [--model 29m-float32|234m-bfloat16] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deploy.demo.daemon import running_daemon
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine

MODELS = {
    "29m-float32": (
        "float32",
        {
            "vocab_size": 32_000,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
    "234m-bfloat16": (
        "bfloat16",
        {
            "vocab_size": 32_000,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
    ),
}
PREFIX, SUFFIX = 4096, 128
FRESH_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="29m-float32")
    parser.add_argument("--rounds", type=int, default=5, help="prompts for each figure")
    parser.add_argument("--layout", choices=("auto", "canonical", "opaque"), default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    dtype, shape = MODELS[arguments.model]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = models.save(folder, "llama", **shape)
        socket, _ = stack.enter_context(running_daemon(["tiers.host.capacity=3GiB"]))
        bench = Bench(model, dtype, socket, arguments.layout, arguments.rounds)
        seconds = bench.hits()
        overhead = bench.overhead()
    result = {
        "model": arguments.model,
        "layout": arguments.layout,
        "prompt_tokens": PREFIX + SUFFIX,
        "reused_tokens": PREFIX,
        "seconds": seconds,
        "hit_against_cold": seconds["cold"] / seconds["hit"],
        "hit_against_local_hit": seconds["hit"] / seconds["local_hit"],
        "overhead": overhead,
    }
    print(json.dumps(result, indent=2) if arguments.json else table(result))


class Bench:
    """One model, one daemon, and prompts that share nothing but what they are meant to."""

    def __init__(self, model: Path, dtype: str, socket: Path, layout: str, rounds: int) -> None:
        self.model = model
        self.dtype = dtype
        self.socket = socket
        self.extra = {"layout": layout}
        self.rounds = rounds
        self.prefixes = models.prompts(rounds, PREFIX, seed=1)

    @contextmanager
    def engine(self, *, connected: bool) -> Iterator[Engine]:
        socket = self.socket if connected else None
        with Engine(self.model, socket=socket, dtype=self.dtype, extra=self.extra) as engine:
            for prompt in models.prompts(2, 256, seed=99):
                engine.call("first_token", prompt)
            yield engine

    def hits(self) -> dict[str, float]:
        """Return the medians of all ways to the first token."""
        with self.engine(connected=False) as engine:
            cold = self.times(engine, 2)
            local_alone = self.times(engine, 3)
        with self.engine(connected=True) as engine:
            stored = self.times(engine, 4)
            engine.call("settle")
        with self.engine(connected=True) as engine:
            before = engine.call("counts")["tokens_hit"]
            hit = self.times(engine, 5)
            found = engine.call("counts")["tokens_hit"] - before
            assert found == self.rounds * PREFIX, f"{found} tokens were found"
            local = self.times(engine, 6)
        return {
            "cold": cold,
            "cold_and_stored": stored,
            "hit": hit,
            "local_hit": local_alone,
            "local_hit_connected": local,
        }

    def times(self, engine: Engine, seed: int) -> float:
        """Return the median over all prefixes, each with an end that nobody has seen."""
        ends = models.prompts(self.rounds, SUFFIX, seed=seed)
        prompts = [prefix + end for prefix, end in zip(self.prefixes, ends, strict=True)]
        return statistics.median(engine.call("first_token", prompt)[0] for prompt in prompts)

    def overhead(self) -> dict[str, float]:
        """Return how much longer prompts that nobody has seen take when all are stored.

        As a share of the time without the connector: the median over pairs, and its quartiles;
        the same for the CPU time of the engine's process.
        """
        walls, cpus = [], []
        with self.engine(connected=False) as alone, self.engine(connected=True) as connected:
            for prompt in models.prompts(4 * self.rounds, FRESH_TOKENS, seed=7):
                wall, cpu = alone.call("first_token", prompt)
                wall_stored, cpu_stored = connected.call("first_token", prompt)
                walls.append(wall_stored / wall - 1)
                cpus.append(cpu_stored / cpu - 1)
        low, middle, high = statistics.quantiles(walls, n=4)
        return {
            "wall": middle,
            "wall_quartile_low": low,
            "wall_quartile_high": high,
            "cpu": statistics.median(cpus),
        }


def table(result: dict) -> str:
    seconds, overhead = result["seconds"], result["overhead"]
    spread = f"({overhead['wall_quartile_low']:+.1%} to {overhead['wall_quartile_high']:+.1%})"
    lines = [
        f"{result['model']}, layout {result['layout']}",
        f"prompt {result['prompt_tokens']:,} tokens, reused {result['reused_tokens']:,}",
        "",
        *(f"{name.replace('_', ' '):22} {value:8.4f} s" for name, value in seconds.items()),
        "",
        f"hit against cold: {result['hit_against_cold']:.1f}x faster",
        f"hit against vLLM's own prefix hit: {result['hit_against_local_hit']:.2f}x its time",
        f"no hits, all stored: {overhead['wall']:+.1%} {spread}, CPU {overhead['cpu']:+.1%}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
