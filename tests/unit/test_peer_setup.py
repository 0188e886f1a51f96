"""From settings to peers: what would be unsafe is refused before anything is served."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvstore.config import load
from kvstore.daemon.peer_setup import open_endpoint, open_nixl, own_name, peer_links
from kvstore.errors import ConfigError
from kvstore.limits import PEERS_MAX
from kvstore.listening import is_loopback
from kvstore.metrics import Counters

SERVER = SimpleNamespace(store=SimpleNamespace(counters=Counters()))

REFUSED = {
    "no token": ({"peer.listen": "127.0.0.1:0"}, "needs peer.token_file"),
    "a short token": (
        {"peer.listen": "127.0.0.1:0", "peer.token_file": "SHORT"},
        "has 5 bytes; it must have 16 to 4096",
    ),
    "a token that is nowhere": (
        {"peer.listen": "127.0.0.1:0", "peer.token_file": "/nowhere/token"},
        "/nowhere/token cannot be read: No such file",
    ),
    "open to all": (
        {"peer.listen": "0.0.0.0:0", "peer.token_file": "TOKEN"},
        "can be reached from elsewhere: set peer.tls_cert_file",
    ),
    "NIXL, and nobody guards it": (
        {"peer.transport": "nixl"},
        "peer.insecure = true says that something else",
    ),
    "half of TLS": (
        {"peer.listen": "127.0.0.1:0", "peer.token_file": "TOKEN", "peer.tls_key_file": "/x"},
        "are set together or not",
    ),
    "a certificate that is none": (
        {
            "peer.listen": "127.0.0.1:0",
            "peer.token_file": "TOKEN",
            "peer.tls_cert_file": "TOKEN",
            "peer.tls_key_file": "TOKEN",
        },
        "and its key cannot be used",
    ),
    "a peer in clear": (
        {"peers.far.url": "tcp://192.0.2.1:9", "peers.far.token_file": "TOKEN"},
        "is not encrypted: use tls://, or peer.insecure",
    ),
    "a peer without a token": (
        {"peers.far.url": "tls://192.0.2.1:9"},
        "needs peers.far.token_file",
    ),
    "a port that is none": (
        {"peers.far.url": "tls://192.0.2.1:65536", "peers.far.token_file": "TOKEN"},
        "peers.far.url tls://192.0.2.1:65536: a port is from 1 to 65535",
    ),
    "a token that everybody can read": (
        {"peers.far.url": "tls://192.0.2.1:9", "peers.far.token_file": "OPEN"},
        "everybody can read it",
    ),
    "a peer that is nowhere": ({"peers.far.token_file": "TOKEN"}, "peers.far.url is missing"),
    "an authority that is none": (
        {
            "peers.far.url": "tls://192.0.2.1:9",
            "peers.far.token_file": "TOKEN",
            "peers.far.ca_file": "TOKEN",
        },
        "peers.far.ca_file",
    ),
}


@pytest.fixture
def configured(tmp_path):
    files = {name: tmp_path / name for name in ("TOKEN", "SHORT", "OPEN")}
    for name, file in files.items():
        file.write_text("short\n" if name == "SHORT" else "sixteen bytes or more\n")
        file.chmod(0o644 if name == "OPEN" else 0o640)

    def configure(settings):
        words = [f"{path}={files.get(value, value)}" for path, value in settings.items()]
        return load(None, {}, words)

    return configure


def set_up(config):
    peer_links(config, SERVER)
    open_endpoint(config.peer, SERVER)
    open_nixl(config.peer, SERVER)


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_would_be_unsafe_are_refused(configured, what):
    settings, reason = REFUSED[what]
    config = configured(settings)
    with pytest.raises(ConfigError, match=reason):
        set_up(config)


def test_whoever_says_that_the_network_is_guarded_may_go_without_tls(configured):
    config = configured(
        {
            "peer.insecure": "true",
            "peer.token_file": "TOKEN",
            "peers.far.url": "tcp://192.0.2.1:9",
            "peers.near.url": "tcp://[::1]:9",
        }
    )
    links = peer_links(config, SERVER)
    assert set(links) == {"far", "near"}
    assert open_endpoint(config.peer, SERVER) is None
    for link in links.values():
        link.close()


def test_there_are_no_more_peers_than_the_limit(configured):
    peers = {f"peers.p{number}.url": "tls://h:1" for number in range(PEERS_MAX + 1)}
    with pytest.raises(ConfigError, match=f"at most {PEERS_MAX}"):
        peer_links(configured(peers), SERVER)


def test_a_daemon_without_a_name_is_called_as_its_host(configured):
    assert own_name(configured({"peer.name": "rack-7"}).peer) == "rack-7"
    assert own_name(configured({}).peer) not in {"", "localhost.localdomain"}


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_is_known(host):
    assert is_loopback(host)
    assert not is_loopback("kvstore.example")
    assert not is_loopback("0.0.0.0")


@pytest.mark.parametrize("url", ["http://h:1", "tcp://h", "tcp://h:x", "tls://u@h:1", "//h:1"])
def test_what_is_no_peer_url_is_refused_with_what_is_right(configured, url):
    with pytest.raises(ConfigError, match=r"must be tcp://HOST:PORT, or tls://HOST:PORT"):
        configured({"peers.far.url": url})
