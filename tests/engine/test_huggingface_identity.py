"""Whose KV meets whose, and which models and prompts are refused."""

from __future__ import annotations

import pytest
import torch

from kvstore.errors import RequestError
from tests.engine import models
from tests.engine.oracle import prompt, remember, reuse, reused


def test_finish_refuses_tokens_that_are_not_the_prompt_and_its_answer(store):
    model = models.llama()
    past = reuse(model, store).begin(prompt(40))
    with pytest.raises(RequestError, match="do not begin with the prompt"):
        past.finish(prompt(60, seed=2))


OTHER_MODELS = {
    "weights": lambda: models.llama(seed=1),
    "dtype": lambda: models.llama().to(torch.bfloat16),
    "rope base": lambda: models.llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "rope scaling": lambda: models.llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "norm": lambda: models.llama(rms_norm_eps=1e-5),
}


@pytest.mark.parametrize("make", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_models_that_compute_other_kv_never_meet(make, store):
    model, ids = models.llama(), prompt(100)
    remember(reuse(model, store), model, ids)
    assert reused(reuse(model, store), ids) == 96
    assert reused(reuse(make(), store), ids) == 0


def test_a_revision_stands_for_the_weights(store):
    model, ids = models.llama(), prompt(100)
    remember(reuse(model, store, revision="tiny@1"), model, ids)
    assert reused(reuse(model, store, revision="tiny@1"), ids) == 96
    assert reused(reuse(model, store, revision="tiny@2"), ids) == 0
    assert reused(reuse(model, store), ids) == 0


SCOPES = [
    {},
    {"salt": b"tenant-1"},
    {"salt": b"tenant-2"},
    {"adapter": "poet"},
    {"adapter": "poet", "adapter_revision": "2"},
]


def test_adapters_and_salts_never_meet(store):
    model, ids = models.llama(), prompt(100)
    prefixes = reuse(model, store)
    for scope in SCOPES:
        assert reused(prefixes, ids, **scope) == 0
        remember(prefixes, model, ids, **scope)
    assert [reused(prefixes, ids, **scope) for scope in SCOPES] == [96] * len(SCOPES)
    assert reused(prefixes, ids, adapter="") == 96


def test_a_model_with_adapters_must_say_which_is_active(store):
    model = models.llama()
    prefixes = reuse(model, store)
    model.peft_config = {}
    with pytest.raises(RequestError, match="say which is active"):
        prefixes.begin(prompt(40))
    assert reused(prefixes, prompt(40), adapter="poet") == 0


def test_a_batch_is_refused(store):
    with pytest.raises(RequestError, match=r"\(2, 40\); prefix reuse takes one prompt"):
        reuse(models.llama(), store).begin(prompt(40).expand(2, -1))


def test_media_tokens_are_refused(store):
    model = models.llama()
    model.config.image_token_id = 310
    ids = prompt(40)
    ids[0, 7] = 310
    with pytest.raises(RequestError, match="image_token_id 310"):
        reuse(model, store).begin(ids)


def test_a_model_in_training_is_refused(store):
    model = models.llama()
    prefixes = reuse(model, store)
    model.train()
    with pytest.raises(RequestError, match="training"):
        prefixes.begin(prompt(40))


@pytest.mark.parametrize("make", [models.qwen3_next, models.jamba], ids=lambda make: make.__name__)
def test_linear_attention_is_refused(make, store):
    with pytest.raises(RequestError, match="layer 0 keeps its state in LinearAttentionLayer"):
        reuse(make(), store)


def test_an_encoder_decoder_is_refused(store):
    model = models.llama()
    model.config.is_encoder_decoder = True
    with pytest.raises(RequestError, match="only decoders have prefixes"):
        reuse(model, store)


def test_attention_in_both_directions_is_refused(store):
    model = models.gemma3()
    model.config.use_bidirectional_attention = True
    with pytest.raises(RequestError, match="attends in both directions"):
        reuse(model, store)


def test_weights_that_are_not_in_memory_need_a_name(store):
    with pytest.raises(RequestError, match="pass revision="):
        reuse(models.llama().to("meta"), store)


def test_rope_that_moves_old_positions_is_refused(store):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(RequestError, match="'dynamic' moves old positions"):
        reuse(models.llama(rope_parameters=rope), store)


def test_a_model_that_ignores_the_cache_is_refused(store, monkeypatch):
    model = models.llama()
    monkeypatch.setattr(model, "forward", lambda **_: None)
    with pytest.raises(RequestError, match="layer 0 does not keep its KV"):
        reuse(model, store)
