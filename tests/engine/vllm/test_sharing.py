"""What transformers has stored is a hit in vLLM, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from deploy.demo.daemon import running_daemon
from kvstore.connectors.huggingface import PrefixReuse
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine

CHUNK = 256
TOKENS = 8
# Both sides must name the weights alike: one reads files, the other tensors.
WEIGHTS = "tests/tiny@1"


def complete(model, ids: torch.Tensor, past=None) -> list[int]:
    """Return the tokens that transformers adds."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=past,
        max_new_tokens=TOKENS,
        do_sample=False,
    )
    return output[0, ids.shape[1] :].tolist()


def open_prefixes(model, socket: Path) -> PrefixReuse:
    return PrefixReuse(
        model, chunk_tokens=CHUNK, socket=socket, revision=WEIGHTS, timeout_seconds=5.0
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_and_vllm_share_prefixes(family, tmp_path):
    path = models.save(tmp_path, family)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    theirs, ours = models.prompts(2, 700, seed=40)
    extra = {"revision": WEIGHTS}
    with running_daemon(["tiers.host.capacity=256MiB"]) as (socket, _):
        with open_prefixes(model, socket) as prefixes:
            ids = torch.tensor([theirs])
            with prefixes.begin(ids) as past:
                expected = complete(model, ids, past)
            assert past.report.chunks_stored == 2
        with Engine(path, socket=socket, extra=extra) as engine:
            warm, cold = engine.generate([theirs, ours], tokens=TOKENS)
            engine.call("settle")
        assert (warm.reused, cold.reused) == (512, 0)
        assert warm.tokens == expected
        with open_prefixes(model, socket) as prefixes:
            ids = torch.tensor([ours])
            with prefixes.begin(ids) as past:
                found = complete(model, ids, past)
            assert past.report.reused_tokens == 512
    assert found == cold.tokens == complete(model, torch.tensor([ours]))
