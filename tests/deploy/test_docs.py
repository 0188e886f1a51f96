"""The operators' pages: their links lead somewhere, their commands parse, their settings exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kvstore import cli
from kvstore.config import setting_at, settings
from tests.support.daemon import REPOSITORY

NAMES = (
    "quickstart", "deployment", "sizing", "tuning", "runbook", "security", "non-goals", "faq",
)  # fmt: skip
PAGES = {name: REPOSITORY / "docs" / f"{name}.md" for name in NAMES} | {
    "readme": REPOSITORY / "README.md"
}
# Tables whose names begin what is a setting in these pages.
TABLES = {path.split(".")[0] for path in settings()}
CHART_VALUES = {
    f"{name}.{key}"
    for name, keys in yaml.safe_load(
        (REPOSITORY / "deploy" / "helm" / "kvstore" / "values.yaml").read_text()
    ).items()
    if isinstance(keys, dict)
    for key in keys
}


def lines_of_code(text: str) -> Iterator[str]:
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", text)


def commands_in(text: str) -> Iterator[list[str]]:
    for line in lines_of_code(text):
        bare = line.split("  #")[0].split(" | ")[0].strip()
        if bare.startswith("kvstore ") and "..." not in bare:
            yield shlex.split(bare)[1:]


@pytest.mark.parametrize("name", PAGES)
def test_commands_parse(name):
    for words in commands_in(PAGES[name].read_text()):
        if words[0] == "bench":
            assert set(words[1:]) <= set(cli._BENCHES)
            continue
        # A command that is only named is not to be typed as it stands.
        asked = [*words, "--help"] if len(words) == 1 else words
        assert status_of(asked) == 0, f"{name}: kvstore {' '.join(words)}"


def status_of(words: list[str]) -> object:
    try:
        cli._parser().parse_args(words)
    except SystemExit as ended:
        return ended.code
    return 0


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(found), f"{name}: {target}"


@pytest.mark.parametrize("name", PAGES)
def test_settings_exist(name):
    text = PAGES[name].read_text()
    for line in lines_of_code(text):
        for path in re.findall(r"\b([a-z]+(?:\.[a-z_]+)+)\b(?=$|=| =|\s)", line):
            if path.split(".")[0] not in TABLES or path.endswith((".md", ".py", ".toml", ".json")):
                continue
            if path in CHART_VALUES:
                continue
            is_table = any(known.startswith(f"{path}.") for known in settings())
            assert setting_at(path) is not None or is_table, f"{name}: {path}"


def test_what_reloads_is_what_the_page_says():
    from kvstore.daemon.reload import RELOADABLE

    text = PAGES["deployment"].read_text()
    told = text[text.index("At once:") : text.index("For sessions that are open")]
    assert set(re.findall(r"`([a-z_.*]+)`", told)) == set(RELOADABLE)


def test_what_the_install_lines_install_is_there():
    text = PAGES["deployment"].read_text()
    files = re.findall(r"\bdeploy/[\w./-]+", text)
    assert len(files) > 8
    for file in files:
        assert (REPOSITORY / file).exists(), file


def test_pictures_are_small():
    pictures = sorted((REPOSITORY / "docs" / "images").glob("*.png"))
    assert {"dashboard-empty.png", "dashboard-busy-light.png", "dashboard-broken.png"} <= {
        picture.name for picture in pictures
    }
    assert [picture.name for picture in pictures if picture.stat().st_size >= 150_000] == []
