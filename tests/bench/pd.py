"""Prefill and decode apart, with two vLLM engines: how soon the first token of decode comes.

In turn: when prefill has ended, decode is asked, and its time to the first token stands beside
that of its own prefix hit (the same prompt once more) plus the transfer, which is what its
connector says that loading took, the wait for each chunk included. Streamed: both begin at once;
seconds from there to prefill's token and to decode's. Then what each engine has computed.
One engine thread each; with `--hosts 2`, a daemon each, and TCP with a token between them.

Run from the root of the repository, where vLLM is installed:
python -m tests.bench.pd [--model 29m-float32|234m-bfloat16] [--tokens 4096] [--hosts 1|2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench.vllm_ttft import MODELS
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine
from tests.support.daemon import Daemon
from tests.support.hosts import called, caller, free_port

CHUNK_TOKENS = 128
# Behind the last whole chunk: decode computes it in any case.
TAIL = 96
STEP_TOKENS = 1024
CAPACITY = {"tiers.host.capacity": "3GiB"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="29m-float32")
    parser.add_argument("--tokens", type=int, default=4096, help="that are handed over")
    parser.add_argument("--rounds", type=int, default=5, help="prompts for each way")
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    dtype, shape = MODELS[arguments.model]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = models.save(folder, "llama", **shape)
        daemons = [stack.enter_context(daemon) for daemon in hosts(folder, arguments.hosts)]
        engines = [
            stack.enter_context(
                Engine(
                    model,
                    socket=daemon.socket,
                    dtype=dtype,
                    extra={"chunk_tokens": CHUNK_TOKENS},
                    max_num_batched_tokens=STEP_TOKENS,
                    role=role,
                )
            )
            for daemon, role in ((daemons[0], "kv_producer"), (daemons[-1], "kv_consumer"))
        ]
        bench = Bench(*engines, "prefill" if arguments.hosts == 2 else "")
        result = bench.run(arguments.rounds, arguments.tokens + TAIL)
    result = {"model": arguments.model, "hosts": arguments.hosts} | result
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def hosts(folder: Path, count: int) -> list[Daemon]:
    """Return the daemons, prefill's first."""
    port = free_port()
    here = called(folder / "prefill", port, CAPACITY)
    return [here] if count == 1 else [here, caller(folder / "decode", port, CAPACITY)]


class Bench:
    """A prefill engine and a decode engine; the daemon of the former is decode's *peer*, if any."""

    def __init__(self, prefill: Engine, decode: Engine, peer: str) -> None:
        self.prefill = prefill
        self.decode = decode
        self.peer = peer
        # Neither of them is cold in the first round.
        for number, prompt in enumerate(models.prompts(2, 4 * CHUNK_TOKENS + TAIL, seed=97)):
            self.in_turn(prompt) if number else self.streamed(prompt, "warm up")

    def run(self, rounds: int, tokens: int) -> dict[str, Any]:
        before = self.computed()
        prompts = models.prompts(2 * rounds, tokens, seed=1)
        found = []
        for number, (one, other) in enumerate(zip(prompts[::2], prompts[1::2], strict=True)):
            found.append(self.in_turn(one) | self.streamed(other, f"round {number}"))
        after = self.computed()
        # Decode computes the end of a prompt once more for its prefix hit.
        after["decode computes"] -= rounds * TAIL
        each = {name: (after[name] - before[name]) / 2 / rounds for name in after}
        seconds = {name: statistics.median(r[name] for r in found) for name in found[0]}
        ratios = [r["decode"] / (r["local hit"] + r["transfer"]) for r in found]
        return {
            "prompt_tokens": tokens,
            "rounds": rounds,
            "seconds": seconds,
            "ratio": statistics.median(ratios),
            "ratios": sorted(ratios),
            "tokens_a_prompt": each,
        }

    def in_turn(self, prompt: list[int]) -> dict[str, float]:
        """Return the seconds of prefill, of decode behind it, of the transfer and a prefix hit."""
        prefill, params = first_token(self.prefill, prompt, {"do_remote_decode": True})
        self.prefill.call("settle")
        loading = self.decode.call("load_seconds")
        decode, _ = first_token(self.decode, prompt, params)
        transfer = self.decode.call("load_seconds") - loading
        local, _ = first_token(self.decode, prompt, None)
        return {"prefill": prefill, "decode": decode, "transfer": transfer, "local hit": local}

    def streamed(self, prompt: list[int], name: str) -> dict[str, float]:
        """Return the seconds until each engine's first token when both begin at once."""
        name = f"{name} of the benchmark"
        taken: dict[str, float] = {}

        def take() -> None:
            terms = {"do_remote_prefill": True, "transfer_id": name, "early": True}
            terms["remote_host"] = self.peer
            taken["streamed: decode"], _ = first_token(self.decode, prompt, terms)

        decoding = threading.Thread(target=take)
        decoding.start()
        terms = {"do_remote_decode": True, "transfer_id": name}
        taken["streamed: prefill"], _ = first_token(self.prefill, prompt, terms)
        decoding.join()
        return taken

    def computed(self) -> dict[str, int]:
        """Return what has been computed and handed over, in tokens."""
        counts = self.decode.call("counts")
        assert not counts["load_failures"], "every chunk has come"
        return {
            "prefill computes": self.prefill.call("computed_tokens"),
            "decode is handed": counts["tokens_handed"],
            "decode computes": self.decode.call("computed_tokens"),
        }


def first_token(
    engine: Engine, prompt: list[int], terms: dict[str, Any] | None
) -> tuple[float, dict[str, Any] | None]:
    """Return the seconds until *engine* has the first token, and what it hands over."""
    started = time.perf_counter()
    _, params = engine.call("hand_over", prompt, terms, 1)
    return time.perf_counter() - started, params


def table(result: dict[str, Any]) -> str:
    ratios = result["ratios"]
    lines = [
        f"{result['model']}, daemons: {result['hosts']}",
        f"prompts of {result['prompt_tokens']:,} tokens, {result['rounds']} each way, medians",
        "",
        *(f"{name:20} {value:8.4f} s" for name, value in result["seconds"].items()),
        "",
        f"decode: {result['ratio']:.2f}x a local prefix hit plus transfer",
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
        *(f"{name}: {value:,.0f} tokens" for name, value in result["tokens_a_prompt"].items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
