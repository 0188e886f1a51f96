"""Time to the first token of a vLLM engine: cold, loaded from the daemon, and its own cache.

Runs its own daemon, and three engines in processes of their own: one without the connector, one
that stores, and one that loads what it has never seen itself. Then prompts that nobody has seen,
in turns with and without the connector: what storing every prompt costs. Medians.

Run from the root of the repository, where vLLM is installed:
python -m tests.bench.vllm_ttft [--model 29m-float32|234m-bfloat16] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
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
        extra = {"layout": arguments.layout}
        engines = [
            stack.enter_context(Engine(model, socket=path, dtype=dtype, extra=extra))
            for path in (None, socket, socket)
        ]
        bench = Bench(*engines, arguments.rounds)
        rounds = bench.hits()
        overhead = bench.overhead()
    result = {
        "model": arguments.model,
        "layout": arguments.layout,
        "prompt_tokens": PREFIX + SUFFIX,
        "reused_tokens": PREFIX,
        "seconds": {name: statistics.median(r[name] for r in rounds) for name in rounds[0]},
        "hit_against_cold": ratio(rounds, "cold", "hit"),
        "hit_against_local_hit": ratio(rounds, "hit", "local_hit"),
        "overhead": overhead,
    }
    print(json.dumps(result, indent=2) if arguments.json else table(result))


class Bench:
    """Three engines of one model: without the connector, one that stores, one that loads.

    What belongs together is measured in turns, so that a noisy moment hits all of it.
    """

    def __init__(self, alone: Engine, writer: Engine, reader: Engine, rounds: int) -> None:
        self.alone = alone
        self.writer = writer
        self.reader = reader
        self.rounds = rounds
        for engine, seed in ((alone, 97), (writer, 98), (reader, 99)):
            for prompt in models.prompts(2, 512, seed=seed):
                engine.call("first_token", prompt)

    def hits(self) -> list[dict[str, float]]:
        """Return the seconds of all ways to the first token, round by round."""
        before = self.reader.call("counts")["tokens_hit"]
        prefixes = models.prompts(self.rounds, PREFIX, seed=1)
        seconds = [self.round(number, prefix) for number, prefix in enumerate(prefixes)]
        found = self.reader.call("counts")["tokens_hit"] - before
        assert found == self.rounds * PREFIX, f"{found} tokens were found"
        return seconds

    def round(self, number: int, prefix: list[int]) -> dict[str, float]:
        first, second, third = (
            prefix + end for end in models.prompts(3, SUFFIX, seed=100 + number)
        )
        stored = seconds(self.writer, first)
        self.writer.call("settle")
        return {
            "cold": seconds(self.alone, first),
            "cold_and_stored": stored,
            "hit": seconds(self.reader, second),
            "local_hit": seconds(self.alone, second),
            "local_hit_connected": seconds(self.reader, third),
        }

    def overhead(self) -> dict[str, float]:
        """Return how much longer prompts that nobody has seen take when all are stored.

        As a share of the time without the connector: the median over pairs, and its quartiles;
        the same for the CPU time of the engine's process.
        """
        walls, cpus = [], []
        for prompt in models.prompts(4 * self.rounds, FRESH_TOKENS, seed=7):
            wall, cpu = self.alone.call("first_token", prompt)
            wall_stored, cpu_stored = self.writer.call("first_token", prompt)
            walls.append(wall_stored / wall - 1)
            cpus.append(cpu_stored / cpu - 1)
        low, middle, high = statistics.quantiles(walls, n=4)
        return {
            "wall": middle,
            "wall_quartile_low": low,
            "wall_quartile_high": high,
            "cpu": statistics.median(cpus),
        }


def seconds(engine: Engine, prompt: list[int]) -> float:
    return engine.call("first_token", prompt)[0]


def ratio(rounds: list[dict[str, float]], one: str, other: str) -> float:
    """Return the median over rounds of *one* as a multiple of *other*."""
    return statistics.median(found[one] / found[other] for found in rounds)


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
