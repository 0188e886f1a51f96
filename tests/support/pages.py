"""The dashboard in a real browser: Chromium without a window, and a daemon that serves the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.support.daemon import NOTHING, Daemon

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SHOWN = {"admin.listen": "127.0.0.1:0", "tiers.host.capacity": "64MiB"}


def serve(directory: Path, settings: Mapping[str, object] = NOTHING) -> Daemon:
    """Return a daemon below *directory*, not yet started, with an admin API on any free port."""
    return Daemon(directory, SHOWN | dict(settings))


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the browser; as root it has no sandbox of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()
