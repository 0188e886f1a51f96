"""Tiny models on disk, seeded, as vLLM serves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
