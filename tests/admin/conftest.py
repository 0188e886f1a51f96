"""One daemon with an admin API and a token of each scope, for all tests of a module."""

from __future__ import annotations

import pytest

from tests.support.admin import AdminClient, port_of, write_tokens
from tests.support.daemon import Daemon


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A running daemon whose admin API listens on loopback."""
    directory = tmp_path_factory.mktemp("admin")
    tokens = write_tokens(directory / "tokens")
    settings = {
        "admin.listen": "127.0.0.1:0",
        "admin.token_file": tokens,
        "tenants.blue.uids": "[12345]",
    }
    with Daemon(directory, settings) as running:
        yield running


@pytest.fixture(scope="module")
def admin(served):
    return AdminClient(port_of(served))
