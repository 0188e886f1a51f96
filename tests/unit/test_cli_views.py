"""`kvstore top`, `size` and `completion`: what they show, computed by hand beside them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvstore import cli
from kvstore.cli import size
from kvstore.cli.top import Top
from kvstore.errors import ConfigError, UnavailableError
from kvstore.metrics import Counters
from kvstore.protocol.messages import ArenaStats, DaemonStats, NamespaceStats, TierStats
from kvstore.units import round_size
from tests.support.daemon import REPOSITORY
from tests.support.making import make_digests, make_manifest, sources_of
from tests.support.waiting import wait_until

MIB = 2**20


def make_stats(pid: int = 7, *, used: int = 0, hits: int = 0, **counters: int) -> DaemonStats:
    tier = TierStats(
        tier="host", capacity_bytes=100 * MIB, used_bytes=used, largest_free_bytes=0, chunks=3,
        hit_chunks=hits,
    )  # fmt: skip
    return DaemonStats(
        version="9.9", pid=pid, state="ready", socket="/x", uptime_seconds=7200.0,
        resident_bytes=30 * MIB, sessions=2, leases=1, reservations=0, tiers=[tier],
        namespaces=[
            NamespaceStats(
                namespace="ab", model="evil\x1b[2J", revision="", dtype="bfloat16", group="",
                chunk_tokens=16, chunk_bytes=1, chunks=12345,
            )
        ],
        namespaces_count=1,
        arena=ArenaStats(kind="memfd", size_bytes=1, prefaulted_bytes=1, huge_pages=False),
        counters=Counters().as_dict() | counters,
    )  # fmt: skip


def top_over(answers: list[DaemonStats | Exception]) -> Top:
    def ask() -> DaemonStats:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    seconds: Iterator[int] = iter(range(0, 1000, 2))
    return Top(ask, clock=lambda: float(next(seconds)))


def text(top: Top) -> str:
    return "\n".join(top.frame(120, 50))


def test_top_shows_rates_between_looks():
    top = top_over([
        make_stats(lookup_chunks_ready=10, lookup_chunks_miss=10, load_bytes=0),
        make_stats(
            used=50 * MIB, hits=40, lookup_chunks_ready=40, lookup_chunks_miss=20,
            load_bytes=20 * MIB,
        ),
    ])  # fmt: skip
    top.look()
    assert "hit rate    -  since the start  50%" in text(top)
    top.look()
    shown = text(top)
    assert "hit rate  75%  since the start  67%" in shown
    assert re.search(r"loaded +10\.0 MiB/s", shown)
    assert re.search(r"host +█{20}·{20} +50\.0 MiB +100 MiB +3 +20 +ready", shown)
    assert "12,345" in shown
    assert "\x1b" not in shown


def test_top_keeps_what_it_saw_when_the_daemon_does_not_answer():
    top = top_over([make_stats(requests=5), UnavailableError("gone"), make_stats(pid=8)])
    top.look()
    top.look()
    assert "pid 7" in text(top)
    assert "no answer: gone" in text(top)
    top.look()
    assert "pid 8" in text(top)
    assert "no answer" not in text(top)


def test_top_has_no_rates_across_a_restart_and_fits_its_screen():
    top = top_over([make_stats(requests=1000), make_stats(pid=8, requests=2000)])
    top.look()
    top.look()
    assert re.search(r"requests/s +0 ", text(top))
    frame = top.frame(30, 5)
    assert len(frame) == 5
    assert all(len(line) <= 30 for line in frame)


def test_top_in_a_terminal_follows_the_daemon_until_q(shared_daemon):
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "kvstore", "top", "--interval", "0.1"]
    process = subprocess.Popen(
        [*command, "--socket", str(shared_daemon.socket)], cwd=REPOSITORY, stdin=its, stdout=its
    )
    os.close(its)
    os.set_blocking(ours, False)
    seen = bytearray()

    def shows(wanted: bytes) -> bool:
        with contextlib.suppress(BlockingIOError, OSError):
            seen.extend(os.read(ours, 65536))
        return wanted in seen

    wait_until(lambda: shows(b"\x1b[?1049h"), what="it takes the screen")
    with shared_daemon.connect("engine") as client:
        manifest, digests = make_manifest(model="seen-on-top"), make_digests(2)
        client.attach(manifest).store(digests, sources_of(manifest, digests))
        wait_until(lambda: shows(b"seen-on-top"), what="it shows what was stored")
    os.write(ours, b"q")
    wait_until(lambda: shows(b"\x1b[?1049l"), what="it gives the screen back")
    assert process.wait(20) == 0
    os.close(ours)


def test_top_without_a_terminal_is_one_look(shared_daemon, capsys):
    assert cli.main(["top", "--socket", str(shared_daemon.socket)]) == 0
    assert "hit rate" in capsys.readouterr().out


def test_top_says_when_there_is_no_daemon(tmp_path, capsys):
    assert cli.main(["top", "--socket", str(tmp_path / "none")]) == cli.UNREACHABLE
    assert "kvstore: " in capsys.readouterr().err


# --- size --------------------------------------------------------------------------------


def test_size_is_what_the_geometry_says(capsys):
    assert cli.main(["size", "llama-3.1-8b", "--capacity", "1GiB", "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_per_token"] == 32 * 2 * 8 * 128 * 2
    # 32 MiB, a table of 512 checksums of 8 bytes: a whole page.
    assert found["chunk_bytes"] == 32 * MIB + 4096
    assert found["capacity_tokens"] == 31 * 256


def test_latent_attention_has_one_head_and_no_values():
    found = size.sizes_of(size.MODELS["deepseek-v3"], chunk_tokens=256, capacity_bytes=2**30)
    assert found.bytes_per_token == 61 * 576 * 2


def test_the_table_in_the_docs_is_right():
    lines = (REPOSITORY / "docs" / "sizing.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if " x " in line
    ]
    told = [row[1:] for row in rows if len(row) == 5]
    known = dict.fromkeys(size.MODELS.values())
    found = {}
    for geometry in known:
        sizes = size.sizes_of(geometry, chunk_tokens=256, capacity_bytes=64 * 2**30)
        kinds = () if geometry.values == "k" else (2, geometry.kv_heads)
        product = " x ".join(map(str, (geometry.layers, *kinds, geometry.head_dim)))
        found[product] = [
            round_size(sizes.bytes_per_token), round_size(sizes.chunk_bytes),
            f"{sizes.capacity_tokens:,}",
        ]  # fmt: skip
    assert len(told) == 7
    for product, *figures in told:
        assert figures == found[product], product


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 512},
            size.Geometry(4, 8, 64),
        ),
        (
            {
                "num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 512,
                "num_key_value_heads": 2, "head_dim": 128, "torch_dtype": "float16",
            },
            size.Geometry(4, 2, 128, "float16"),
        ),
        (
            {
                "text_config": {
                    "num_hidden_layers": 2, "num_attention_heads": 8, "kv_lora_rank": 512,
                    "qk_rope_head_dim": 64,
                }
            },
            size.Geometry(2, 1, 576, "bfloat16", "k"),
        ),
    ],
)  # fmt: skip
def test_the_geometry_is_read_from_the_models_own_file(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert size.geometry_of(str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "not the configuration of a model"),
        ("{", "cannot be read as JSON"),
        ('{"num_hidden_layers": 3}', "num_attention_heads"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        size.geometry_of(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-model"],
        ["llama-3.1-8b", "--capacity", "much"],
        ["llama-3.1-8b", "--chunk-tokens", "0"],
    ],
)
def test_sizes_that_make_no_sense_are_refused(words, capsys):
    assert cli.main(["size", *words]) != 0
    assert capsys.readouterr().err.startswith("kvstore: ")


# --- completion ------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("serve", "status", "doctor", "top", "size"))


def test_bash_completes_by_it(tmp_path):
    script = tmp_path / "kvstore.bash"
    done = subprocess.run(
        [sys.executable, "-m", "kvstore", "completion", "bash"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    script.write_text(done.stdout)
    asks = (
        f"source {script}; COMP_WORDS=(kvstore st); COMP_CWORD=1; "
        "$(complete -p kvstore | sed 's/.*-F \\([^ ]*\\).*/\\1/') kvstore st kvstore; "
        'echo "${COMPREPLY[@]}"'
    )
    found = subprocess.run(["bash", "-c", asks], capture_output=True, text=True, check=True)
    assert "status" in found.stdout.split()
