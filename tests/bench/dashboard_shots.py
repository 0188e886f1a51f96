"""Pictures of the dashboard for the docs: a daemon that is empty, busy, and broken.

Run: python -m tests.bench.dashboard_shots [--seconds 240] [--out docs/images]
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser

from tests.support.addresses import admin_url
from tests.support.pages import chromium, serve
from tests.support.redis import RedisServer
from tests.support.traffic import Traffic

LAPTOP = {"width": 1280, "height": 800}
SMALLER = shutil.which("pngquant")
PHONE = {"width": 390, "height": 844}


def shoot(
    browser: Browser, url: str, path: Path, size: dict[str, int], theme: str, question: str = ""
) -> None:
    """Take one picture of the whole page, once it shows something and has answered *question*."""
    context = browser.new_context(viewport=size, color_scheme=theme, device_scale_factor=1)
    page = context.new_page()
    page.on("console", lambda message: print("console:", message.text))
    page.on("pageerror", lambda error: print("error:", error))
    page.goto(url)
    page.wait_for_selector("#tier-list li")
    if question:
        page.fill("#explain-keys", question)
        page.click("#explain button")
        page.wait_for_selector("#explanation li")
    page.wait_for_timeout(2500)
    page.screenshot(path=path, full_page=True)
    if SMALLER is not None:
        subprocess.run([SMALLER, "--force", "--ext", ".png", "128", path], check=True)
    print(path, path.stat().st_size)
    context.close()


def main() -> None:
    """Start everything, take the pictures, end everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="of traffic")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    wanted = parser.parse_args()
    wanted.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        place = Path(scratch)
        (place / "empty").mkdir()
        with serve(place / "empty") as daemon:
            shoot(browser, admin_url(daemon), wanted.out / "dashboard-empty.png", LAPTOP, "light")
        busy(browser, place, wanted.out, wanted.seconds)


def busy(browser: Browser, place: Path, out: Path, seconds: float) -> None:
    """A daemon with all tiers and two models under traffic; then its Redis hangs."""
    (place / "busy").mkdir()
    with RedisServer(place / "redis") as redis:
        settings = {
            "tiers.host.capacity": "48MiB",
            "tiers.disk.path": place / "disk",
            "tiers.disk.capacity": "128MiB",
            "tiers.redis.url": f"redis://127.0.0.1:{redis.port}",
            "tiers.redis.admission": "second_touch",
            "tenants.blue.quota": "24MiB",
            "tenants.green.floor": "8MiB",
        }
        with serve(place / "busy", settings) as daemon:
            crew = [
                Traffic(daemon.socket, model="llama-3-8b", tenant="blue", seed=1),
                Traffic(daemon.socket, model="qwen-3-4b", seed=2, pause_seconds=0.09),
            ]
            for one in crew:
                one.start()
            time.sleep(seconds)
            url = admin_url(daemon)
            digests = crew[0].digests_of(58, 2)
            question = " ".join(digest.hex() for digest in digests[:8])
            for theme in ("light", "dark"):
                shoot(browser, url, out / f"dashboard-busy-{theme}.png", LAPTOP, theme, question)
            shoot(browser, url, out / "dashboard-phone.png", PHONE, "light")
            os.kill(redis.pid, signal.SIGSTOP)
            time.sleep(8)
            shoot(browser, url, out / "dashboard-broken.png", LAPTOP, "light")
            os.kill(redis.pid, signal.SIGCONT)
            for one in crew:
                one.stop()


if __name__ == "__main__":
    main()
