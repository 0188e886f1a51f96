"""The dashboard in a real browser: what it shows, with a daemon that works, ends and comes back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="make test installs playwright")

from playwright.sync_api import Browser, Page

from tests.support.addresses import admin_url
from tests.support.daemon import Daemon
from tests.support.making import make_digests, make_manifest, sources_of
from tests.support.pages import CHROMIUM, chromium, serve
from tests.support.redis import free_port
from tests.support.traffic import Traffic
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not installed"),
    pytest.mark.timeout(120),
]

PATIENCE_MS = 20_000
LAPTOP = {"width": 1280, "height": 800}
TROUBLE = {"error", "warning"}
PHONE = {"width": 390, "height": 844}
# Both themes of everything that the page shows, on every size, have the contrast of WCAG AA.
ACCESSIBLE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory) -> Iterator[Daemon]:
    place = tmp_path_factory.mktemp("shown")
    settings = {
        "tiers.disk.path": place / "disk",
        "tiers.disk.capacity": "64MiB",
        "tenants.blue.quota": "8MiB",
        # Not just any: it is to be the same after a restart.
        "admin.listen": f"127.0.0.1:{free_port()}",
    }
    with serve(place, settings) as running:
        yield running


class Watched:
    """A page, and whatever went wrong on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.wrong: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on(
            "console",
            lambda said: (
                self.wrong.append(said.text) if said.type in {"error", "warning"} else None
            ),
        )

    def open(self, daemon: Daemon) -> Page:
        self.page.goto(admin_url(daemon))
        self.page.wait_for_selector("#tier-list li")
        return self.page


@pytest.fixture
def watched(browser) -> Iterator[Watched]:
    context = browser.new_context(viewport=LAPTOP)
    made = Watched(context.new_page())
    yield made
    context.close()


def text(page: Page, selector: str) -> str:
    return page.locator(selector).inner_text()


def until(page: Page, selector: str, holds: Callable[[str], bool]) -> None:
    # Not by wait_for_function: the page's policy forbids it to evaluate what it is given.
    wait_until(lambda: holds(text(page, selector)), what=f"{selector} changes")


def test_it_loads_without_an_error_and_asks_nobody_else(tmp_path, watched):
    asked: list[str] = []
    watched.page.on("request", lambda request: asked.append(request.url))
    with serve(tmp_path) as empty:
        page = watched.open(empty)
        page.wait_for_selector("#hits-chart p")
        assert text(page, "#state") == "ready"
        assert page.locator("#tier-list li").count() == 1
        assert text(page, "#hits-chart") == "Nothing has been looked up yet."
    assert {url.split("/")[2] for url in asked if not url.startswith("data:")} == {
        page.url.split("/")[2]
    }
    assert watched.wrong == []


def test_it_shows_live_changes_while_an_engine_works_and_survives_a_restart(daemon, watched):
    page = watched.open(daemon)
    traffic = Traffic(daemon.socket, tenant="blue", pause_seconds=0.02)
    traffic.start()
    try:
        page.wait_for_selector("#hits-chart svg")
        page.wait_for_selector(".edge.moves", state="attached")
        until(page, "#figures", lambda shown: "%" in shown.splitlines()[1])
        assert "blue" in text(page, "#tenants")
        assert "llama" in text(page, "#spaces")
        first = page.locator("#figures").inner_text()
        until(page, "#figures", lambda shown: shown != first)
        assert watched.wrong == []

        pid = daemon.pid
        daemon.kill()
        until(page, "#state", "no answer".__eq__)
        assert "Engines compute for themselves meanwhile." in text(page, "#banner")
        # What was last seen stays, and is not taken for the present.
        assert page.locator("body.stale #tier-list li").count() == 2
        daemon.launch()
        daemon.wait_ready()
        until(page, "#state", "ready".__eq__)
        assert f"pid {daemon.pid}" in text(page, "#identity")
        assert daemon.pid != pid
        assert "started again" in text(page, "#banner")
        turns = traffic.turns
        wait_until(lambda: traffic.turns > turns + 5, what="the engine goes on")
        page.wait_for_selector(".edge.moves", state="attached")
    finally:
        traffic.stop()


def test_it_works_by_keyboard(daemon, watched):
    page = watched.open(daemon)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached: list[str] = []
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        shown = page.evaluate(
            "(() => { const e = document.activeElement, o = getComputedStyle(e).outlineStyle;"
            " return e === document.body || o !== 'none' || e.name === 'span' })()"
        )
        assert shown, f"the focus on {reached[-1]} is seen"
    assert {"theme", "span", "hits-chart", "explain-space", "explain-keys"} <= set(reached)

    page.focus("#theme")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.focus("#span input:checked")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('#span input:checked').value") == "3600"
    page.focus("#explain-keys")
    page.keyboard.type("ab" * 32)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#explanation .verdict")
    assert watched.wrong == []


def test_it_explains_a_miss_chunk_by_chunk(daemon, watched):
    manifest, digests = make_manifest(model="explained"), make_digests(10, prompt=77)
    with daemon.connect() as client:
        client.attach(manifest).store(digests[:8], sources_of(manifest, digests[:8]))
    page = watched.open(daemon)
    page.fill("#explain-keys", "\n".join(digest.hex() for digest in digests))
    page.click("#explain button")
    page.wait_for_selector("#explanation li")
    said = text(page, "#explanation")
    # Which of both depends on what the history still has of the time before.
    ends = "8 of 10 chunks are hits; the prefix ends there: "
    assert f"{ends}never stored." in said or f"{ends}not remembered." in said
    assert "#0 to #3" in said
    assert page.locator("#explanation li").count() == 1 + 4 + 2
    assert watched.wrong == []


def test_a_question_that_makes_no_sense_is_answered_in_words(daemon, watched):
    page = watched.open(daemon)
    page.select_option("#explain-kind", "token_ids")
    page.fill("#explain-keys", "1 2 three")
    page.click("#explain button")
    page.wait_for_selector("#explanation .verdict")
    assert text(page, "#explanation") == "Token ids are whole numbers."


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_it_is_accessible_and_fits(daemon, browser, theme, size):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(viewport=size, color_scheme=theme, bypass_csp=True)
    page = Watched(context.new_page()).open(daemon)
    found = axe.run(page, options=ACCESSIBLE).response["violations"]
    told = [(one["id"], [node["html"][:100] for node in one["nodes"]]) for one in found]
    wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    context.close()
    assert told == []
    assert wider <= 0


def test_the_page_has_no_markup_for_scripts_or_styles_within():
    page = (Path(__file__).parents[2] / "kvstore" / "admin" / "dashboard.html").read_text()
    for banned in ("<style", " style=", "onclick", "javascript:", "http:", "https:"):
        assert banned not in page.replace("http://www.w3.org/2000/svg", "")
    assert page.count("<script") == page.count('<script src="/dashboard.js"') == 1
    code = (Path(__file__).parents[2] / "kvstore" / "admin" / "dashboard.js").read_text()
    assert "innerHTML" not in code


def test_the_browser_is_the_one_that_is_installed():
    assert shutil.which(CHROMIUM) == CHROMIUM
