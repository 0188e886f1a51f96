"""What is said of a directory before it becomes a disk tier, and that saying it changes nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.limits import MIB
from kvstore.tiers.disk_checks import DiskFinding, check_disk
from tests.support.disks import CAPACITY, disk_tier, put

MOUNTS = "/dev/sda / ext4 rw 0 0\nserver:/x /net nfs4 rw 0 0\n"


def verdicts(findings: list[DiskFinding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings}


@pytest.fixture(autouse=True)
def unchanged(tmp_path: Path) -> Iterator[None]:
    yield
    assert not (tmp_path / "new").exists()


def test_a_new_directory_is_fine(tmp_path: Path) -> None:
    findings = check_disk(tmp_path / "new" / "below", CAPACITY, mounts=MOUNTS)
    found = verdicts(findings)
    assert found.pop("disk direct I/O") in ("ok", "warn")
    assert set(found.values()) == {"ok"}
    assert "will be made" in findings[0].found


async def test_a_tier_in_use_is_looked_at_without_disturbing_it(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1)
        findings = check_disk(tmp_path, CAPACITY, mounts=MOUNTS)
        assert "format 1" in findings[0].found
        assert set(verdicts(findings).values()) <= {"ok", "warn"}


def test_a_foreign_directory_fails_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    (finding,) = check_disk(tmp_path, CAPACITY)
    assert finding.verdict == "fail"
    assert "thesis.tex" in finding.found
    assert finding.fix


def test_a_file_in_place_of_a_directory_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = check_disk(tmp_path / "file", CAPACITY)
    assert (finding.verdict, "Not a directory" in finding.found) == ("fail", True)


@pytest.mark.parametrize("capacity_bytes", [2**43, 1])
def test_a_capacity_that_cannot_be_had_fails(tmp_path: Path, capacity_bytes: int) -> None:
    assert verdicts(check_disk(tmp_path, capacity_bytes, mounts=MOUNTS))["disk room"] == "fail"


def test_memory_and_networks_are_warned_of(tmp_path: Path) -> None:
    for mounts in (f"tmpfs {tmp_path} tmpfs rw 0 0", f"server:/x {tmp_path} nfs4 rw 0 0"):
        found = check_disk(tmp_path, CAPACITY, mounts=f"/dev/sda / ext4 rw 0 0\n{mounts}\n")
        assert verdicts(found)["disk kind"] == "warn"


def test_a_file_system_that_refuses_direct_io_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("kvstore.tiers.disk_checks.os.preadv", refuse)
    found = check_disk(tmp_path, 4 * MIB, mounts=MOUNTS)
    assert verdicts(found)["disk direct I/O"] == "warn"
    assert "disk direct I/O" not in verdicts(check_disk(tmp_path, MIB, direct=False, mounts=MOUNTS))
