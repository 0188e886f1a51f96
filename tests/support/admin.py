"""A client of the admin API: bare HTTP, right or wrong."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import NamedTuple

from tests.support.daemon import Daemon
from tests.support.waiting import DEADLINE_SECONDS, wait_until

READ, WRITE, ADMIN = ("r" * 40, "w" * 40, "a" * 40)


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


def write_tokens(path: Path) -> Path:
    """Write one token of each scope into a file at *path*."""
    path.write_text(f"# tokens of tests\nread {READ}\nwrite {WRITE}\nadmin {ADMIN}\n")
    path.chmod(0o600)
    return path


def port_of(daemon: Daemon) -> int:
    """Wait until the admin API of *daemon* is served, and return its port."""

    def find() -> int | None:
        for line in daemon.log().splitlines():
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("message") == "admin API is served":
                return int(event["address"].rpartition(":")[2])
        return None

    found = wait_until(find, what=f"the admin API is served; the log:\n{daemon.log()}")
    assert found is not None
    return found


class AdminClient:
    """Asks the admin API at *port* of this host."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self,
        method: str,
        path: str,
        *,
        token: str | None = None,
        json_body: object = None,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Send one request over a connection of its own."""
        chosen = dict(headers or {})
        if json_body is not None:
            body = json.dumps(json_body).encode()
            chosen.setdefault("Content-Type", "application/json")
        if token is not None:
            chosen["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_SECONDS)
        try:
            connection.request(method, path, body, chosen)
            response = connection.getresponse()
            got = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, got, response.read())
        finally:
            connection.close()

    def get(self, path: str, **options) -> Answer:
        return self.ask("GET", path, **options)

    def post(self, path: str, json_body: object = None, **options) -> Answer:
        return self.ask("POST", path, json_body=json_body, **options)

    def connect(self) -> socket.socket:
        """Return a bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), DEADLINE_SECONDS)
