"""The admin API's side of the security checklist: one test a line.

What the data socket, the arena and the disk promise is tested where they are.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from kvstore.admin.auth import Pace, Scope, read_tokens
from kvstore.admin.exposure import Exposure
from kvstore.config import AdminConfig
from kvstore.errors import ConfigError
from kvstore.limits import ADMIN_ADDRESSES_MAX, ADMIN_BODY_MAX_BYTES
from kvstore.listening import is_loopback
from kvstore.settings import ListenAddress
from tests.support.admin import ADMIN, READ, WRITE, AdminClient, port_of, write_tokens
from tests.support.daemon import Daemon
from tests.support.waiting import wait_until

NOWHERE = {"namespace": "0" * 32, "digests": ["0" * 64]}
WRITES = [
    ("POST", "/v1/chunks/pin", NOWHERE),
    ("POST", "/v1/chunks/unpin", NOWHERE),
    ("POST", "/v1/chunks/evict", NOWHERE),
    ("POST", "/v1/chunks/verify", NOWHERE),
    ("POST", "/v1/prefetch", NOWHERE),
    ("PUT", "/v1/tenants/blue/quota", {"tier": "host"}),
    ("POST", "/v1/config/reload", None),
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The admin API of a daemon without tokens, which soon closes who says nothing."""
    limits = {"ADMIN_FIRST_REQUEST_SECONDS": 2.0}
    directory = tmp_path_factory.mktemp("bare")
    with Daemon(directory, {"admin.listen": "127.0.0.1:0"}, limits) as running:
        yield AdminClient(port_of(running))


# --- where it listens --------------------------------------------------------------------


def test_by_default_it_listens_on_loopback_alone():
    listen = AdminConfig().listen
    assert listen is not None
    assert is_loopback(listen.host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "kv.example.org"])
def test_elsewhere_than_on_loopback_it_needs_a_token_and_tls(host, tmp_path):
    tokens = str(write_tokens(tmp_path / "tokens"))
    bare = AdminConfig(listen=ListenAddress(host, 7411))
    with pytest.raises(ConfigError, match=r"admin\.token_file and admin\.tls_cert_file"):
        Exposure(bare)
    with pytest.raises(ConfigError, match=r"set admin\.tls_cert_file"):
        Exposure(AdminConfig(listen=bare.listen, token_file=tokens))
    said_so = Exposure(AdminConfig(listen=bare.listen, token_file=tokens, insecure=True))
    assert not said_so.reads_are_open


def test_the_daemon_does_not_start_where_others_could_listen_in(tmp_path):
    daemon = Daemon(tmp_path, {"admin.listen": "0.0.0.0:0"})
    status, log = daemon.run_to_end()
    assert status == 2
    assert "can be reached from elsewhere" in log


def test_with_tls_and_a_token_it_serves_elsewhere_and_tells_nobody_anything_without(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    settings = {
        "admin.listen": "0.0.0.0:0",
        "admin.token_file": write_tokens(tmp_path / "tokens"),
        "admin.tls_cert_file": certificate,
        "admin.tls_key_file": key,
    }
    limits = {"ADMIN_FIRST_REQUEST_SECONDS": 3.0, "ADMIN_HANDSHAKES_MAX": 2}
    with Daemon(tmp_path, settings, limits) as daemon:
        port = port_of(daemon)
        context = ssl.create_default_context(cafile=str(certificate))
        for path in ("/livez", "/metrics", "/v1/status", "/openapi.json", "/", "/readyz"):
            assert _https(context, port, path).startswith(b"HTTP/1.1 401 ")
            assert _https(context, port, path, READ).split()[1] in {b"200", b"404"}
        silent = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(3)]
        with contextlib.ExitStack() as all_of_them:
            for one in silent:
                all_of_them.enter_context(one)
            assert _is_closed(silent[2]), "one too many at once is closed at once"
            assert _is_closed(silent[0]), "who does not even begin with TLS is closed, too"
            assert _https(context, port, "/livez", READ).startswith(b"HTTP/1.1 200 ")


def _is_closed(connection: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def _https(context: ssl.SSLContext, port: int, path: str, token: str = "") -> bytes:
    with (
        socket.create_connection(("127.0.0.1", port), 20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        wanted = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        bearer = f"Authorization: Bearer {token}\r\n" if token else ""
        secured.sendall(f"{wanted}{bearer}\r\n".encode())
        return secured.recv(4096)


# --- tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "body"), WRITES)
def test_every_write_needs_a_token_even_on_loopback(admin, method, path, body):
    answer = admin.ask(method, path, json_body=body)
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert admin.ask(method, path, json_body=body, token=READ).status == 403


def test_each_scope_allows_what_it_says_and_no_more(admin):
    assert admin.post("/v1/chunks/evict", NOWHERE, token=WRITE).status == 404
    assert admin.post("/v1/config/reload", token=WRITE).status == 403
    assert admin.post("/v1/config/reload", token=ADMIN).status == 200
    assert admin.get("/v1/status", token=READ).status == 200


def test_without_configured_tokens_nothing_can_be_written(bare):
    assert bare.post("/v1/chunks/evict", NOWHERE, token=WRITE).status == 401
    assert bare.post("/v1/chunks/evict", NOWHERE).status == 403


def test_a_token_has_128_bits_at_least_and_a_file_that_others_cannot_read(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("admin " + "x" * 31)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="31 characters"):
        read_tokens(str(file))
    write_tokens(file).chmod(0o644)
    with pytest.raises(ConfigError, match="everybody can read it"):
        read_tokens(str(file))
    file.chmod(0o640)
    tokens = read_tokens(str(file))
    assert [tokens.judge(token).scope for token in (READ, WRITE, ADMIN)] == list(Scope)
    assert tokens.judge("") is None
    assert tokens.judge(READ[:-1]) is None


def test_tokens_that_were_read_again_count_once_they_are_taken(tmp_path):
    file = write_tokens(tmp_path / "tokens")
    exposure = Exposure(AdminConfig(token_file=str(file)))
    file.write_text(f"admin {'n' * 40}\n")
    tokens = exposure.reread()
    assert exposure.tokens.judge(ADMIN) is not None
    exposure.take(tokens)
    assert exposure.tokens.judge(ADMIN) is None


def test_tokens_are_compared_by_digests_in_constant_time():
    source = Path(read_tokens.__code__.co_filename).read_text(encoding="utf-8")
    assert "hmac.compare_digest(grant.digest, digest)" in source
    assert "return" not in source.split("for grant in self._grants:")[1].split("found = grant")[0]


def test_a_bad_token_file_names_its_line_and_never_what_it_holds(tmp_path):
    file = tmp_path / "tokens"
    secret = "hunter2" * 8
    file.write_text(f"root {secret}\n")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="tokens:1") as caught:
        read_tokens(str(file))
    assert secret not in str(caught.value)


def test_new_tokens_hold_after_a_reload_and_bad_ones_change_nothing(start_daemon, tmp_path):
    file = write_tokens(tmp_path / "tokens")
    settings = {"admin.listen": "127.0.0.1:0", "admin.token_file": file}
    admin = AdminClient(port_of(start_daemon(settings)))
    file.write_text("admin short\n")
    assert admin.post("/v1/config/reload", token=ADMIN).status == 409
    file.write_text(f"admin {'n' * 40}\n")
    assert admin.post("/v1/config/reload", token=ADMIN).status == 200
    assert admin.post("/v1/config/reload", token=ADMIN).status == 401
    assert admin.post("/v1/config/reload", token="n" * 40).status == 200


def test_guessing_tokens_gets_slow_and_so_does_asking_too_often(start_daemon):
    admin = AdminClient(port_of(start_daemon({"admin.listen": "127.0.0.1:0"})))
    wait_until(
        lambda: admin.get("/v1/status", token="g" * 40).status == 429, what="guesses are refused"
    )
    # Whoever sends none is served all the same, up to a pace.
    assert admin.get("/v1/status").status == 200
    with admin.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 600)
        got = b""
        while b"HTTP/1.1 429 " not in got:
            got = got[-16:] + connection.recv(65_536)


# --- requests ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example.org", "127.0.0.1.evil.example.org", "", "[::2]:80"])
def test_a_host_header_of_another_name_is_refused(admin, host):
    answer = admin.get("/v1/status", headers={"Host": host})
    assert answer.status == 421
    assert answer.headers["content-type"].startswith("application/problem+json")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "[::1]:80", "127.0.0.1"])
def test_names_of_this_host_are_accepted(admin, host):
    assert admin.get("/livez", headers={"Host": host}).status == 200


def test_no_page_elsewhere_may_read_or_call(admin):
    origin = {"Origin": "https://evil.example.org", "Access-Control-Request-Method": "POST"}
    answer = admin.ask("OPTIONS", "/v1/chunks/evict", headers=origin)
    assert answer.status == 405
    for shown in (answer, admin.get("/v1/status", headers=origin)):
        assert not [name for name in shown.headers if name.startswith("access-control")]


def test_a_body_is_json_and_says_so(admin):
    body = json.dumps(NOWHERE).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"Content-Type": kind}
        asked = admin.ask("POST", "/v1/chunks/evict", body=body, headers=headers, token=WRITE)
        assert asked.status == 415


def test_a_body_has_an_end_whether_it_is_announced_or_not(admin):
    large = b"[" * (ADMIN_BODY_MAX_BYTES + 1)
    headers = {"Content-Type": "application/json"}
    announced = admin.ask("POST", "/v1/prefetch", body=large, headers=headers, token=WRITE)
    assert announced.status == 413
    with admin.connect() as connection:
        connection.sendall(
            b"POST /v1/prefetch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\nAuthorization: Bearer " + WRITE.encode() + b"\r\n\r\n"
        )
        piece = b"8000\r\n" + b"[" * 0x8000 + b"\r\n"
        connection.sendall(piece * 3)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_deep_and_broken_bodies_are_refused_politely(admin):
    headers = {"Content-Type": "application/json"}
    for body in (b"[" * 50_000, b"\xff\xfe", b'{"namespace":1}', b"{}", b""):
        asked = admin.ask("POST", "/v1/prefetch", body=body, headers=headers, token=WRITE)
        assert asked.status == 400
        assert asked.json["type"] == "urn:kvstore:bad-request"


def test_each_address_has_its_pace_and_few_are_remembered():
    now = [0.0]
    pace = Pace(10, 5, lambda: now[0])
    assert [pace.take("a") for _ in range(6)] == [True] * 5 + [False]
    assert pace.take("b")
    now[0] = 0.1
    assert pace.take("a")
    assert not pace.take("a")
    for number in range(2 * ADMIN_ADDRESSES_MAX):
        pace.take(str(number))
    assert len(pace._left) == ADMIN_ADDRESSES_MAX


def test_who_connects_and_says_nothing_is_closed_and_others_are_served(bare):
    with bare.connect() as silent:
        silent.sendall(b"GET /livez HTTP/1.1\r\nHost: loc")
        assert bare.get("/livez").status == 200
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(100) == b""


def test_writes_are_logged_with_who_and_what_and_without_the_token(admin, served):
    admin.post("/v1/chunks/unpin", NOWHERE, token=ADMIN)
    log = wait_until(lambda: (text := served.log()) and '"call": "unpin"' in text and text)
    (line,) = [json.loads(line) for line in log.splitlines() if '"call": "unpin"' in line][-1:]
    assert (line["logger"], line["status"], line["token_line"]) == ("kvstore.audit", 404, 4)
    assert ADMIN not in log


# --- answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/", "/v1/status", "/nothing/here"])
def test_every_answer_has_the_headers_that_browsers_heed(admin, path):
    headers = admin.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert "server" not in headers


def test_there_is_nothing_that_runs_code_or_shows_the_environment(admin):
    paths = set(admin.get("/openapi.json").json["paths"])
    assert not [
        path for path in paths if any(w in path for w in ("env", "script", "exec", "debug"))
    ]
    assert admin.get("/..%2f..%2fetc/passwd").status == 404


def test_no_setting_that_is_shown_is_a_secret(admin, served):
    text = admin.get("/v1/config").body.decode()
    assert not [token for token in (READ, WRITE, ADMIN) if token in text]
    assert str(served.socket) in text
