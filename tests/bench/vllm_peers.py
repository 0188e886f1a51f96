"""kvstore and LMCache side by side: the same vLLM engine, machine and prompts, in turns.

For each of them one engine stores, and one that has never seen the prompts loads. The engine
without a connector gives the cold time and vLLM's own prefix hit. Then prompts that nobody has
seen, in turns with and without each connector: what storing every prompt costs. Medians, with
their quartiles. LMCache runs as its own server, on CPU tensors; ours beside it is a daemon.

LMCache is not installed with kvstore. Put it, without its dependencies, into a folder of its own:

    FOLDER=/somewhere; .venv/bin/uv pip install --python .venv-vllm --no-deps --target $FOLDER \
        lmcache==0.5.6 aiofile aiofiles caio awscrt nvtx redis hiredis sortedcontainers msgpack \
        'opentelemetry-exporter-prometheus<=0.61b0'

Then, from the root of the repository, where vLLM is installed:
python -m tests.bench.vllm_peers --lmcache FOLDER [--model 29m-float32|234m-bfloat16] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from deploy.demo.daemon import running_daemon, stop
from kvstore.connectors.vllm_launch import transfer_config
from tests.bench.vllm_ttft import FRESH_TOKENS, MODELS, PREFIX, SUFFIX, seconds
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine
from tests.support.waiting import wait_until

SERVER_SECONDS_MAX = 120.0
STOP_SECONDS = 30.0
CAPACITY_GIB = 3
NO_HITS: dict[str, object] = {"seconds": {}, "ratios": {}}
QUIET = {
    "DO_NOT_TRACK": "1",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "WARNING",
    "LMCACHE_TRACK_USAGE": "false",
}


class Peer(NamedTuple):
    """One store with its connector: an engine that stores, and one that only loads."""

    name: str
    writer: Engine
    reader: Engine


def main() -> None:
    arguments = parse()
    if arguments.lmcache is not None:
        # Behind everything else: the engine keeps its own versions of what both bring.
        sys.path.append(str(arguments.lmcache))
        os.environ.update(QUIET)
    dtype, shape = MODELS[arguments.model]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = models.save(folder, "llama", **shape)
        alone = stack.enter_context(Engine(model, dtype=dtype))
        peers = []
        for name, config in stores(stack, arguments, folder):
            engines = [
                stack.enter_context(
                    Engine(model, dtype=dtype, kv_transfer_config=config, prepare=tame_llvmlite)
                )
                for _ in range(2)
            ]
            peers.append(Peer(name, *engines))
        bench = Bench(alone, peers, arguments.rounds)
        result = {
            "model": arguments.model,
            "prompt_tokens": PREFIX + SUFFIX,
            "reused_tokens": PREFIX,
            **(bench.hits() if arguments.only != "overhead" else NO_HITS),
            "overhead": bench.overhead() if arguments.only != "hits" else {},
        }
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="29m-float32")
    parser.add_argument("--rounds", type=int, default=5, help="prompts for each figure")
    parser.add_argument("--lmcache", type=Path, help="folder that holds LMCache")
    parser.add_argument("--layout", choices=("auto", "canonical", "opaque"), default="auto")
    parser.add_argument(
        "--only", choices=("hits", "overhead"), help="half of it: a large model is slow"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def stores(
    stack: ExitStack, arguments: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, dict[str, object]]]:
    """Start each store and yield its name, and what makes vLLM use it."""
    socket_path, _ = stack.enter_context(running_daemon([f"tiers.host.capacity={CAPACITY_GIB}GiB"]))
    ours = json.loads(transfer_config(socket_path))
    ours["kv_connector_extra_config"]["layout"] = arguments.layout
    yield "kvstore", ours
    if arguments.lmcache is not None:
        port = stack.enter_context(lmcache_server(arguments.lmcache, folder / "lmcache.log"))
        yield (
            "lmcache",
            {
                "kv_connector": "LMCacheMPConnector",
                "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "lmcache.mp.host": "tcp://127.0.0.1",
                    "lmcache.mp.port": port,
                },
            },
        )


@contextmanager
def lmcache_server(folder: Path, log: Path) -> Iterator[int]:
    """Serve with LMCache's own server; give its port."""
    port, http_port = free_port(), free_port()
    command = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--http-port", str(http_port)]
    command += ["--l1-size-gb", str(CAPACITY_GIB), "--no-l1-use-lazy", "--eviction-policy", "LRU"]
    command += ["--supported-transfer-mode", "auto", "--max-cpu-workers", "2"]
    command += ["--shm-name", f"bench{os.getpid()}"]
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(folder)}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        wait_until(
            lambda: process.poll() is not None or (accepts(port) and accepts(http_port)),
            seconds=SERVER_SECONDS_MAX,
            what="LMCache's server accepts connections",
        )
        if process.poll() is not None:
            raise SystemExit(f"LMCache's server ended:\n{log.read_text()[-4000:]}")
        yield port
    finally:
        stop(process, STOP_SECONDS)


def tame_llvmlite() -> None:
    """Have llvmlite's library have no attributes of Python's own.

    LMCache imports it, it claims to have any attribute, and vLLM trips over that at its start
    when it looks through all modules.
    """
    from llvmlite.binding import ffi

    kind = ffi._lib_wrapper
    find = kind.__getattr__

    def find_functions(library: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return find(library, name)

    kind.__getattr__ = find_functions


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Bench:
    """Measures what belongs together in turns, so that a noisy moment hits all of it."""

    def __init__(self, alone: Engine, peers: list[Peer], rounds: int) -> None:
        self.alone = alone
        self.peers = peers
        self.rounds = rounds
        engines = [alone, *(engine for peer in peers for engine in (peer.writer, peer.reader))]
        for seed, engine in enumerate(engines, 90):
            for prompt in models.prompts(2, 512, seed=seed):
                engine.call("first_token", prompt)

    def hits(self) -> dict[str, object]:
        """Return the seconds of all ways to the first token, and what they are of each other."""
        prefixes = models.prompts(self.rounds, PREFIX, seed=1)
        before = {peer.name: peer.reader.call("external_hits") for peer in self.peers}
        rounds = [self.round(number, prefix) for number, prefix in enumerate(prefixes)]
        for peer in self.peers:
            found = peer.reader.call("external_hits") - before[peer.name]
            assert found == self.rounds * PREFIX, f"{peer.name} found {found} tokens"
        ratios = {}
        for peer in self.peers:
            hit = f"{peer.name} hit"
            ratios[f"{peer.name} hit against cold"] = [r["cold"] / r[hit] for r in rounds]
            ratios[f"{peer.name} hit against local hit"] = [r[hit] / r["local hit"] for r in rounds]
        return {
            "seconds": {name: spread([r[name] for r in rounds]) for name in rounds[0]},
            "ratios": {name: spread(found) for name, found in ratios.items()},
        }

    def round(self, number: int, prefix: list[int]) -> dict[str, float]:
        first, second = (prefix + end for end in models.prompts(2, SUFFIX, seed=100 + number))
        found = {"cold": seconds(self.alone, first)}
        for peer in self.peers:
            found[f"{peer.name} cold and stored"] = seconds(peer.writer, first)
            peer.writer.call("settle")
        for peer in self.peers:
            found[f"{peer.name} hit"] = seconds(peer.reader, second)
        found["local hit"] = seconds(self.alone, second)
        progress(f"round {number + 1} of {self.rounds}", found)
        return found

    def overhead(self) -> dict[str, dict[str, float]]:
        """Return how much longer prompts take that nobody has seen, when all are stored."""
        longer: dict[str, list[float]] = {peer.name: [] for peer in self.peers}
        for prompt in models.prompts(4 * self.rounds, FRESH_TOKENS, seed=7):
            without = seconds(self.alone, prompt)
            for peer in self.peers:
                longer[peer.name].append(seconds(peer.writer, prompt) / without - 1)
            progress("longer", {name: found[-1] for name, found in longer.items()})
        return {name: spread(found) for name, found in longer.items()}


def progress(what: str, found: dict[str, float]) -> None:
    """Say what one turn gave: a run that is cut short has not been for nothing."""
    line = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    print(f"{what}: {line}", file=sys.stderr, flush=True)


def spread(found: list[float]) -> dict[str, float]:
    """Return the median of *found* and its quartiles."""
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def table(result: dict) -> str:
    lines = [
        f"{result['model']}: {result['reused_tokens']:,} of {result['prompt_tokens']:,} tokens",
        "median (quartiles)",
        "",
    ]
    rows = [
        *((name, found, "{:.4f}", " s") for name, found in result["seconds"].items()),
        *((name, found, "{:.2f}", "x") for name, found in result["ratios"].items()),
        *((f"{n}, no hits, all stored", f, "{:+.1%}", "") for n, f in result["overhead"].items()),
    ]
    for name, found, form, unit in rows:
        middle, low, high = (form.format(found[key]) for key in ("median", "low", "high"))
        lines.append(f"{name:32} {middle}{unit} ({low} to {high})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
