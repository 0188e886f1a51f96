"""The connector fits the connector interface of other releases of vLLM, as read from them.

`contract.json` is what `read_contract.py` found in their wheels.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from kvstore.connectors.vllm import KVStoreConnector

RELEASES = json.loads((Path(__file__).parent / "contract.json").read_text())
# What is read in a step, or from the report of a step.
READ = {
    "CachedRequestData": {"num_computed_tokens", "new_block_ids", "req_ids", "resumed_req_ids"},
    "KVConnectorOutput": {"finished_recving", "invalid_block_ids", "kv_connector_worker_meta"},
    "NewRequestData": {"block_ids", "num_computed_tokens", "req_id"},
    "SchedulerOutput": {
        "num_scheduled_tokens",
        "scheduled_cached_reqs",
        "scheduled_new_reqs",
        "total_num_scheduled_tokens",
    },
}


@pytest.fixture(params=RELEASES)
def release(request) -> dict:
    return RELEASES[request.param]


def own(name: str) -> object:
    """Return what the connector itself defines under *name*, not what it inherits."""
    return vars(KVStoreConnector).get(name)


def test_every_abstract_method_is_there(release):
    for base in ("KVConnectorBase_V1", "SupportsHMA"):
        assert [name for name in release[base]["abstract"] if own(name) is None] == []


def test_every_method_takes_what_it_is_given(release):
    for base in ("KVConnectorBase_V1", "SupportsHMA"):
        for name, arguments in release[base]["methods"].items():
            method = own(name)
            if not callable(getattr(method, "__func__", method)):
                continue
            signature = inspect.signature(getattr(method, "__func__", method))
            signature.bind(None, *arguments)


def test_what_is_read_is_there(release):
    for name, fields in READ.items():
        assert fields - set(release[name]["fields"]) == set()


def test_blocks_can_be_held(release):
    methods = release["BlockPool"]["methods"]
    assert methods["touch"] == ["blocks"]
    assert methods["free_blocks"] == ["ordered_blocks"]
