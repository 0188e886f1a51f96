"""Tiny models of every supported family, seeded, in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GQA = COMMON | {"num_key_value_heads": 2, "head_dim": 16}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def build(config: transformers.PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def llama(**changes: object) -> PreTrainedModel:
    seed = changes.pop("seed", 0)
    return build(transformers.LlamaConfig(**(GQA | changes)), seed=seed)


def llama_mha() -> PreTrainedModel:
    return llama(num_key_value_heads=4)


def qwen2() -> PreTrainedModel:
    return build(transformers.Qwen2Config(**{k: v for k, v in GQA.items() if k != "head_dim"}))


def qwen3() -> PreTrainedModel:
    return build(transformers.Qwen3Config(**GQA))


def mistral_sliding() -> PreTrainedModel:
    return build(transformers.MistralConfig(**GQA, sliding_window=48))


def gemma2() -> PreTrainedModel:
    config = transformers.Gemma2Config(**GQA, sliding_window=48, layer_types=ALTERNATING)
    config._attn_implementation = "eager"
    return build(config)


def gemma3() -> PreTrainedModel:
    return build(transformers.Gemma3TextConfig(**GQA, sliding_window=40, layer_types=ALTERNATING))


def gemma3n_shared() -> PreTrainedModel:
    """The last two layers use the KV of the first two."""
    return build(
        transformers.Gemma3nTextConfig(
            **(GQA | {"intermediate_size": [96] * 4}),
            sliding_window=40,
            layer_types=ALTERNATING,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=320,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 4,
        )
    )


def gemma4() -> PreTrainedModel:
    """Full layers have wider heads than sliding ones."""
    return build(
        transformers.Gemma4TextConfig(
            **GQA,
            sliding_window=40,
            layer_types=ALTERNATING,
            global_head_dim=32,
            vocab_size_per_layer_input=320,
            hidden_size_per_layer_input=16,
        )
    )


def llama4_chunked() -> PreTrainedModel:
    """Attention within blocks of 48 tokens, beside full attention."""
    return build(
        transformers.Llama4TextConfig(
            **GQA,
            intermediate_size_mlp=96,
            num_local_experts=2,
            attention_chunk_size=48,
            layer_types=["chunked_attention", "full_attention"] * 2,
        )
    )


def gpt_oss() -> PreTrainedModel:
    return build(
        transformers.GptOssConfig(
            **GQA,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=48,
            layer_types=ALTERNATING,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )


def mixtral() -> PreTrainedModel:
    return build(transformers.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2))


def gpt_neox() -> PreTrainedModel:
    return build(transformers.GPTNeoXConfig(**COMMON))


def deepseek_v2() -> PreTrainedModel:
    """Keys are wider than values: two groups."""
    return build(
        transformers.DeepseekV2Config(
            **COMMON,
            kv_lora_rank=32,
            q_lora_rank=None,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            first_k_dense_replace=4,
        )
    )


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    make.__name__: make
    for make in (
        llama,
        llama_mha,
        qwen2,
        qwen3,
        mistral_sliding,
        mixtral,
        gemma2,
        gemma3,
        gemma3n_shared,
        gemma4,
        llama4_chunked,
        gpt_oss,
        gpt_neox,
        deepseek_v2,
    )
}


def jamba() -> PreTrainedModel:
    """Every layer is Mamba: not supported."""
    return build(
        transformers.JambaConfig(
            **COMMON, num_key_value_heads=2, attn_layer_offset=7, num_experts=2
        )
    )


def qwen3_next() -> PreTrainedModel:
    """Three of four layers are linear attention: not supported."""
    return build(
        transformers.Qwen3NextConfig(
            **GQA,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            num_experts=2,
            num_experts_per_tok=1,
        )
    )
