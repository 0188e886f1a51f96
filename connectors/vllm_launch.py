"""The words that make vLLM use this connector. Imports nothing of vLLM."""

from __future__ import annotations

import json
from pathlib import Path


def transfer_config(socket: Path | None) -> str:
    """Return the value of `--kv-transfer-config`; *socket* None stands for the default one."""
    config: dict[str, object] = {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.connectors.vllm",
        "kv_role": "kv_both",
        # vLLM's own default fails a request whose KV does not arrive.
        "kv_load_failure_policy": "recompute",
    }
    if socket is not None:
        config["kv_connector_extra_config"] = {"socket": str(socket)}
    return json.dumps(config)
