"""A client that dies, however it dies, holds nothing any more and has published nothing."""

from __future__ import annotations

import contextlib
import subprocess
import sys

from kvstore.types import ReserveOutcome
from tests.support.daemon import REPOSITORY, Daemon
from tests.support.holder import MANIFEST, RESERVED, STORED
from tests.support.making import sources_of
from tests.support.waiting import wait_until

# A chunk of 32 KiB and its table take nine pages.
STORED_BYTES = len(STORED) * 9 * 4096


@contextlib.contextmanager
def holder(daemon: Daemon, *rest: str):
    """Run a client that holds a lease on three chunks and six reservations, three of them full."""
    command = [sys.executable, "-m", "tests.support.holder", str(daemon.socket), *rest]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"holding\n"
        yield process
        process.kill()


def test_kill_nine_frees_leases_and_half_filled_reservations_and_publishes_nothing(start_daemon):
    # With minutes of grace, only the death of the process can free what it had reserved.
    daemon = start_daemon({"leases.orphan_grace": "10min", "leases.ttl": "1h"})
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        with holder(daemon) as process:
            held = client.stats()
            assert (held.leases, held.reservations) == (1, 6)
            assert space.delete(STORED).busy == 3
            process.kill()
            wait_until(
                lambda: client.stats().tiers[0].used_bytes < held.tiers[0].used_bytes,
                what="its room is free",
            )
        after = client.stats()
        assert (after.leases, after.reservations, after.sessions) == (0, 0, 1)
        assert space.lookup(RESERVED).hits == space.lookup(RESERVED[1:]).hits == 0
        assert space.lookup(STORED).hits == after.tiers[0].chunks == 3
        assert after.tiers[0].used_bytes == STORED_BYTES
        assert space.delete(STORED).count == 3
        assert client.stats().tiers[0].used_bytes == 0
        assert space.store(RESERVED, sources_of(MANIFEST, RESERVED)).stored == 6


def test_room_of_a_closed_session_is_kept_while_its_process_may_still_write_there(start_daemon):
    daemon = start_daemon({"leases.orphan_grace": "10min"})
    with daemon.connect() as client, holder(daemon, "close") as process:
        space = client.attach(MANIFEST)
        wait_until(lambda: client.stats().reservations == 0, what="its session ends")
        kept = client.stats().tiers[0].used_bytes
        # Nobody waits for the chunks, but their room is not given away.
        with space.reserve(RESERVED) as vacancies:
            assert {v.outcome for v in vacancies} == {ReserveOutcome.RESERVED}
            assert client.stats().tiers[0].used_bytes == kept + kept * 6 // 9
        process.kill()
        wait_until(lambda: client.stats().tiers[0].used_bytes == kept // 3, what="it is buried")


def test_room_of_a_closed_session_is_freed_after_the_grace(start_daemon):
    daemon = start_daemon({"leases.orphan_grace": "0s"})
    with daemon.connect() as client, holder(daemon, "close"):
        wait_until(lambda: client.stats().tiers[0].used_bytes == STORED_BYTES, what="it is freed")
        assert client.stats().reservations == 0


def test_chunks_of_a_lease_that_expires_can_leave(start_daemon):
    daemon = start_daemon({"leases.ttl": "1s"})
    with daemon.connect() as client, holder(daemon):
        space = client.attach(MANIFEST)
        assert space.delete(STORED).busy == 3
        wait_until(lambda: client.stats().leases == 0, what="the lease expires")
        assert client.stats().counters["lease_expirations"] == 1
        assert space.delete(STORED).count == 3


CROWD = """
import pathlib, sys
from tests.support.holder import *
clients = [Client.connect(pathlib.Path(sys.argv[1])) for _ in range(20)]
spaces = [client.attach(MANIFEST) for client in clients]
rooms = [space.reserve(make_digests(4, number)) for number, space in enumerate(spaces)]
for room in rooms:
    room.__enter__()
print("holding", flush=True)
sys.stdin.read()
"""


def test_a_process_with_many_sessions_leaves_nothing_of_any(start_daemon):
    daemon = start_daemon({"leases.orphan_grace": "10min"})
    command = [sys.executable, "-c", CROWD, str(daemon.socket)]
    with (
        daemon.connect() as client,
        subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout.readline() == b"holding\n"
        assert client.stats().reservations == 80
        process.kill()
        wait_until(lambda: client.stats().tiers[0].used_bytes == 0, what="all room is free")
        assert client.stats().sessions == 1
