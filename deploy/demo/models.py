"""The models of the demo: Llama-shaped, made from a seed, reading and writing bytes.

Their weights are random, so their answers are noise; what they cost and what they cache is
that of any model of their shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, and how long a document it is given. *label* says its size in parameters."""

    label: str
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    document_bytes: int
    chunk_tokens: int = 256

    def make(self) -> LlamaForCausalLM:
        """Return the model, the same one in every process, in float32."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=16_384,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config).eval()

    @property
    def summary(self) -> str:
        """One line that says what the model is."""
        return (
            f"{self.label} parameters, float32: {self.layers} layers,"
            f" {self.kv_heads} KV heads of {self.hidden // self.heads}"
        )


# 4,080 bytes and a question make a prompt of which 4,096 tokens can be reused.
SHAPES: Final = {
    "tiny": Shape("0.8M", 128, 256, 4, 4, 2, document_bytes=1_000, chunk_tokens=64),
    "small": Shape("32M", 512, 2_048, 8, 8, 4, document_bytes=6_128),
    "large": Shape("205M", 1_024, 4_096, 13, 16, 8, document_bytes=4_080),
}
