"""A small decoder whose KV the quality bench encodes: bytes in, bytes out.

RMSNorm, also of queries and keys, rotary embedding, grouped-query attention, SwiGLU; 4 layers of
4 query and 2 KV heads of 64. A byte is embedded together with the one before it, so that a single
layer can look for what came behind the same byte earlier: a model of this size learns that in
minutes, where finding it out over two layers takes hours. The attention takes the KV of a prefix
from outside, so that a codec can spoil it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS: Final = Path(__file__).with_name("weights.npz")


class Shape(NamedTuple):
    """The dimensions of the model."""

    vocabulary: int = 256
    layers: int = 4
    width: int = 256
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 512
    rope_theta: float = 10_000.0


class LayerKV(NamedTuple):
    """Post-RoPE keys and values of one layer, each `[batch, kv_head, token, head_dim]`."""

    keys: Tensor
    values: Tensor


class Pass(NamedTuple):
    """What one forward pass gives: logits, the KV of its own tokens, the queries it asked with.

    Logits are `[batch, token, vocabulary]`, queries of each layer `[batch, head, token, dim]`.
    """

    logits: Tensor
    kv: list[LayerKV]
    queries: list[Tensor]


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[token, head_dim / 2]`; pair i is channels (i, i + D/2)."""
    rates = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions.to(torch.float32)[:, None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of channels of `[..., token, head_dim]` by its angle."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Block(nn.Module):
    """One layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query_width = shape.query_heads * shape.head_dim
        kv_width = shape.kv_heads * shape.head_dim
        self.attention_norm = nn.RMSNorm(shape.width)
        self.query = nn.Linear(shape.width, query_width, bias=False)
        self.key = nn.Linear(shape.width, kv_width, bias=False)
        self.value = nn.Linear(shape.width, kv_width, bias=False)
        self.query_norm = nn.RMSNorm(shape.head_dim)
        self.key_norm = nn.RMSNorm(shape.head_dim)
        self.out = nn.Linear(query_width, shape.width, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)
        # A layer begins by adding nothing.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, LayerKV]:
        """Return queries and own KV, rotated, heads before tokens."""
        x = self.attention_norm(x)
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, cos, sin), LayerKV(rotate(key, cos, sin), value)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what attention and the MLP have to say."""
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        y = self.mlp_norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class TinyModel(nn.Module):
    """The whole model; embedding and output share their weights."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape or Shape()
        self.embedding = nn.Embedding(self.shape.vocabulary, self.shape.width)
        self.before = nn.Embedding(self.shape.vocabulary, self.shape.width)
        self.blocks = nn.ModuleList(Block(self.shape) for _ in range(self.shape.layers))
        self.norm = nn.RMSNorm(self.shape.width)
        for embedding in (self.embedding, self.before):
            nn.init.normal_(embedding.weight, std=self.shape.width**-0.5)

    def forward(
        self, tokens: Tensor, prefix: list[LayerKV] | None = None, last: Tensor | None = None
    ) -> Pass:
        """Read *tokens* `[batch, token]`.

        They come behind *prefix* when there is one, and *last* `[batch, 1]` is its last token.
        """
        start = prefix[0].keys.shape[2] if prefix else 0
        positions = torch.arange(start, start + tokens.shape[1])
        cos, sin = rope_table(positions, self.shape.head_dim, self.shape.rope_theta)
        start_token = torch.zeros_like(tokens[:, :1]) if last is None else last
        x = self.embedding(tokens) + self.before(torch.cat((start_token, tokens[:, :-1]), dim=1))
        own: list[LayerKV] = []
        queries: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            query, kv = block.project(x, cos, sin)
            own.append(kv)
            queries.append(query)
            seen = _joined(prefix[number], kv) if prefix else kv
            x = block.finish(x, attend(query, seen))
        return Pass(functional.linear(self.norm(x), self.embedding.weight), own, queries)


def attend(query: Tensor, kv: LayerKV) -> Tensor:
    """Return causal attention of the last tokens over all of *kv*."""
    tokens, seen = query.shape[2], kv.keys.shape[2]
    if tokens == seen:
        return functional.scaled_dot_product_attention(
            query, kv.keys, kv.values, is_causal=True, enable_gqa=True
        )
    mask = torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)
    return functional.scaled_dot_product_attention(
        query, kv.keys, kv.values, attn_mask=mask, enable_gqa=True
    )


def save(model: TinyModel, path: Path = WEIGHTS) -> None:
    """Write the weights in half precision."""
    np.savez(path, **{name: value.half().numpy() for name, value in model.state_dict().items()})


def load(path: Path = WEIGHTS) -> TinyModel:
    """Return the trained model, in fp32."""
    with np.load(path, allow_pickle=False) as stored:
        state = {name: torch.from_numpy(stored[name]).float() for name in stored.files}
    model = TinyModel()
    model.load_state_dict(state)
    return model.eval()


def _joined(before: LayerKV, behind: LayerKV) -> LayerKV:
    return LayerKV(
        torch.cat((before.keys, behind.keys), dim=2),
        torch.cat((before.values, behind.values), dim=2),
    )
