"""kvstore/protocol/VERSION.md says what the code does: tags, fields, defaults, error codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from kvstore import errors, limits, protocol
from kvstore.protocol import messages as m
from kvstore.types import ReserveOutcome, TierKind

PAGE = Path(protocol.__file__).with_name("VERSION.md")

MESSAGES = [*get_args(m.AnyRequest), *get_args(m.AnyReply)]
COMMON_FIELDS = {"request_id", "deadline_ms"}


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table under *heading*, without its head."""
    section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def spelled(kind: type[msgspec.Struct]) -> str:
    """Return the fields of *kind* as the page writes them."""
    fields = [f for f in msgspec.structs.fields(kind) if f.name not in COMMON_FIELDS]
    return ", ".join(f.name if f.required else f"{f.name} = {default_of(f)}" for f in fields)


def default_of(field: msgspec.structs.FieldInfo) -> str:
    made = field.default_factory is not msgspec.NODEFAULT
    value = field.default_factory() if made else field.default
    if isinstance(value, bool):
        return str(value).lower()
    return f'b"{value.decode()}"' if isinstance(value, bytes) else json.dumps(value)


def test_the_page_is_about_the_version_that_is_spoken(page):
    assert page.startswith(f"# The wire, version {m.PROTOCOL_VERSION}\n")


def test_the_tables_of_messages_agree_with_the_code(page):
    listed = [row[:3] for row in rows(page, "Requests") + rows(page, "Replies")]
    coded = [[str(kind.__struct_config__.tag), kind.__name__, spelled(kind)] for kind in MESSAGES]
    assert listed == coded


def test_every_request_names_a_reply_that_exists(page):
    replies = {kind.__name__ for kind in get_args(m.AnyReply)}
    assert {row[3] for row in rows(page, "Requests")} == replies - {"Error"}


def test_the_table_of_errors_agrees_with_the_code(page):
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, errors.KVStoreError)
        and kind is not errors.KVStoreError
    ]
    coded = [
        [str(kind.code), kind.__name__, "yes" if kind.retryable else "no"]
        for kind in sorted(kinds, key=lambda kind: kind.code)
    ]
    assert rows(page, "Error codes") == coded


def test_the_limits_on_the_page_are_those_of_the_code(page):
    for number in (
        limits.FRAME_SIZE_MAX_BYTES,
        limits.KEYS_PER_REQUEST_MAX,
        limits.EXTENTS_PER_REPLY_MAX,
        limits.DEADLINE_MAX_MS,
        limits.IN_FLIGHT_PER_SESSION_MAX,
    ):
        assert re.search(rf"\b{number:,}\b", page), f"{number:,} is not on the page"
    assert f"within {limits.HELLO_DEADLINE_SECONDS:.0f} seconds" in page
    assert f"at most {limits.MANIFEST_SIZE_MAX_BYTES // limits.KIB} KiB" in page
    assert limits.REQUEST_ID_MAX == 2**63 - 1


def test_outcomes_and_tiers_on_the_page_are_those_of_the_code(page):
    flat = " ".join(page.split())
    outcomes = ", ".join(f"{o.value} {o.name.lower().replace('_', ' ')}" for o in ReserveOutcome)
    assert f"outcomes are {outcomes}." in flat
    tiers = ", ".join(f"{kind.value} {kind.name.lower()}" for kind in TierKind)
    assert f"bits are {tiers}.".lower() in flat.lower()
