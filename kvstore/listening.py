"""What listeners have in common: who can reach an address, and the certificate they show."""

from __future__ import annotations

import ipaddress
import ssl

from kvstore.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Return whether nobody elsewhere can reach *host*, or listen in on the way there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def server_tls(table: str, cert_file: str, key_file: str) -> ssl.SSLContext | None:
    """Return how the listener of *table* in the configuration speaks TLS; None when it does not.

    TLS 1.2 at least. Raises `ConfigError` for half of a pair, and for files that cannot be used.
    """
    if bool(cert_file) != bool(key_file):
        raise ConfigError(f"{table}.tls_cert_file and {table}.tls_key_file are set together or not")
    if not cert_file:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert_file, key_file)
    except OSError as error:
        raise ConfigError(
            f"{table}.tls_cert_file {cert_file} and its key cannot be used: {error}"
        ) from None
    return context
