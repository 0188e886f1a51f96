"""Checks of the daemons that one is to call, and of what sharing needs, each with the fix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from kvstore.daemon.peer_link import greet_once
from kvstore.daemon.peer_setup import own_name, peer_address
from kvstore.daemon.peer_share_setup import check_sharing
from kvstore.errors import ConfigError, KVStoreError
from kvstore.protocol import peering as p
from kvstore.transfer.wire import WireError

if TYPE_CHECKING:
    from kvstore.config import Config

# Each takes a few seconds at most.
_AT_ONCE: Final = 16


class PeerFinding(NamedTuple):
    """The outcome of one check; *fix* is empty when there is nothing to do."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def examine_peers(config: Config) -> list[PeerFinding]:
    """Return the outcome of every check; calls all peers that are configured."""
    findings = [_check_sharing(config)] if config.peer.share else []
    with ThreadPoolExecutor(_AT_ONCE, "peer-doctor") as threads:
        findings += threads.map(partial(_check_peer, config), config.peers)
    return findings


def _check_sharing(config: Config) -> PeerFinding:
    try:
        check_sharing(config)
    except ConfigError as error:
        return PeerFinding("sharing", "fail", str(error), "mend it, or set peer.share = false")
    name = own_name(config.peer)
    if config.peer.listen is None:
        return PeerFinding("sharing", "ok", "asks peers, and is not asked (no peer.listen)")
    if not config.peers:
        return PeerFinding("sharing", "ok", f"is asked as {name}, and asks nobody (no peers.NAME)")
    return PeerFinding("sharing", "ok", f"as {name}, with {len(config.peers)} peers")


def _check_peer(config: Config, name: str) -> PeerFinding:
    """Call the peer *name* as the daemon does."""
    check = f"peer {name}"
    try:
        address = peer_address(config, name)
    except ConfigError as error:
        return PeerFinding(check, "fail", str(error), f"mend peers.{name}")
    try:
        greeting = greet_once(address, own_name(config.peer))
    except (WireError, KVStoreError) as error:
        fix = "start it, give both the same token, or correct url and ca_file"
        return PeerFinding(check, "warn", str(error), fix)
    found = f"{config.peers[name].url}, peer protocol {greeting.version}"
    if config.peer.share and greeting.version < p.PEER_VERSION_HAVE:
        return PeerFinding(check, "warn", f"{found}: it shares nothing", "bring it up to date")
    if config.peer.share and greeting.name != name:
        fix = f"call its table peers.{greeting.name}, or set peer.name = {name} there"
        return PeerFinding(check, "warn", f"{found}; it calls itself {greeting.name}", fix)
    return PeerFinding(check, "ok", found)
