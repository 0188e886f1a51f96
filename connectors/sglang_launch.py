"""The words that make SGLang use this connector. Imports nothing of SGLang."""

from __future__ import annotations

import json
import shlex
from pathlib import Path


def extra_config(socket: Path | None) -> str:
    """Return the value of `--hicache-storage-backend-extra-config`.

    *socket* None stands for the default one.
    """
    config: dict[str, object] = {
        "backend_name": "kvstore",
        "module_path": "kvstore.connectors.sglang",
        "class_name": "KVStoreHiCache",
        # Without it SGLang copies every page twice.
        "interface_v1": 1,
        # Says which page comes before a batch, so that the end of a prefix is evicted first.
        "hicache_storage_pass_prefix_keys": True,
    }
    if socket is not None:
        config["socket"] = str(socket)
    return json.dumps(config)


def launch_flags(socket: Path | None) -> list[str]:
    """Return what `sglang.launch_server` is given beside the model."""
    return [
        "--page-size",
        "64",
        "--enable-hierarchical-cache",
        "--hicache-mem-layout",
        "page_first",
        "--hicache-storage-backend",
        "dynamic",
        "--hicache-storage-backend-extra-config",
        extra_config(socket),
    ]


def launch_words(socket: Path | None) -> str:
    """Return the same as a shell takes them."""
    return shlex.join(launch_flags(socket))


def launch_command(socket: Path | None) -> str:
    """Return the command that starts SGLang, for a shell."""
    return f"python -m sglang.launch_server --model-path MODEL {launch_words(socket)}"
