"""`kvstore explain`, `events`, `chunks` and `tenants`, against a real daemon."""

from __future__ import annotations

import io
import json

import pytest

from kvstore import cli
from kvstore.hashing import chunk_digests
from tests.support.admin import write_tokens
from tests.support.making import CHUNK_TOKENS, make_manifest, sources_of

TOKENS = list(range(9000, 9000 + 3 * CHUNK_TOKENS))


@pytest.fixture(scope="module")
def kept(served):
    """Three chunks of one prompt, the last of them deleted."""
    digests = chunk_digests(TOKENS, CHUNK_TOKENS)
    with served.connect("engine") as client:
        space = client.attach(make_manifest(model="commands"))
        space.store(digests, sources_of(space.manifest, digests))
        space.lookup(digests, name="cmpl-1")
        space.delete(digests[2:])
    return space.manifest.namespace_id().hex(), [digest.hex() for digest in digests]


@pytest.fixture
def call(admin, tmp_path, capsys):
    """Run one command against the daemon; return its status, what it printed and complained."""
    tokens = write_tokens(tmp_path / "tokens")

    def run(*words: str) -> tuple[int, str, str]:
        where = ("--admin", f"http://127.0.0.1:{admin.port}", "--token-file", str(tokens))
        status = cli.main([*words, *where])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_explain_names_the_cause_chunk_by_chunk(call, kept, monkeypatch):
    _, digests = kept
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(TOKENS)))
    for asked in (("--tokens", "-"), ("--request", "cmpl-1"), ("--digests", *digests)):
        status, out, _ = call("explain", *asked)
        assert status == 0
        assert "2 of 3 chunks are a hit" in out
        assert "deleted" in out.splitlines()[-1]
    assert "3 were, when it was looked up" in call("explain", "--request", "cmpl-1")[1]


def test_explain_takes_tokens_from_a_file_and_refuses_what_are_none(call, kept, tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_text(" ".join(map(str, TOKENS)))
    shown = json.loads(call("explain", "--tokens", str(file), "--output", "json")[1])
    assert (shown["hits"], shown["cause"]) == (2, "deleted")
    file.write_text("once upon a time")
    status, _, err = call("explain", "--tokens", str(file))
    assert status == 1
    assert "no token ids" in err


def test_events_are_lines(call):
    status, out, _ = call("events", "--limit", "1000")
    assert status == 0
    assert any("admin API is served" in line for line in out.splitlines())


def test_chunks_are_listed_pinned_verified_and_evicted(call, kept):
    namespace, digests = kept
    where = ("--namespace", namespace)
    listed = json.loads(call("chunks", *where, "--output", "json")[1])["chunks"]
    assert sorted(chunk["digest"] for chunk in listed) == sorted(digests[:2])
    assert "ok" in call("chunks", "verify", *digests[:2], *where)[1]
    assert call("chunks", "pin", *digests[:2], *where, "--hard")[0] == 0
    assert " hard " in call("chunks", *where)[1]
    # What is pinned stays, and the status says that not all was done.
    assert call("chunks", "evict", *digests[:2], *where)[0] == 1
    assert call("chunks", "unpin", *digests[:2], *where)[0] == 0
    assert call("chunks", "pin", *where)[0] == 1


def test_tenants_are_shown_and_their_quotas_changed(call):
    assert "blue" in call("tenants")[1]
    status, out, _ = call("tenants", "blue", "--quota", "2MiB", "--output", "json")
    assert status == 0
    quotas = {one["tenant"]: one["quota_bytes"] for one in json.loads(out)["tenants"]}
    assert quotas["blue"] == 2 << 20
    assert call("tenants", "blue", "--floor", "64MiB")[0] == 1


def test_statuses_tell_unreachable_from_refused_from_wrong(call, admin, tmp_path, capsys):
    closed = ["events", "--admin", "http://127.0.0.1:1"]
    assert cli.main(closed) == 3
    bare = ["chunks", "evict", "0" * 64, "--namespace", "0" * 32]
    assert cli.main([*bare, "--admin", f"http://127.0.0.1:{admin.port}"]) == 4
    assert cli.main(["events", "--admin", "ftp://example.org"]) == 2
    assert cli.main(["events", "--set", "admin.listen="]) == 2
    assert "off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--admin", "http://localhost:65536"], "localhost:65536: Port out of range"),
        (["--admin", "https://localhost:1", "--ca-file", "/nowhere/ca"], "/nowhere/ca: cannot be"),
    ],
)
def test_what_cannot_be_called_is_named_without_a_traceback(words, complaint, capsys):
    assert cli.main(["events", *words]) == 2
    assert complaint in capsys.readouterr().err
