"""Traces: what is recorded of look-ups, and that another daemon can be asked the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore import cli
from kvstore.cli import trace
from kvstore.errors import ConfigError
from kvstore.limits import TRACE_DIGESTS_MAX, TRACE_IDLE_SECONDS, TRACE_PAGE_DIGESTS_MAX
from kvstore.store.tracing import Tracing
from tests.support.addresses import admin_url
from tests.support.daemon import REPOSITORY
from tests.support.making import loose_digest, make_digests, make_manifest, sources_of
from tests.support.waiting import wait_until

LOOKUP = {"at": 1, "namespace": "ab" * 16, "chunk_bytes": 1, "hits": 0}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_tracing() -> tuple[Tracing, Clock]:
    clock = Clock()
    return Tracing(clock, lambda: 100.0 + clock.now, b"secret"), clock


def note(tracing: Tracing, *numbers: int, hits: int = 0) -> None:
    if tracing.is_on:
        tracing.note(None, [loose_digest(number) for number in numbers], hits)  # type: ignore[arg-type]


def test_nothing_is_noted_until_somebody_asks_nor_long_after():
    tracing, clock = make_tracing()
    note(tracing, 1)
    assert tracing.after(0, 10) == []
    note(tracing, 2, 3, hits=1)
    (found,) = tracing.after(0, 10)
    assert (found.number, found.at, found.hits, len(found.chunks)) == (1, 100.0, 1, 2)
    clock.now += TRACE_IDLE_SECONDS
    assert not tracing.is_on
    assert tracing.after(0, 10) == []


def test_a_page_has_few_look_ups_where_they_are_long_and_one_at_least():
    tracing, _ = make_tracing()
    tracing.after(0, 1)
    for size in (TRACE_PAGE_DIGESTS_MAX + 1, TRACE_PAGE_DIGESTS_MAX, 1, 1):
        note(tracing, *range(size))
    pages = [[one.number for one in tracing.after(after, 10)] for after in (0, 1, 2)]
    assert pages == [[1], [2], [3, 4]]


def test_equal_chunks_have_equal_marks_that_only_this_process_can_make():
    tracing, _ = make_tracing()
    tracing.after(0, 1)
    note(tracing, 1, 2)
    note(tracing, 1, 3)
    first, second = tracing.after(0, 10)
    assert first.chunks[0] == second.chunks[0]
    assert first.chunks[1] != second.chunks[1]
    assert loose_digest(1).hex()[:16] not in first.chunks
    other = Tracing(Clock(), Clock(), b"another")
    other.after(0, 1)
    note(other, 1)
    assert other.after(0, 1)[0].chunks[0] != first.chunks[0]


def test_the_oldest_make_room_and_their_numbers_are_missed():
    tracing, _ = make_tracing()
    tracing.after(0, 1)
    half = range(TRACE_DIGESTS_MAX // 2)
    for _ in range(3):
        note(tracing, *half)
    pages = [[one.number for one in tracing.after(after, 10)] for after in (0, 2)]
    assert pages == [[2], [3]]


def test_what_engines_look_up_is_recorded_and_replayed(start_daemon, tmp_path, capsys):
    daemon = start_daemon({"admin.listen": "127.0.0.1:0"})
    url, file = admin_url(daemon), tmp_path / "trace.jsonl"
    command = [sys.executable, "-m", "kvstore", "trace", "record", str(file), "--admin", url]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as recording:
        wait_until(lambda: file.exists() and file.read_text(), what="it records")
        manifest = make_manifest()
        with daemon.connect() as client:
            space = client.attach(manifest)
            for prompt, chunks in ((1, 4), (1, 6), (2, 3)):
                digests = make_digests(chunks, prompt)
                space.lookup(digests)
                space.store(digests, sources_of(manifest, digests))
        wait_until(lambda: file.read_text().count("\n") == 4, what="it has recorded")
        recording.terminate()
        said, _ = recording.communicate(timeout=20)
    assert recording.returncode == cli.OK
    assert said == "3 look-ups, 13 chunks, 0 lost\n"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == {"kvstore_trace": 1}
    assert [len(line["chunks"]) for line in lines[1:]] == [4, 6, 3]
    assert [line["hits"] for line in lines[1:]] == [0, 4, 0]
    assert lines[1]["chunks"] == lines[2]["chunks"][:4]
    assert make_digests(1, 1)[0].hex()[:16] not in file.read_text()

    other = start_daemon()
    assert cli.main(["trace", "replay", str(file), "--socket", str(other.socket)]) == cli.OK
    shown = json.loads(capsys.readouterr().out)
    assert (shown["lookups"], shown["asked"], shown["hits"], shown["stored"]) == (3, 13, 4, 9)
    assert shown["hit_rate"] == shown["recorded_hit_rate"] == round(4 / 13, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r":1: not of a trace"),
        ('{"kvstore_trace": 2}\n', "format 2, known is 1"),
        ('{"kvstore_trace": 1}\n{"at": 1}\n', r":2: not of a trace: .*namespace"),
        (
            '{"kvstore_trace": 1}\n' + json.dumps(LOOKUP | {"chunks": ["x"]}),
            r":2: not of a trace: .*chunks",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_no_trace_is_refused_with_its_line(tmp_path: Path, text, said):
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        list(trace.read(file))


def test_recording_says_what_is_wrong_and_leaves_nothing_behind(tmp_path, capsys):
    file = tmp_path / "trace"
    words = ["trace", "record", str(file)]
    assert cli.main([*words, "--admin", "http://127.0.0.1:9"]) == cli.UNREACHABLE
    assert cli.main([*words, "--admin", "ftp://x"]) == cli.USAGE
    assert cli.main([*words, "--set", "admin.listen="]) == cli.USAGE
    assert not file.exists()
    said = capsys.readouterr().err
    assert "an admin URL is http://" in said
    assert "the admin API is off" in said


def test_replaying_what_is_not_there_says_so(shared_daemon, tmp_path, capsys):
    words = ["trace", "replay", str(tmp_path / "none"), "--socket", str(shared_daemon.socket)]
    assert cli.main(words) == cli.USAGE
    assert "cannot be read: No such file" in capsys.readouterr().err
