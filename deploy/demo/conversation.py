"""The demo: a model skips its prefill because another process left its KV cache in the daemon.

    python deploy/demo/conversation.py [--quick]

Starts a daemon, lets a model talk about a long document in one process, then lets a second,
fresh process hold the same conversation, and prints what every turn cost. Nothing is fetched,
and nothing is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from daemon import running_daemon
from models import SHAPES

FOLDER: Final = Path(__file__).parent
HEADINGS: Final = (
    "process",
    "turn",
    "prompt",
    "reused",
    "without",
    "with",
    "faster",
    "stored",
    "same tokens",
    "same bits",
)
LINE: Final = "{:<8}{:>5}{:>8}{:>8}{:>11}{:>11}{:>9}{:>12}{:>13}{:>11}"


def main() -> int:
    """Run the demo; 1 when something was not the same with kvstore."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only a tiny model: seconds")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    names = ["tiny"] if arguments.quick else ["small", "large"]
    capacity = "256MiB" if arguments.quick else "2GiB"
    try:
        with (
            running_daemon([f"tiers.host.capacity={capacity}"]) as (socket, _),
            tempfile.TemporaryDirectory(prefix="kvstore-demo-") as folder,
        ):
            same = [converse(name, socket, Path(folder)) for name in names]
            print_notes()
            print_status(socket)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0 if all(same) else 1


def converse(name: str, socket: Path, folder: Path) -> bool:
    """Hold the conversation in two processes; return whether all of it was the same."""
    print(f"\nLlama-shaped, {SHAPES[name].summary}\n")
    print(f"{'':29}{'time to first token':>22}")
    print(LINE.format(*HEADINGS), flush=True)
    same = True
    for role in ("first", "second"):
        for row in speak(role, name, socket, folder / f"{name}.npz"):
            print(LINE.format(role, *cells(row)), flush=True)
            same = same and row["same_tokens"] and row["same_bits"]
    return same


def speak(role: str, name: str, socket: Path, reference: Path) -> Iterator[dict[str, Any]]:
    """Yield the turns of one process as they come."""
    command = [sys.executable, FOLDER / "speaker.py", role]
    command += ["--model", name, "--socket", socket, "--reference", reference]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None, "it was asked for"
        try:
            for line in process.stdout:
                yield json.loads(line)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        sys.exit(f"the {role} process failed")


def cells(row: dict[str, Any]) -> tuple[object, ...]:
    """Return what a turn showed as the columns of the table, from the second on."""
    without, with_ = row["seconds_without"], row["seconds_with"]
    return (
        row["turn"],
        f"{row['prompt_tokens']:,}",
        f"{row['reused_tokens']:,}",
        f"{without:.3f} s",
        f"{with_:.3f} s",
        f"{without / with_:.1f}x" if row["reused_tokens"] else "miss",
        f"{row['bytes_stored'] / 2**20:.1f} MiB",
        "yes" if row["same_tokens"] else "NO",
        "yes" if row["same_bits"] else "NO",
    )


def print_notes() -> None:
    """Say what the columns mean."""
    print(
        """
without      the whole prompt is computed (taken in the first process)
with         look-up and load from the daemon, then the rest is computed
same tokens  the answers are equal with and without
same bits    the first logits equal those of the engine alone, continuing its own cache of
             the same prefix (one pass over everything rounds differently, with or without)
"""
    )


def print_status(socket: Path) -> None:
    """Show what the daemon has to say."""
    print("kvstore status", flush=True)
    command = [sys.executable, "-m", "kvstore", "status", "--socket", socket]
    subprocess.run(command, check=True)


def _stop(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
