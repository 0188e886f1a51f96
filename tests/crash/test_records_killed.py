"""Records of a daemon that is killed at any instant: what they say is there is there, whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import REPOSITORY


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize(("kills", "seed"), [(200, 2)])
def test_after_kill_nine_at_any_instant_every_record_holds_and_no_two_overlap(
    tmp_path, kills, seed
):
    command = [sys.executable, "-m", "tests.support.churn", str(tmp_path / "arena")]
    ended = subprocess.run(
        [*command, str(kills), str(seed)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.stderr == ""
    outcome, held, written = ended.stdout.split()
    assert outcome == "whole"
    # Daemons were killed with shards published, and while some were written.
    assert int(held) > kills
    assert int(written) > kills // 10
    assert Path(tmp_path / "arena").exists()
