"""Grafana's dashboard and Prometheus's rules: whole, and about metrics that the daemon has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest
import yaml

from tests.support.addresses import admin_url
from tests.support.daemon import REPOSITORY, Daemon

DEPLOY = REPOSITORY / "deploy"
RULES = DEPLOY / "prometheus" / "kvstore.rules.yml"
BOARD = json.loads((DEPLOY / "grafana" / "kvstore.json").read_text())
# What Prometheus itself says of a target.
GIVEN = {"up"}
NAME = re.compile(r"\b(?:instance(?:_\w+)?:)?kvstore_[a-z0-9_:]+|\bup\b")


@pytest.fixture(scope="module")
def scraped(tmp_path_factory) -> set[str]:
    """The names of all series of a daemon with every tier that it can have."""
    place = tmp_path_factory.mktemp("scraped")
    settings = {
        "admin.listen": "127.0.0.1:0",
        "tiers.disk.path": place / "disk",
        "tiers.disk.capacity": "1MiB",
    }
    with Daemon(place, settings) as daemon:
        daemon.stats()
        with urllib.request.urlopen(f"{admin_url(daemon)}/metrics") as answer:
            text = answer.read().decode()
    return {
        re.split(r"[{ ]", line)[0] for line in text.splitlines() if line and line[0] != "#"
    } | GIVEN


def rules() -> Iterator[dict[str, object]]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


def names_in(query: str) -> set[str]:
    # What stands in quotes is the value of a label.
    bare = re.sub(r'"[^"]*"', '""', query)
    return set(NAME.findall(bare))


def test_every_rule_asks_for_what_there_is(scraped):
    recorded = {str(rule["record"]) for rule in rules() if "record" in rule}
    for rule in rules():
        asked = names_in(str(rule["expr"]))
        assert asked, rule
        assert asked <= scraped | recorded, rule


def test_every_panel_asks_for_what_there_is(scraped):
    targets = [target for panel in BOARD["panels"] for target in panel.get("targets", [])]
    assert len(targets) >= 20
    for target in [*targets, *BOARD["annotations"]["list"]]:
        assert names_in(target["expr"]), target
        assert names_in(target["expr"]) <= scraped, target
    (source, instance) = BOARD["templating"]["list"]
    assert source["type"] == "datasource"
    assert names_in(instance["query"]["query"]) <= scraped


def test_panels_have_a_place_of_their_own_and_a_title():
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert panel["title"]
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(numbers) == len(set(numbers))


def test_every_alert_has_its_section_in_the_runbook():
    runbook = (REPOSITORY / "docs" / "runbook.md").read_text()
    sections = {line.removeprefix("## ").strip() for line in runbook.splitlines() if "## " in line}
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 8
    for alert in alerts:
        assert alert["alert"] in sections
        assert alert["annotations"]["runbook"].endswith(f"#{str(alert['alert']).lower()}")
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed")
def test_prometheus_accepts_its_files():
    for words in (
        ("check", "rules", RULES),
        ("check", "config", RULES.with_name("prometheus.yml")),
    ):
        done = subprocess.run(["promtool", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed")
def test_alerts_come_when_they_should(tmp_path):
    cases = REPOSITORY / "tests" / "deploy" / "alerts.test.yml"
    here = tmp_path / "alerts.test.yml"
    here.write_text(cases.read_text().replace("RULES", str(RULES)))
    done = subprocess.run(
        ["promtool", "test", "rules", here], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
