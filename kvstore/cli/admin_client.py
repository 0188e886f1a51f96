"""The admin API as commands ask it: one request a connection, every failure typed."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from kvstore.errors import ConfigError, RefusedError, RequestError, UnavailableError

if TYPE_CHECKING:
    from kvstore.config import AdminConfig

_TIMEOUT_SECONDS: Final = 10.0
_ANYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # where it listens
_SCOPES: Final = ("read", "write", "admin")
_REFUSED: Final = {401, 403, 421}


class AdminClient:
    """Asks the admin API at *url*, with *token* if there is one."""

    def __init__(self, url: str, token: str = "", ca_file: Path | None = None) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ConfigError(f"{url}: {error}") from None
        if parts.scheme not in {"http", "https"} or not self._host:
            raise ConfigError(f"{url}: an admin URL is http://HOST:PORT or https://HOST:PORT")
        self._url = url.rstrip("/")
        self._token = token
        self._tls = _tls(ca_file) if parts.scheme == "https" else None

    @classmethod
    def of(
        cls, config: AdminConfig, url: str | None, token_file: Path | None, ca_file: Path | None
    ) -> AdminClient:
        """Return the client for *url*, or for where *config* says that the daemon listens."""
        if url is None:
            if config.listen is None:
                raise ConfigError("the admin API is off (admin.listen is empty)")
            host = _ANYWHERE.get(config.listen.host, config.listen.host)
            scheme = "https" if config.tls_cert_file else "http"
            url = f"{scheme}://{config.listen._replace(host=host)}"
            ca_file = ca_file or (Path(config.tls_cert_file) if config.tls_cert_file else None)
        configured = Path(config.token_file) if config.token_file else None
        return cls(url, _token_in(token_file or configured), ca_file)

    def ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Return the answer; raises `UnavailableError`, `RefusedError` or `RequestError`."""
        headers = {"Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection = self._connection()
        try:
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            status, raw = response.status, response.read()
            answer: dict[str, Any] = _decode(raw)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UnavailableError(f"{self._url}: {error}") from None
        finally:
            connection.close()
        if status in _REFUSED:
            raise RefusedError(str(answer.get("detail", status)))
        if status >= 400:
            raise RequestError(str(answer.get("detail", status)))
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_SECONDS)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=_TIMEOUT_SECONDS, context=self._tls
        )


def _decode(raw: bytes) -> dict[str, Any]:
    answer = json.loads(raw)
    if not isinstance(answer, dict):
        raise ValueError("what answers there is not the admin API")  # as of JSON
    return answer


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except OSError as error:
        raise ConfigError(f"{ca_file}: cannot be used: {error}") from None


def _token_in(file: Path | None) -> str:
    """Return the token in *file*: it alone, or that of the widest scope of a daemon's file."""
    if file is None:
        return ""
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no token can be read: {error}") from None
    found = [words for words in lines if words and not words[0].startswith("#")]
    if not found:
        raise ConfigError(f"{file}: holds no token")
    scoped = {words[0]: words[1] for words in found if len(words) == 2 and words[0] in _SCOPES}
    widest = [scoped[scope] for scope in reversed(_SCOPES) if scope in scoped]
    return widest[0] if widest else found[0][-1]
