"""Certificates of an authority of the test's own, made with openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple


class Certificates(NamedTuple):
    """An authority, and a certificate that it has given to 127.0.0.1 and to *names*."""

    authority: Path
    certificate: Path
    key: Path

    @property
    def options(self) -> tuple[str, ...]:
        """What a server wants to know of them."""
        return (
            *("--tls-cert-file", str(self.certificate), "--tls-key-file", str(self.key)),
            *("--tls-ca-cert-file", str(self.authority), "--tls-auth-clients", "no"),
        )


def make_certificates(directory: Path, address: str = "IP:127.0.0.1") -> Certificates:
    """Make an authority and a certificate for *address* below *directory*."""
    directory.mkdir(parents=True, exist_ok=True)
    made = Certificates(*(directory / name for name in ("ca.pem", "cert.pem", "key.pem")))
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority_key = directory / "ca-key.pem"
    extensions = (
        *("-addext", "basicConstraints=critical,CA:TRUE"),
        *("-addext", "keyUsage=critical,keyCertSign"),
    )
    _openssl(*new, "-subj", "/CN=test authority", "-days", "2", *extensions,
             "-keyout", authority_key, "-out", made.authority)  # fmt: skip
    _openssl(*new, "-subj", "/CN=redis", "-days", "2",
             "-addext", f"subjectAltName={address}",
             "-addext", "basicConstraints=critical,CA:FALSE",
             "-CA", made.authority, "-CAkey", authority_key,
             "-keyout", made.key, "-out", made.certificate)  # fmt: skip
    return made


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
