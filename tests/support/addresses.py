"""Where a daemon of a test serves its admin API, when it was told to take any free port."""

from __future__ import annotations

import json

from tests.support.daemon import Daemon
from tests.support.waiting import wait_until


def admin_url(daemon: Daemon) -> str:
    """Return the address that the log of *daemon* names last, once it does."""

    def said() -> str:
        lines = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
        found = [line["address"] for line in lines if line["message"] == "admin API is served"]
        return str(found[-1]) if found else ""

    address = wait_until(said, what=f"the admin API is served:\n{daemon.log()}")
    return address if "://" in address else f"http://{address}"
