"""The admin API as operators use it: it shows what engines did, and what it does obeys leases."""

from __future__ import annotations

import pytest

from kvstore.admin.exposition import _COUNTERS, _PLAIN_COUNTERS
from kvstore.hashing import chunk_digests
from kvstore.limits import ADMIN_HISTORY_SECONDS
from tests.support.admin import ADMIN, WRITE
from tests.support.daemon import REPOSITORY
from tests.support.making import (
    CHUNK_TOKENS,
    make_digests,
    make_manifest,
    make_payload,
    sources_of,
)
from tests.support.waiting import wait_until

assert ADMIN_HISTORY_SECONDS < 20, "a test waits for one sample"


@pytest.fixture
def client(served):
    with served.connect("engine") as connected:
        yield connected


@pytest.fixture
def stored(client, request):
    """A namespace of this test's own with a prefix of four chunks, and that prefix."""
    space = client.attach(make_manifest(model=request.node.name[:64]))
    digests = make_digests(4)
    space.store(digests, sources_of(space.manifest, digests))
    return space, digests


def name_of(space) -> str:
    return space.manifest.namespace_id().hex()


def fresh(admin, path="/v1/status"):
    """Return what is shown once the last look is older than an answer may be."""
    first = admin.get(path).json
    return wait_until(
        lambda: (now := admin.get(path).json)["now_at"] > first["now_at"] and now, what="a new look"
    )


def metrics_of(admin) -> dict[str, float]:
    lines = admin.get("/metrics").body.decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
    return {name: float(value) for name, value in pairs}


# --- what is shown -----------------------------------------------------------------------


def test_status_shows_what_engines_did_and_every_chunk_asked_for_once(admin, client, stored):
    space, digests = stored
    assert space.lookup([*digests, *make_digests(2, prompt=9)]).hits == 4
    with space.load(digests) as loaded:
        assert len(loaded) == 4
        status = fresh(admin)
        assert status["leases"]["count"] >= 1
    lookups = dict(status["lookups"])
    assert lookups.pop("asked") == sum(lookups.values())
    (host,) = [tier for tier in status["tiers"] if tier["tier"] == "host"]
    assert host["stored_bytes"] == host["raw_bytes"] > 0
    assert host["breaker"] == "closed"
    flows = {(flow["source"], flow["target"]): flow for flow in status["flows"]}
    assert flows["host", "engine"]["chunks"] >= 4
    assert {"lookup", "load", "reserve", "commit"} <= {one["op"] for one in status["latencies"]}
    for latency in status["latencies"]:
        assert latency["count"] == sum(count for _, count in latency["buckets"])
        assert latency["p50_seconds"] <= latency["p99_seconds"]
    assert client.ping() == b""


def test_history_begins_with_a_sample(admin):
    history = admin.get("/v1/history").json
    assert history["samples"]
    assert history["interval_seconds"] == ADMIN_HISTORY_SECONDS


def test_what_is_alive_is_ready_through_the_data_path_and_stores_nothing_for_it(admin, served):
    assert admin.get("/livez").json == {"status": "alive"}
    answer = admin.get("/readyz")
    assert (answer.status, answer.json["status"]) == (200, "ready")
    assert {check["name"]: check["ok"] for check in answer.json["checks"]}["data path"]
    stats = served.stats()
    assert stats.reservations == 0
    assert all(space.model != "kvstore/readiness" for space in stats.namespaces if space.chunks)


def test_all_figures_obey_their_laws(admin, stored):
    space, digests = stored
    space.lookup(digests)
    space.delete(digests[2:])
    figures = metrics_of(admin)
    outcomes = [v for k, v in figures.items() if k.startswith("kvstore_lookup_chunks_total")]
    assert len(outcomes) == 5
    hits = [v for k, v in figures.items() if k.startswith("kvstore_hit_chunks_total")]
    assert sum(hits) == figures['kvstore_lookup_chunks_total{outcome="ready"}']
    came = figures['kvstore_tier_bytes_total{direction="in",tier="host"}']
    left = figures['kvstore_tier_bytes_total{direction="out",tier="host"}']
    assert came - left == figures['kvstore_tier_stored_bytes{tier="host"}']
    for name in figures:
        assert name.startswith("kvstore_")
        assert "_total_total" not in name


def test_every_counter_has_its_figure(admin, served):
    named = [
        *(counter for _, _, values in _COUNTERS.values() for _, counter in values),
        *(counter for counter, _ in _PLAIN_COUNTERS.values()),
        "evict_chunks",  # among those of all tiers
    ]
    assert sorted(named) == sorted(served.stats().counters)
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    families = {
        line.split()[2]
        for line in admin.get("/metrics").body.decode().splitlines()
        if line.startswith("# TYPE")
    }
    assert [family for family in sorted(families) if f"`{family}`" not in page] == []


def test_namespaces_and_chunks_come_in_pages(admin, stored):
    space, digests = stored
    name = name_of(space)
    shown = admin.get(f"/v1/namespaces/{name}").json
    assert (shown["chunks"], shown["sessions"]) == (4, 1)
    assert shown["manifest"]["model"] == space.manifest.model
    found, cursor = [], 0
    while cursor is not None:
        page = admin.get(f"/v1/chunks?namespace={name}&limit=1&cursor={cursor}").json
        found += [chunk["digest"] for chunk in page["chunks"]]
        cursor = page["next"]
    assert sorted(found) == sorted(digest.hex() for digest in digests)
    chunk = admin.get(f"/v1/chunks/{name}/{digests[1].hex()}").json
    assert (chunk["parent"], chunk["tiers"]) == (digests[0].hex(), ["host"])
    assert admin.get(f"/v1/chunks/{name}/{'0' * 64}").status == 404


def test_events_come_once_each(admin):
    first = admin.get("/v1/events?limit=1").json
    assert first["events"][0]["message"] == "admin API is served"
    after = admin.get(f"/v1/events?after={first['next']}").json
    assert first["events"][0]["id"] not in [event["id"] for event in after["events"]]


# --- why was this a miss? ----------------------------------------------------------------


def test_an_explanation_takes_tokens_digests_or_the_name_of_a_look_up(admin, client):
    tokens = list(range(7000, 7000 + 5 * CHUNK_TOKENS))
    digests = chunk_digests(tokens, CHUNK_TOKENS)
    space = client.attach(make_manifest(model="explained"))
    space.store(digests[:3], sources_of(space.manifest, digests[:3]))
    space.lookup(digests, name="cmpl-42")
    space.delete(digests[2:3])
    name = name_of(space)
    for asked in (
        {"namespace": name, "token_ids": tokens},
        {"namespace": name, "digests": [digest.hex() for digest in digests]},
        {"request": "cmpl-42"},
    ):
        answer = admin.post("/v1/prefixes/explain", asked)
        assert answer.status == 200, answer.body
        explained = answer.json
        assert (explained["namespace"], explained["hits"], explained["chunks_asked"]) == (
            name,
            2,
            5,
        )
        assert explained["cause"] == "deleted"
        assert [chunk["cause"] for chunk in explained["chunks"][2:]] == [
            "deleted",
            "never_stored",
            "never_stored",
        ]
    assert explained["looked_up_hits"] == 3
    assert admin.post("/v1/prefixes/explain", {"request": "unheard of"}).status == 404
    assert admin.post("/v1/prefixes/explain", {}).status == 400


# --- what is done ------------------------------------------------------------------------


def chunks(space, digests) -> dict[str, object]:
    return {"namespace": name_of(space), "digests": [digest.hex() for digest in digests]}


def test_evicting_leaves_what_is_leased_and_says_so(admin, stored):
    space, digests = stored
    with space.load(digests[:2]):
        done = admin.post("/v1/chunks/evict", chunks(space, digests), token=WRITE)
        assert done.json == {"chunks": 2, "busy": 2}
        assert space.lookup(digests).hits == 2


def test_pins_hold_until_they_end(admin, stored):
    space, digests = stored
    asked = chunks(space, digests)
    pinned = admin.post("/v1/chunks/pin", asked | {"hard": True}, token=WRITE)
    assert pinned.json["chunks"] == 4
    assert admin.get(f"/v1/chunks/{name_of(space)}/{digests[0].hex()}").json["pin"] == "hard"
    assert admin.post("/v1/chunks/evict", asked, token=WRITE).json == {"chunks": 0, "busy": 4}
    assert admin.post("/v1/chunks/unpin", asked, token=WRITE).json["chunks"] == 4
    assert admin.post("/v1/chunks/evict", asked, token=WRITE).json == {"chunks": 4, "busy": 0}


def test_verifying_finds_good_bytes_good_and_absent_ones_absent(admin, stored):
    space, digests = stored
    asked = chunks(space, [*digests[:1], *make_digests(1, prompt=7)])
    verified = admin.post("/v1/chunks/verify", asked, token=WRITE).json
    assert [one["verdict"] for one in verified["chunks"]] == ["ok", "absent"]


def test_verifying_finds_damage_removes_it_and_an_explanation_knows(admin, client):
    space = client.attach(make_manifest(model="damaged"))
    digests = make_digests(4, prompt=77)  # their bytes are nowhere else
    space.store(digests, sources_of(space.manifest, digests))
    view = space.attached.arena.view
    at = bytes(view).find(make_payload(digests[3], space.manifest.chunk_bytes))
    view[at + 5] ^= 1
    asked = chunks(space, digests)
    verified = admin.post("/v1/chunks/verify", asked, token=WRITE).json
    assert [one["verdict"] for one in verified["chunks"]] == ["ok", "ok", "ok", "damaged"]
    assert space.lookup(digests).hits == 3
    assert admin.post("/v1/prefixes/explain", asked).json["cause"] == "quarantined"


def test_prefetching_what_is_here_brings_nothing(admin, stored):
    answer = admin.post("/v1/prefetch", chunks(*stored), token=WRITE)
    assert answer.json == {"chunks": 0, "busy": 0}


def test_a_quota_changes_and_one_that_cannot_be_kept_is_refused(admin):
    path, mib = "/v1/tenants/blue/quota", 1 << 20
    changed = admin.ask(
        "PUT", path, json_body={"tier": "host", "quota_bytes": 4 * mib}, token=ADMIN
    )
    (blue,) = [one for one in changed.json["tenants"] if one["tenant"] == "blue"]
    assert blue["quota_bytes"] == 4 * mib
    asked = {"tier": "host", "floor_bytes": 8 * mib}
    refused = admin.ask("PUT", path, json_body=asked, token=ADMIN)
    assert refused.status == 409
    assert "above its quota" in refused.json["detail"]
    assert admin.ask("PUT", "/v1/tenants/red/quota", json_body=asked, token=ADMIN).status == 404


def test_the_configuration_is_shown_and_read_again(admin):
    shown = {one["path"]: one["value"] for one in admin.get("/v1/config").json["settings"]}
    assert shown["admin.listen"] == "127.0.0.1:0"
    assert admin.post("/v1/config/reload", token=ADMIN).json == {"applied": [], "waiting": []}
