"""The demo runs, reuses prefixes in both processes, and cleans up after itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_quick_demo_shows_reuse_with_the_same_answers(tmp_path):
    command = [sys.executable, ROOT / "deploy" / "demo" / "conversation.py", "--quick"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170
    )

    assert run.returncode == 0, run.stdout + run.stderr
    # process, turn, prompt, reused, ..., same tokens, same bits
    rows = [
        line.split() for line in run.stdout.splitlines() if re.match(r"(first|second)\s+\d", line)
    ]
    assert [row[0] for row in rows] == ["first"] * 3 + ["second"] * 3
    reused = [int(row[3].replace(",", "")) for row in rows]
    assert reused[0] == 0
    assert all(count > 900 for count in reused[1:])
    assert all(row[-2:] == ["yes", "yes"] for row in rows)
    assert not list(tmp_path.glob("kvstore-demo-*"))
