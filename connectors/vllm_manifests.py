"""Which model a vLLM engine serves, in the words of the manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from kvstore.connectors.identity import (
    LENGTH_DEPENDENT_ROPE,
    canonical_json,
    digest_of_files,
    revision_of,
    rope_types,
)
from kvstore.connectors.vllm_layouts import KVGroup, UnsupportedError
from kvstore.connectors.vllm_settings import Settings
from kvstore.protocol.manifest import Manifest

log = logging.getLogger("vllm.kvstore")

_SLOW_SECONDS: Final = 5.0


def manifests_of(vllm_config: Any, groups: Sequence[KVGroup], settings: Settings) -> list[Manifest]:
    """Return the manifest of every group; raises `UnsupportedError` for a model without a name."""
    model = vllm_config.model_config
    if not settings.revision and vllm_config.load_config.load_format == "dummy":
        raise UnsupportedError(
            'dummy weights have no name; give them one with "revision" in kv_connector_extra_config'
        )
    weights = settings.revision or _weights(model)
    revision = revision_of(model.hf_config.to_dict(), weights)
    if model.quantization:
        revision += f" quantization {model.quantization}"
    rope = _rope(model)
    (architecture, *_) = model.architectures
    return [group.manifest(model=architecture, revision=revision, rope=rope) for group in groups]


def _rope(model: Any) -> str:
    parameters = getattr(model.hf_text_config, "rope_parameters", None) or {}
    words = canonical_json(parameters)
    if LENGTH_DEPENDENT_ROPE.intersection(rope_types(parameters)):
        # vLLM chooses the scaling once, for the longest text that it is to serve.
        words += f" for {model.max_model_len} tokens"
    return words


def _weights(model: Any) -> str:
    """Return the name of the weights: a commit of the hub, or a hash of their files."""
    folder = Path(model.model)
    if not folder.is_dir():
        folder = _hub_snapshot(model.model, model.revision)
    if folder.parent.name == "snapshots":
        return folder.name
    times = tuple(sorted(path.stat().st_mtime_ns for path in folder.iterdir()))
    if found := _hashed(folder, times):
        return found
    raise UnsupportedError(
        f"{folder} has no weight files that could be told apart by their bytes;"
        ' name them with "revision" in kv_connector_extra_config'
    )


def _hub_snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  # only where vLLM is

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise UnsupportedError(
            f"it is not known which weights {name!r} stands for;"
            ' name them with "revision" in kv_connector_extra_config'
        )
    return Path(found).parent


@lru_cache(maxsize=8)
def _hashed(folder: Path, times: tuple[int, ...]) -> str:
    assert times, "an empty folder is no model"
    started = time.perf_counter()
    found = digest_of_files(folder)
    taken = time.perf_counter() - started
    if taken > _SLOW_SECONDS:
        log.info(
            'kvstore: reading the weights to name them took %.0f s; "revision" in'
            " kv_connector_extra_config saves that",
            taken,
        )
    return found
