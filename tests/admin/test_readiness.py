"""Readiness follows what engines meet, and an API that cannot be served hinders none of them."""

from __future__ import annotations

import socket

from tests.support.admin import AdminClient, port_of
from tests.support.waiting import wait_until


def test_a_taken_address_is_waited_for_a_full_daemon_is_not_ready_and_the_end_is_prompt(
    start_daemon,
):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = {"admin.listen": f"127.0.0.1:{port}", "server.sessions_max": 1}
        limits = {"ADMIN_RETRY_SECONDS": 0.1, "READINESS_SECONDS": 0.0}
        daemon = start_daemon(settings, limits=limits)
        wait_until(lambda: "waits for its address" in daemon.log(), what="it says so")
        assert daemon.stats().state == "ready"
    assert port_of(daemon) == port
    admin = AdminClient(port)
    wait_until(lambda: admin.get("/readyz").status == 200, what="it is ready")
    with daemon.connect("the only session") as client:
        answer = wait_until(
            lambda: (got := admin.get("/readyz")).status == 503 and got, what="it is full"
        )
        checks = {check["name"]: check for check in answer.json["checks"]}
        assert not checks["data path"]["ok"]
        assert "sessions" in checks["data path"]["detail"]
        assert admin.get("/livez").status == 200
        assert client.ping(b"served") == b"served"
    wait_until(lambda: admin.get("/readyz").status == 200, what="it is ready again")
    with admin.connect() as waiting:
        waiting.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200 ")
        # Whoever stays connected does not keep the daemon from ending.
        assert daemon.stop() == 0
        assert waiting.recv(1000) == b""
