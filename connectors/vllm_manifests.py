"""Which model a vLLM engine serves, in the words of the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.compression.policy import CodecPolicy
from kvstore.connectors.codecs import with_tail
from kvstore.connectors.identity import (
    LENGTH_DEPENDENT_ROPE,
    canonical_json,
    revision_of,
    rope_types,
)
from kvstore.connectors.vllm_layouts import KVGroup
from kvstore.connectors.vllm_settings import Settings
from kvstore.connectors.weights import UnsupportedError, weights_name
from kvstore.protocol.manifest import Manifest


def manifests_of(vllm_config: Any, groups: Sequence[KVGroup], settings: Settings) -> list[Manifest]:
    """Return the manifest of every group; raises `UnsupportedError` for a model without a name."""
    model = vllm_config.model_config
    if not settings.revision and vllm_config.load_config.load_format == "dummy":
        raise UnsupportedError(
            'dummy weights have no name; give them one with "revision" in kv_connector_extra_config'
        )
    weights = settings.revision or weights_name(model.model, model.revision)
    revision = revision_of(model.hf_config.to_dict(), weights)
    if model.quantization:
        revision += f" quantization {model.quantization}"
    rope = _rope(model)
    (architecture, *_) = model.architectures
    codec = settings.policy.codec
    return [
        group.manifest(model=architecture, revision=revision, rope=rope, codec=codec)
        for group in groups
    ]


def policies_of(
    vllm_config: Any, groups: Sequence[KVGroup], settings: Settings
) -> list[CodecPolicy]:
    """Return how chunks of every group are encoded: the RoPE part of a latent stays as it is."""
    rope_dim = getattr(vllm_config.model_config.hf_text_config, "qk_rope_head_dim", None) or 0
    return [
        with_tail(settings.policy, rope_dim) if group.is_latent else settings.policy
        for group in groups
    ]


def _rope(model: Any) -> str:
    parameters = getattr(model.hf_text_config, "rope_parameters", None) or {}
    words = canonical_json(parameters)
    if LENGTH_DEPENDENT_ROPE.intersection(rope_types(parameters)):
        # vLLM chooses the scaling once, for the longest text that it is to serve.
        words += f" for {model.max_model_len} tokens"
    return words
