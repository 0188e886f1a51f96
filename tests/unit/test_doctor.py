"""The doctor: for every check, what is fine, what is not, and that a fix is told for it."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import msgspec
import pytest

from kvstore import __version__, doctor
from kvstore.config import Config, load
from kvstore.doctor import Finding
from kvstore.errors import ProtocolError, RefusedError, UnavailableError
from kvstore.limits import GIB, MIB


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return the root of a machine with nothing in /proc, /sys and /dev."""
    for name in ("proc", "sys", "dev"):
        (tmp_path / name).mkdir()
    return tmp_path


def put(root: Path, name: str, text: str = "") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def assert_ok(finding: Finding) -> None:
    assert finding.verdict == "ok", finding
    assert finding.found
    assert not finding.fix


def assert_told(finding: Finding, verdict: str, *words: str) -> None:
    assert finding.verdict == verdict, finding
    assert finding.fix
    for word in words:
        assert word in finding.found + " | " + finding.fix


def test_all_checks_run_on_this_machine(tmp_path: Path) -> None:
    findings = doctor.examine(Config(), tmp_path / "none.sock")
    names = [finding.check for finding in findings]
    assert len(set(names)) == len(names)
    assert {"python", "packages", "copies", "memory", "arena", "daemon"} <= set(names)
    assert all(finding.fix for finding in findings if finding.verdict != "ok")


def test_huge_pages_that_are_off_are_not_looked_for(tmp_path: Path) -> None:
    host = msgspec.structs.replace(
        Config().tiers.host, huge_pages="off", arena=str(tmp_path / "arena")
    )
    config = msgspec.structs.replace(
        Config(), tiers=msgspec.structs.replace(Config().tiers, host=host)
    )
    findings = {f.check: f for f in doctor.examine(config, tmp_path / "none.sock")}
    assert "huge pages" not in findings
    assert str(tmp_path / "arena") in findings["arena"].found


# --- the installation --------------------------------------------------------------------


def test_python_is_told_with_the_version_of_kvstore() -> None:
    finding = doctor.check_python()
    assert_ok(finding)
    assert __version__ in finding.found


def test_a_package_that_is_missing_fails() -> None:
    finding = doctor.check_packages(("numpy", "no-such-package-of-kvstore"))
    assert_told(finding, "fail", "no-such-package-of-kvstore", "install")
    assert "numpy" not in finding.found


def test_installed_packages_are_told_with_their_versions() -> None:
    finding = doctor.check_packages()
    assert_ok(finding)
    assert f"numpy {__import__('numpy').__version__}" in finding.found


def test_copies_without_the_library_are_a_warning() -> None:
    assert_told(doctor.check_copies("numpy"), "warn", "compiler")
    assert_ok(doctor.check_copies("avx2"))


def test_nixl_is_told_with_its_version_or_with_what_is_used_instead() -> None:
    assert_told(doctor.check_nixl(("no-such-build-of-nixl",)), "warn", "tcp", "kvstore[nixl]")
    assert_ok(doctor.check_nixl(("no-such-build-of-nixl", "numpy")))


# --- memory ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity_bytes", "verdict"), [(4 * GIB, "ok"), (7 * GIB, "warn"), (9 * GIB, "fail")]
)
def test_the_arena_must_fit_the_memory(capacity_bytes: int, verdict: str) -> None:
    finding = doctor.check_memory(capacity_bytes, 8 * GIB)
    assert finding.verdict == verdict
    assert "8.00 GiB" in finding.found
    assert ("tiers.host.capacity" in finding.fix) == (verdict != "ok")


def test_a_memfd_can_be_made() -> None:
    assert_ok(doctor.check_memfd())


def test_a_memfd_that_is_forbidden_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert_told(doctor.check_memfd(), "fail", "not permitted", "/dev/shm")


@pytest.mark.parametrize(
    ("kind", "verdict"), [("tmpfs", "ok"), ("hugetlbfs", "ok"), ("ext4", "warn")]
)
def test_an_arena_file_belongs_on_memory(root: Path, kind: str, verdict: str) -> None:
    put(root, "proc/mounts", f"/dev/sda / ext4 rw 0 0\nnone {root} {kind} rw 0 0\n")
    finding = doctor.check_arena_file(root / "arena", MIB, root)
    assert finding.verdict == verdict
    assert kind in finding.found


def test_an_arena_file_must_fit_its_file_system(root: Path) -> None:
    put(root, "proc/mounts", f"none {root} tmpfs rw 0 0\n")
    finding = doctor.check_arena_file(root / "arena", 2**60, root)
    assert_told(finding, "fail", str(root), "tiers.host.capacity")


def test_an_arena_file_needs_the_directory_above_its_own(root: Path) -> None:
    put(root, "proc/mounts", "none / tmpfs rw 0 0\n")
    assert doctor.check_arena_file(root / "own" / "arena", MIB, root).verdict == "ok"
    finding = doctor.check_arena_file(root / "none" / "own" / "arena", MIB, root)
    assert_told(finding, "fail", "is missing", "make the directory")


def test_an_arena_that_is_there_counts_as_room_for_itself(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, "proc/mounts", "none / tmpfs rw 0 0\n")
    monkeypatch.setattr(doctor, "room_bytes", lambda _: 4096)
    assert doctor.check_arena_file(root / "arena", MIB, root).verdict == "fail"
    (root / "arena").write_bytes(bytes(MIB))
    (root / "arena").chmod(0o600)
    assert doctor.check_arena_file(root / "arena", MIB, root).verdict == "ok"


def test_an_arena_file_that_is_not_ours_is_found_before_the_daemon_does(root: Path) -> None:
    put(root, "proc/mounts", "none / tmpfs rw 0 0\n")
    (root / "arena").write_bytes(b"precious")
    (root / "arena").chmod(0o644)
    finding = doctor.check_arena_file(root / "arena", MIB, root)
    assert_told(finding, "fail", "has mode 0644", "choose another")


def test_an_arena_file_needs_a_directory_that_is_writable(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, "proc/mounts", "none / tmpfs rw 0 0\n")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert_told(doctor.check_arena_file(root / "arena", MIB, root), "fail", "not writable")


def test_the_file_system_is_the_deepest_mount_above() -> None:
    mounts = (
        "a / ext4 rw 0 0\nb /dev devtmpfs rw 0 0\nc /dev/shm tmpfs rw 0 0\nd /dev/sh x rw 0 0\n"
    )
    assert doctor.file_system_of(Path("/dev/shm/kv"), mounts) == ("/dev/shm", "tmpfs")
    assert doctor.file_system_of(Path("/dev/shmoo"), mounts) == ("/dev", "devtmpfs")
    assert doctor.file_system_of(Path("/x"), "") == ("/", "unknown")


@pytest.mark.parametrize(
    ("limit_bytes", "gpus", "verdict"),
    [
        (resource.RLIM_INFINITY, ["nvidia0"], "ok"),
        (2 * GIB, ["nvidia0"], "ok"),
        (MIB, [], "ok"),
        (MIB, ["nvidia0"], "warn"),
    ],
)
def test_locked_memory_matters_beside_a_gpu(
    limit_bytes: int, gpus: list[str], verdict: str
) -> None:
    finding = doctor.check_locked_memory(GIB, limit_bytes, gpus=gpus)
    assert finding.verdict == verdict
    assert ("memlock" in finding.fix) == (verdict == "warn")


FREE_HUGE_PAGES = "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
SHMEM = "sys/kernel/mm/transparent_hugepage/shmem_enabled"


@pytest.mark.parametrize(
    ("free", "shmem", "verdict"),
    [
        ("512\n", "", "ok"),
        ("511\n", "", "warn"),
        ("0\n", "always within_size [advise] never deny force\n", "ok"),
        ("0\n", "always within_size advise [never] deny force\n", "warn"),
        ("", "", "warn"),
        ("nonsense", "nonsense", "warn"),
    ],
)
def test_huge_pages_are_reserved_or_transparent(
    root: Path, free: str, shmem: str, verdict: str
) -> None:
    put(root, FREE_HUGE_PAGES, free)
    put(root, SHMEM, shmem)
    finding = doctor.check_huge_pages(GIB, root)
    assert finding.verdict == verdict
    assert ("shmem_enabled" in finding.fix) == (verdict == "warn")


def test_huge_pages_that_the_kernel_does_not_have_are_a_warning(root: Path) -> None:
    assert_told(doctor.check_huge_pages(GIB, root), "warn", "not available")


# --- devices -----------------------------------------------------------------------------


def test_no_gpu_is_fine(root: Path) -> None:
    assert_ok(doctor.check_gpu(root))


def test_a_gpu_is_told_with_its_driver(root: Path) -> None:
    put(root, "proc/driver/nvidia/version", "NVRM version: 600.1\nGCC version: x\n")
    for name in ("nvidia1", "nvidia0", "nvidiactl"):
        put(root, f"dev/{name}")
    finding = doctor.check_gpu(root)
    assert_ok(finding)
    assert finding.found == "nvidia0, nvidia1; NVRM version: 600.1"


def test_a_driver_without_devices_is_a_warning(root: Path) -> None:
    put(root, "proc/driver/nvidia/version", "NVRM version: 600.1\n")
    assert_told(doctor.check_gpu(root), "warn", "container")


# --- the socket --------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o750)
    return directory


def test_a_closed_directory_is_fine(directory: Path) -> None:
    finding = doctor.check_socket_directory(directory)
    assert_ok(finding)
    assert "0750" in finding.found


def test_a_directory_to_be_made_is_fine(directory: Path) -> None:
    assert_ok(doctor.check_socket_directory(directory / "a" / "b"))


def test_a_directory_that_all_may_write_is_a_warning(directory: Path) -> None:
    directory.chmod(0o777)
    assert_told(doctor.check_socket_directory(directory), "warn", "0777", "chmod 0750")


def test_a_directory_that_we_may_not_write_fails(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert_told(doctor.check_socket_directory(directory), "fail", "not writable", "server.socket")


def test_no_daemon_is_a_warning(directory: Path) -> None:
    assert_told(doctor.check_daemon(directory / "none"), "warn", "none", "kvstore serve")


def test_a_file_in_the_place_of_the_socket_fails(directory: Path) -> None:
    put(directory, "kvstore.sock")
    assert_told(doctor.check_daemon(directory / "kvstore.sock"), "fail", "is not a socket")


@pytest.fixture
def stale(directory: Path) -> Iterator[Path]:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(directory / "s"))
        yield directory / "s"


def test_a_stale_socket_is_a_warning(stale: Path) -> None:
    assert_told(doctor.check_daemon(stale), "warn", str(stale), "replaced")


@pytest.mark.parametrize(
    ("error", "verdict", "word"),
    [
        (RefusedError("uid 7 may not"), "fail", "allowed_uids"),
        (UnavailableError("no answer"), "warn", "no answer"),
        (ProtocolError("strange"), "warn", "strange"),
    ],
)
def test_a_daemon_that_does_not_serve_us_is_told_with_its_reason(
    stale: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, verdict: str, word: str
) -> None:
    def connect(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setattr(doctor.Client, "connect", connect)
    assert_told(doctor.check_daemon(stale), verdict, word)


@pytest.mark.parametrize(
    ("version", "transport", "verdict"),
    [
        (__version__, "tcp", "ok"),
        ("0.0.1", "tcp", "warn"),
        (__version__, "nixl (UCX over rc_mlx5/mlx5_0:1)", "ok"),
        (__version__, "tcp (NIXL is starting)", "warn"),
    ],
)
def test_a_daemon_that_answers_is_told_with_its_version_and_transport(
    stale: Path, monkeypatch: pytest.MonkeyPatch, version: str, transport: str, verdict: str
) -> None:
    class Daemon:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def stats(self) -> Self:
            return self

        state = "ready"
        pid = 7

    Daemon.version, Daemon.peer_transport = version, transport
    monkeypatch.setattr(doctor.Client, "connect", lambda *_, **__: Daemon())
    finding = doctor.check_daemon(stale)
    assert finding.verdict == verdict
    assert f"kvstore {version}, ready, pid 7" in finding.found
    assert transport == "tcp" or transport in finding.found


# --- slower tiers -----------------------------------------------------------------------------


def test_tiers_that_are_off_are_not_looked_at() -> None:
    assert doctor.check_slower_tiers(Config()) == []


def test_a_disk_that_cannot_hold_its_capacity_fails_with_a_fix(tmp_path: Path) -> None:
    settings = (f"tiers.disk.path={tmp_path / 'disk'}", "tiers.disk.capacity=16TiB")
    findings = doctor.check_slower_tiers(load(None, {}, settings))
    assert any(found.verdict == "fail" and found.fix for found in findings)


def test_a_redis_that_is_not_there_fails_with_a_fix(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/nobody.sock"
    (found, *_) = doctor.check_slower_tiers(load(None, {}, (f"tiers.redis.url={url}",)))
    assert found.verdict == "fail"
    assert found.fix


def test_a_redis_password_file_that_is_not_there_fails(tmp_path: Path) -> None:
    settings = ("tiers.redis.url=redis://localhost", f"tiers.redis.password_file={tmp_path}/none")
    (found,) = doctor.check_slower_tiers(load(None, {}, settings))
    assert (found.check, found.verdict) == ("redis", "fail")
