"""What the connector tests say and compare with: prompts, sessions, and the engine alone.

The oracle is the engine itself: its own plain `DynamicCache` of what was stored, cut back to the
prefix and continued, must give the same bits as the loaded prefix, continued. (Another split of
the same tokens into passes rounds differently: matrix products are summed in another order.)
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore.connectors.huggingface import PrefixReuse
from tests.engine.standin import MemoryStore

CHUNK_TOKENS = 16


def prompt(tokens: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 300, (1, tokens), generator=torch.Generator().manual_seed(seed))


def reuse(model: PreTrainedModel, store: MemoryStore, **options: object) -> PrefixReuse:
    return PrefixReuse(model, chunk_tokens=CHUNK_TOKENS, open_cache=store.open, **options)


def compute(model: PreTrainedModel, ids: torch.Tensor, past: DynamicCache) -> torch.Tensor:
    """Run what *past* does not hold yet; return the logits."""
    with torch.inference_mode():
        return model(ids[:, past.get_seq_length() :], past_key_values=past).logits


def engine_alone(
    model: PreTrainedModel, stored: torch.Tensor, ids: torch.Tensor, prefix: int
) -> torch.Tensor:
    """Compute *stored* in one pass, cut back to *prefix*, go on with *ids*; return the logits."""
    past = DynamicCache(config=model.config)
    past.activate_past_recording()
    compute(model, stored, past)
    past.crop(prefix - stored.shape[1])
    return compute(model, ids, past)


def remember(
    prefixes: PrefixReuse, model: PreTrainedModel, ids: torch.Tensor, **scope: object
) -> None:
    with prefixes.begin(ids, **scope) as past:
        compute(model, ids, past)


def reused(prefixes: PrefixReuse, ids: torch.Tensor, **scope: object) -> int:
    return prefixes.begin(ids, **scope).report.reused_tokens


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: object) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=20, do_sample=False, **options)
