"""Where the admin API is open to whom: judged before anything is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.admin.auth import Tokens, read_tokens
from kvstore.errors import ConfigError
from kvstore.listening import is_loopback, server_tls

if TYPE_CHECKING:
    from kvstore.config import AdminConfig


class Exposure:
    """The tokens and the TLS of one admin API, found fit for where it listens.

    Raises `ConfigError` when others could listen in, or need no token, and nobody said so.
    """

    def __init__(self, config: AdminConfig) -> None:
        self._config = config
        self.is_local = config.listen is None or is_loopback(config.listen.host)
        self.tls = server_tls("admin", config.tls_cert_file, config.tls_key_file)
        self.tokens = self._read()

    @property
    def reads_are_open(self) -> bool:
        """Whether reading needs no token."""
        return self.is_local or (self._config.insecure and not len(self.tokens))

    def reread(self) -> Tokens:
        """Return the tokens as they are in their file now, and look at the certificate.

        Raises `ConfigError`. Nothing has changed before `take`.
        """
        server_tls("admin", self._config.tls_cert_file, self._config.tls_key_file)
        return self._read()

    def take(self, tokens: Tokens) -> None:
        """Let *tokens* count from now on, and show new connections the certificate of now."""
        self.tokens = tokens
        if self.tls is not None:
            self.tls.load_cert_chain(self._config.tls_cert_file, self._config.tls_key_file)

    def _read(self) -> Tokens:
        tokens = read_tokens(self._config.token_file)
        if not self.is_local and not self._config.insecure:
            self._check(tokens)
        return tokens

    def _check(self, tokens: Tokens) -> None:
        missing = []
        if not len(tokens):
            missing.append("admin.token_file")
        if self.tls is None:
            missing.append("admin.tls_cert_file with admin.tls_key_file")
        if missing:
            raise ConfigError(
                f"admin.listen {self._config.listen} can be reached from elsewhere: set "
                f"{' and '.join(missing)}, or admin.insecure = true if something else guards it"
            )
