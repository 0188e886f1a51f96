"""What transformers has stored is a hit in SGLang, byte for byte, and the other way round."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from transformers import DynamicCache

from kvstore.connectors.huggingface import PrefixReuse
from tests.engine import models
from tests.engine.oracle import compute, prompt
from tests.engine.sglang import pools
from tests.engine.sglang.pools import COMMON, PAGE, indices, page_hashes, page_of, storage


@pytest.mark.parametrize("layout", pools.KEYS_VALUES_LAYOUTS)
def test_pages_that_transformers_stored_lie_in_the_pool_as_it_computed_them(layout, socket, tiny):
    model = models.llama()
    ids = prompt(6 * PAGE + 3, seed=200 + pools.KEYS_VALUES_LAYOUTS.index(layout))
    options = {"socket": socket, "revision": COMMON["revision"], "timeout_seconds": 20.0}
    pool = pools.keys_values(layout)
    keys = page_hashes(ids[0].tolist())
    with PrefixReuse(model, chunk_tokens=PAGE, **options) as prefixes:
        with prefixes.begin(ids) as past:
            compute(model, ids, past)
        computed = past.layers
    with closing(storage(socket, tiny, pool, layout="canonical")) as made:
        assert made.batch_exists(keys) == 6
        assert all(made.batch_get_v1(keys, indices([7, 2, 0, 5, 1, 3])))
    for number, page in enumerate((7, 2, 0, 5, 1, 3)):
        span = slice(number * PAGE, (number + 1) * PAGE)
        expected = torch.stack(
            [torch.stack([layer.keys[0, :, span], layer.values[0, :, span]]) for layer in computed]
        )
        assert torch.equal(page_of(pool, page), expected)


def test_pages_that_sglang_stored_are_reused_by_transformers(socket, tiny):
    model, ids = models.llama(), prompt(4 * PAGE + 1, seed=300)
    computed = DynamicCache(config=model.config)
    logits = compute(model, ids, computed)
    pool = pools.keys_values("page_first")
    for page in range(4):
        span = slice(page * PAGE, (page + 1) * PAGE)
        for number, layer in enumerate(computed.layers):
            for side, states in enumerate((layer.keys, layer.values)):
                pool.kv_buffer[side, span, number] = states[0, :, span].transpose(0, 1)
    with closing(storage(socket, tiny, pool)) as made:
        assert all(made.batch_set_v1(page_hashes(ids[0].tolist()), indices(range(4))))
    options = {"socket": socket, "revision": COMMON["revision"], "timeout_seconds": 20.0}
    with PrefixReuse(model, chunk_tokens=PAGE, **options) as prefixes:
        past = prefixes.begin(ids)
        assert past.report.reused_tokens == 4 * PAGE
        continued = compute(model, ids, past)
    torch.testing.assert_close(continued[:, -1], logits[:, -1])
