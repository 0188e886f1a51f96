"""From settings to the endpoint where other daemons call, and the ways to those that we call."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.daemon.peer_endpoint import PeerEndpoint
from kvstore.daemon.peer_link import PeerAddress, PeerLink
from kvstore.daemon.pulls import Pulls
from kvstore.errors import ConfigError
from kvstore.limits import PEER_TOKEN_MAX_BYTES, PEER_TOKEN_MIN_BYTES, PEERS_MAX
from kvstore.listening import is_loopback, server_tls
from kvstore.settings import PORT_MAX

if TYPE_CHECKING:
    from kvstore.config import Config, PeerConfig, RemoteConfig
    from kvstore.daemon.server import Server
    from kvstore.transfer.nixl import Nixl


def set_up_peers(config: Config, server: Server) -> None:
    """Let *server* know its peers, and take the address where they call; raises `ConfigError`."""
    server.pulls = Pulls(server, peer_links(config, server))
    server.nixl = open_nixl(config.peer, server)
    server.endpoint = open_endpoint(config.peer, server)
    server.host_name = own_name(config.peer) if server.endpoint is not None else ""


async def serve_peers(server: Server) -> None:
    """Let peers call until cancelled; then end all that has to do with them."""
    try:
        async with asyncio.TaskGroup() as group:
            if server.endpoint is not None:
                group.create_task(server.endpoint.run(), name="peer endpoint")
            if server.nixl is not None:
                group.create_task(server.nixl.run(), name="NIXL")
            await asyncio.Event().wait()
    finally:
        await server.pulls.close()


def open_nixl(config: PeerConfig, server: Server) -> Nixl | None:
    """Return what bytes of hand-offs go by, ready for all links, or None when that is TCP.

    Raises `ConfigError` unless somebody has said that something else guards them.
    """
    if config.transport == "tcp":
        return None
    if not config.insecure:
        raise ConfigError(
            "peer.transport = nixl carries bytes that are not encrypted, and opens this host's "
            "arena to whoever learns of its agent: peer.insecure = true says that something else "
            "guards the network"
        )
    # Nothing of it is imported where nobody wants it.
    from kvstore.daemon.peer_nixl import NixlReads  # noqa: PLC0415
    from kvstore.transfer.nixl import Nixl  # noqa: PLC0415

    arena, counters = server.store.host.arena, server.store.counters
    nixl = Nixl(arena, own_name(config))
    for name, link in server.pulls.links.items():
        link.nixl = NixlReads(nixl, name, arena, counters)
    return nixl


def own_name(config: PeerConfig) -> str:
    """Return what other daemons call this one."""
    return config.name or socket.gethostname().partition(".")[0]


def open_endpoint(config: PeerConfig, server: Server) -> PeerEndpoint | None:
    """Return the endpoint, bound to its address, or None when none is wanted.

    Raises `ConfigError` when others could listen in, or need no token, and nobody said so.
    """
    if config.listen is None:
        return None
    if not config.token_file:
        raise ConfigError("peer.listen needs peer.token_file: whoever calls must know it")
    tls = server_tls("peer", config.tls_cert_file, config.tls_key_file)
    if tls is None and not config.insecure and not is_loopback(config.listen.host):
        raise ConfigError(
            f"peer.listen {config.listen} can be reached from elsewhere: set peer.tls_cert_file "
            "with peer.tls_key_file, or peer.insecure = true if something else guards it"
        )
    token = _token(config.token_file)
    endpoint = PeerEndpoint(
        server, config.listen, name=own_name(config), token=token, tls=tls, shares=config.share
    )
    endpoint.bind()
    return endpoint


def peer_links(config: Config, server: Server) -> dict[str, PeerLink]:
    """Return the ways to all peers that are configured; raises `ConfigError`."""
    if len(config.peers) > PEERS_MAX:
        raise ConfigError(f"{len(config.peers)} peers are configured, at most {PEERS_MAX}")
    name, counters = own_name(config.peer), server.store.counters
    return {peer: PeerLink(peer_address(config, peer), name, counters) for peer in config.peers}


def peer_address(config: Config, name: str) -> PeerAddress:
    """Return where the peer *name* is called; raises `ConfigError`."""
    remote = config.peers[name]
    where = f"peers.{name}"
    kind, _, place = remote.url.partition("://")
    if not place:
        raise ConfigError(f"{where}.url is missing: tcp://HOST:PORT, or tls://HOST:PORT")
    host, _, port = place.rpartition(":")
    host = host.strip("[]")
    if not 0 < int(port) <= PORT_MAX:
        raise ConfigError(f"{where}.url {remote.url}: a port is from 1 to {PORT_MAX}")
    token_file = remote.token_file or config.peer.token_file
    if not token_file:
        raise ConfigError(f"{where} needs {where}.token_file, or peer.token_file")
    if kind == "tcp" and not config.peer.insecure and not is_loopback(host):
        raise ConfigError(
            f"{where}.url {remote.url} is not encrypted: use tls://, or peer.insecure = true if "
            "something else guards the network"
        )
    tls = _client_tls(where, remote) if kind == "tls" else None
    return PeerAddress(name, host, int(port), _token(token_file), tls)


def _token(path: str) -> bytes:
    """Return the first line of *path*; raises `ConfigError` naming the file, never its content."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(PEER_TOKEN_MAX_BYTES + 1)
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise ConfigError(f"token_file {path} cannot be read: {error.strerror}") from None
    if mode & stat.S_IROTH:
        raise ConfigError(f"token_file {path}: everybody can read it; take that away (0600)")
    token = content.split(b"\n")[0].strip()
    if not PEER_TOKEN_MIN_BYTES <= len(token) <= PEER_TOKEN_MAX_BYTES:
        raise ConfigError(
            f"the token in {path} has {len(token)} bytes; it must have {PEER_TOKEN_MIN_BYTES} to "
            f"{PEER_TOKEN_MAX_BYTES}"
        )
    return token


def _client_tls(where: str, remote: RemoteConfig) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=remote.ca_file or None)
    except OSError as error:
        raise ConfigError(f"{where}.ca_file {remote.ca_file} cannot be used: {error}") from None
