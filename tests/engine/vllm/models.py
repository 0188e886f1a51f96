"""Tiny models on disk, seeded, as vLLM serves them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers

COMMON = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {
    "gemma3": transformers.Gemma3TextConfig,
    "llama": transformers.LlamaConfig,
    "qwen3": transformers.Qwen3Config,
}
_RANK = 8
# Two thirds of the layers see no further than this.
HYBRID = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 300,
}


def save(folder: Path, family: str, *, seed: int = 0, **changes: object) -> Path:
    """Write a model of *family* with weights from *seed* below *folder*; return where."""
    path = folder / f"{family}-{seed}"
    torch.manual_seed(seed)
    config = CONFIGS[family](**(COMMON | changes))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def save_adapter(folder: Path, name: str, *, seed: int) -> Path:
    """Write a LoRA adapter of the attention of a `COMMON` model below *folder*; return where."""
    path = folder / name
    path.mkdir()
    config = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": 4 * _RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, dim = (
        COMMON[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    widths = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    weights = {}
    for layer in range(COMMON["num_hidden_layers"]):
        for module, width in widths.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for side, shape in (
                ("lora_A", (_RANK, COMMON["hidden_size"])),
                ("lora_B", (width, _RANK)),
            ):
                weights[f"{place}.{side}.weight"] = torch.randn(shape, generator=generator)
    safetensors.torch.save_file(weights, path / "adapter_model.safetensors")
    return path


def prompts(count: int, tokens: int, *, seed: int = 0) -> list[list[int]]:
    """Return *count* prompts of *tokens* tokens that have no prefix in common."""
    ids = np.random.default_rng(seed).integers(2, COMMON["vocab_size"], (count, tokens))
    return ids.tolist()


def save_tokenizer(path: Path) -> None:
    """Write a tokenizer beside a model: every token is a word."""
    words = {f"w{token}": token for token in range(COMMON["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
