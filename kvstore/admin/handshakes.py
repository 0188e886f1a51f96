"""TLS connections to the admin API, of which few at once may be about to begin.

Servers of asyncio bound how long a handshake takes, and not how many there are: each holds a
descriptor, of which engines need theirs.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Final, NoReturn

from kvstore.limits import ADMIN_FIRST_REQUEST_SECONDS, ADMIN_HANDSHAKES_MAX

log = logging.getLogger(__name__)

_PAUSE_SECONDS: Final = 0.1


async def accept_tls(
    listening: socket.socket, context: ssl.SSLContext, make: Callable[[], asyncio.Protocol]
) -> NoReturn:
    """Give every connection at *listening* a protocol once its TLS has begun, until cancelled.

    While too many are about to begin, one more is closed at once.
    """
    loop = asyncio.get_running_loop()
    under_way: set[socket.socket] = set()

    async def begin(connection: socket.socket) -> None:
        try:
            await loop.connect_accepted_socket(
                make,
                connection,
                ssl=context,
                ssl_handshake_timeout=ADMIN_FIRST_REQUEST_SECONDS,
            )
        except OSError as error:
            log.debug("TLS has not begun", extra={"reason": str(error)})
        finally:
            under_way.discard(connection)

    async with asyncio.TaskGroup() as group:
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:
                # Out of descriptors, say: engines are served on, and people come again.
                log.warning("admin connection not accepted", extra={"reason": error.strerror})
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            if len(under_way) >= ADMIN_HANDSHAKES_MAX:
                connection.close()
                continue
            under_way.add(connection)
            group.create_task(begin(connection), name="TLS handshake")
