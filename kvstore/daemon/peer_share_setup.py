"""From settings to the tier of what peers hold, and to what they are told of this host."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from kvstore.daemon.peer_setup import own_name
from kvstore.daemon.peer_sharing import Sharing
from kvstore.errors import ConfigError
from kvstore.tiers.peer import PeerTier
from kvstore.types import TierKind

if TYPE_CHECKING:
    from kvstore.config import Config
    from kvstore.daemon.server import Server
    from kvstore.protocol.manifest import Manifest
    from kvstore.tiers.peer_directory import Directory
    from kvstore.types import NamespaceId

log = logging.getLogger(__name__)


def open_peer_tier(config: Config) -> PeerTier | None:
    """Return the tier of what peers hold, or None when none is wanted; raises `ConfigError`.

    It asks nobody until `set_up_sharing`.
    """
    if not config.peer.share:
        return None
    check_sharing(config)
    return PeerTier(_open_directory(config), time.monotonic) if config.peers else None


def set_up_sharing(config: Config, server: Server) -> None:
    """Let the peer tier ask the peers of *server*, and have them told what is held here."""
    route = server.mover.routes.get(TierKind.PEER)
    tier = None if route is None else route.tier.tier
    if isinstance(tier, PeerTier):

        def manifest_of(namespace: NamespaceId) -> Manifest | None:
            space = server.store.known(namespace)
            return None if space is None else space.manifest

        tier.connect(server.pulls.links, manifest_of)
    if config.peer.share and server.endpoint is not None:
        shared = tier.directory if isinstance(tier, PeerTier) else None
        server.sharing = Sharing(
            server.store,
            shared or _open_directory(config),
            own_name(config.peer),
            time.monotonic,
            owns_directory=shared is None,
        )


async def share(server: Server) -> None:
    """Tell peers what is held here until cancelled; then, that nothing is."""
    if server.sharing is None:
        return
    try:
        await server.sharing.run()
    except Exception:
        # Engines are served on; what others know of this host ends with its time.
        log.exception("sharing has ended")
    finally:
        await server.sharing.close()


def check_sharing(config: Config) -> None:
    """Raise `ConfigError` that says what `peer.share` lacks."""
    name = own_name(config.peer)
    if not config.tiers.redis.url:
        raise ConfigError(
            "peer.share needs tiers.redis.url: the directory of who has what is there"
        )
    if config.peer.listen is None and not config.peers:
        raise ConfigError(
            "peer.share needs peer.listen, to be asked, or a table peers.NAME, to ask"
        )
    if config.tiers.host.checksum == "off":
        raise ConfigError("peer.share needs tiers.host.checksum: peers compare what they are sent")
    if name in config.peers:
        raise ConfigError(
            f"peer.share: peers.{name} has the name of this daemon itself: remove it, or give this "
            "one another peer.name"
        )


def _open_directory(config: Config) -> Directory:
    # What it stands on takes longer to import than all else: not for those without it.
    from kvstore.tiers.peer_directory import Directory  # noqa: PLC0415
    from kvstore.tiers.redis_settings import redis_settings  # noqa: PLC0415

    return Directory(redis_settings(config.tiers.redis))
