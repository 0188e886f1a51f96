"""Prefix reuse for transformers models, against a store in memory.

The oracle is the engine itself: its own plain `DynamicCache` of what was stored, cut back to the
prefix and continued, must give the same bits as the loaded prefix, continued. (Another split of
the same tokens into passes rounds differently: matrix products are summed in another order.)
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore.connectors import huggingface_groups
from kvstore.connectors.huggingface import PrefixReuse
from kvstore.errors import RequestError
from tests.engine import models
from tests.engine.standin import MemoryCache, MemoryStore

CHUNK_TOKENS = 16


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(params=models.FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return models.FAMILIES[request.param]()


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


def test_a_loaded_prefix_gives_the_same_bits_as_the_engines_own(model, store):
    ids = prompt(150)
    remember(reuse(model, store), model, ids[:, :144])

    past = reuse(model, store).begin(ids)

    assert past.report.reused_tokens == past.get_seq_length() == 144
    assert torch.equal(compute(model, ids, past), engine_alone(model, ids[:, :144], ids, 144))


def test_generate_gives_the_same_tokens(model, store):
    ids = prompt(150)
    prefixes = reuse(model, store)
    expected = generate(model, ids)
    for expected_reuse in (0, 144):
        with prefixes.begin(ids) as past:
            tokens = generate(model, ids, past_key_values=past)
        assert past.report.reused_tokens == expected_reuse
        assert torch.equal(tokens, expected)


def test_every_prefix_of_a_longer_stored_prompt_is_reused(model, store):
    """Also where a sliding window begins in the middle of a chunk."""
    ids = prompt(200)
    prefixes = reuse(model, store)
    remember(prefixes, model, ids)
    for length in (17, 33, 52, 90, 161):
        part = ids[:, :length]
        past = prefixes.begin(part)
        prefix = (length - 1) // CHUNK_TOKENS * CHUNK_TOKENS
        assert past.report.reused_tokens == prefix
        assert torch.equal(compute(model, part, past), engine_alone(model, ids, part, prefix))


@pytest.mark.parametrize("make", [models.llama, models.gemma3], ids=lambda make: make.__name__)
def test_turns_of_a_conversation_build_on_each_other(make, store):
    model = make()
    prefixes = reuse(model, store)
    ids, reports = prompt(40), []
    for _ in range(4):
        with prefixes.begin(ids) as past:
            ids = torch.cat([generate(model, ids, past_key_values=past), prompt(25)], dim=1)
        reports.append(past.report)
    assert [report.reused_tokens for report in reports] == [0, 32, 80, 128]
    assert all(not report.chunks_present and not report.chunks_refused for report in reports)


def test_finish_with_the_output_stores_the_answer_too(model, store):
    ids = prompt(40)
    prefixes = reuse(model, store)
    past = prefixes.begin(ids)
    output = generate(model, ids, past_key_values=past)

    past.finish(output)

    # The last token was chosen but never computed.
    assert output.shape[1] == 60
    assert reused(prefixes, output) == 48
    own = DynamicCache(config=model.config)
    generate(model, ids, past_key_values=own)
    again = prefixes.begin(output)
    compute(model, output[:, :59], again)
    kept = [layer for layer in own.layers if layer.keys is not None]
    loaded = [layer for layer in again.layers if layer.keys is not None]
    for one, other in zip(kept, loaded, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)


def test_finish_refuses_tokens_that_are_not_the_prompt_and_its_answer(store):
    model = models.llama()
    past = reuse(model, store).begin(prompt(40))
    with pytest.raises(RequestError, match="do not begin with the prompt"):
        past.finish(prompt(60, seed=2))


def test_a_prompt_shorter_than_a_chunk_is_neither_loaded_nor_stored(model, store):
    prefixes = reuse(model, store)
    for _ in range(2):
        with prefixes.begin(prompt(CHUNK_TOKENS - 1)) as past:
            compute(model, prompt(CHUNK_TOKENS - 1), past)
        assert dataclasses.asdict(past.report) | {"prompt_tokens": 0} == dict.fromkeys(
            dataclasses.asdict(past.report), 0
        )


def test_one_token_is_always_left_to_compute(store):
    model = models.llama()
    prefixes = reuse(model, store)
    ids = prompt(3 * CHUNK_TOKENS)
    remember(prefixes, model, ids)
    assert len(store.chunks) == 3
    assert reused(prefixes, ids) == 2 * CHUNK_TOKENS


def test_a_gap_ends_the_hit(store):
    model = models.llama()
    prefixes = reuse(model, store)
    ids = prompt(100)
    remember(prefixes, model, ids)
    third = list(store.chunks)[2]
    del store.chunks[third]
    with prefixes.begin(ids) as past:
        compute(model, ids, past)
    assert past.report.reused_tokens == 32
    # What lay behind the gap is still there.
    assert (past.report.chunks_stored, past.report.chunks_present) == (1, 3)


def test_a_sliding_window_needs_only_its_last_chunks(store):
    model = models.mistral_sliding()
    prefixes = reuse(model, store)
    ids = prompt(150)
    remember(prefixes, model, ids)
    for key in list(store.chunks)[:6]:
        del store.chunks[key]
    past = prefixes.begin(ids)
    assert past.report.reused_tokens == 144
    assert torch.equal(compute(model, ids, past), engine_alone(model, ids, ids, 144))


def test_groups_agree_on_the_longest_prefix_that_all_can_serve(store):
    model = models.gemma3()
    prefixes = reuse(model, store)
    ids = prompt(150)
    remember(prefixes, model, ids)
    sliding = next(key for key, found in store.manifests.items() if "sliding" in found.group)
    of_sliding = [key for key in store.chunks if key[0] == sliding]
    # A hit needs three chunks in a row: without the fifth, hits of 5, 6 and 7 chunks are gone.
    del store.chunks[of_sliding[4]]
    assert reused(prefixes, ids) == 144
    assert reused(prefixes, ids[:, :120]) == 64


def test_chunks_are_canonical(store):
    """`X[layer][k|v][kv_head][token][head_dim]`, as the engine computed them."""
    model = models.llama()
    ids = prompt(40)
    remember(reuse(model, store), model, ids)
    own = DynamicCache(config=model.config)
    compute(model, ids, own)
    for index, payload in enumerate(store.chunks.values()):
        chunk = torch.from_numpy(payload).view(torch.float32).view(4, 2, 2, CHUNK_TOKENS, 16)
        span = slice(index * CHUNK_TOKENS, (index + 1) * CHUNK_TOKENS)
        for layer, cached in enumerate(own.layers):
            assert torch.equal(chunk[layer, 0], cached.keys[0, :, span])
            assert torch.equal(chunk[layer, 1], cached.values[0, :, span])


def test_parents_link_the_chunks_of_a_prefix(store):
    model = models.llama()
    prefixes = reuse(model, store)
    ids = prompt(100)
    remember(prefixes, model, ids[:, :50])
    remember(prefixes, model, ids)
    digests = [digest for _, digest in store.chunks]
    assert list(store.parents.values()) == [None, *digests[:-1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_as_it_is(store, dtype):
    model = models.gemma3().to(dtype)
    ids = prompt(150)
    prefixes = reuse(model, store)
    remember(prefixes, model, ids[:, :144])
    past = prefixes.begin(ids)
    assert past.report.reused_tokens == 144
    assert torch.equal(compute(model, ids, past), engine_alone(model, ids[:, :144], ids, 144))


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


@pytest.mark.parametrize("inference", [True, False])
def test_a_prefix_loaded_in_one_mode_serves_another(inference, store):
    model, ids = models.gemma3(), prompt(150)
    prefixes = reuse(model, store)
    remember(prefixes, model, ids)
    with torch.inference_mode(inference):
        past = prefixes.begin(ids)
    with torch.inference_mode(not inference):
        tokens = generate(model, ids, past_key_values=past)
    assert torch.equal(tokens, generate(model, ids))


def test_reset_forgets_the_prefix(store):
    model, ids = models.gemma3(), prompt(150)
    prefixes = reuse(model, store)
    remember(prefixes, model, ids)
    past = prefixes.begin(ids)
    past.reset()
    own = DynamicCache(config=model.config)
    assert torch.equal(compute(model, ids, past), compute(model, ids, own))


def test_rope_that_moves_old_positions_is_refused(store):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(RequestError, match="'dynamic' moves old positions"):
        reuse(models.llama(rope_parameters=rope), store)


def test_an_error_in_the_block_stores_nothing(store):
    model, ids = models.llama(), prompt(100)
    past = reuse(model, store).begin(ids)
    compute(model, ids, past)
    with pytest.raises(ZeroDivisionError), past:
        raise ZeroDivisionError
    assert not store.chunks


def test_what_was_never_computed_is_not_stored(store):
    model, ids = models.gemma3(), prompt(100)
    prefixes = reuse(model, store)
    with prefixes.begin(ids):
        pass
    with prefixes.begin(ids) as past:
        compute(model, ids[:, :50], past)
    assert past.report.chunks_stored == 2 * 3


def test_a_cropped_cache_stores_only_what_is_left(store):
    model, ids = models.gemma3(), prompt(100)
    prefixes = reuse(model, store)
    own = DynamicCache(config=model.config)
    own.activate_past_recording()
    with prefixes.begin(ids) as past:
        for cache in (past, own):
            compute(model, ids[:, :36], cache)
            cache.crop(-10)
            assert cache.get_seq_length() == 26
            compute(model, ids[:, :39], cache)
    assert past.report.chunks_stored == 2 * 2
    later = prefixes.begin(ids[:, :39])
    own.crop(-7)
    assert torch.equal(compute(model, ids[:, :39], later), compute(model, ids[:, :39], own))


def test_a_cache_cropped_into_its_loaded_prefix_stores_nothing(store):
    """What comes next would be taken for the tokens that were cropped."""
    model, ids = models.gemma3(), prompt(100)
    prefixes = reuse(model, store)
    remember(prefixes, model, ids[:, :20])
    with prefixes.begin(ids) as past:
        past.activate_past_recording()
        past.crop(-4)
        compute(model, ids, past)
        past.crop(-1)
    sliding = [found for found in store.manifests.values() if "sliding" in found.group]
    assert [key for key, _ in store.chunks].count(sliding[0].namespace_id()) == 1


def test_finish_stores_once(store):
    model, ids = models.gemma3(), prompt(100)
    with reuse(model, store).begin(ids) as past:
        compute(model, ids, past)
        report = past.finish()
    assert report.chunks_stored == 12
    assert past.finish() == past.report == report


def test_chunks_that_never_load_are_given_up(store, monkeypatch):
    model, ids = models.llama(), prompt(100)
    prefixes = reuse(model, store)
    remember(prefixes, model, ids)
    asked = []

    def fail(self, digests, targets):
        asked.append(len(digests))
        return len(digests) - 1

    monkeypatch.setattr(MemoryCache, "load", fail)
    assert reused(prefixes, ids) == 0
    assert asked == [6, 5, 4]


def test_where_the_host_cannot_write_chunks_land_in_its_memory_first(store, monkeypatch):
    # The same memory under another name: what a GPU's tensors go through.
    monkeypatch.setattr(huggingface_groups, "_HOST", torch.device("cpu", 0))
    model, ids = models.gemma3(), prompt(150)
    prefixes = reuse(model, store)
    remember(prefixes, model, ids)
    past = prefixes.begin(ids)
    assert past.report.reused_tokens == 144
    assert torch.equal(compute(model, ids, past), engine_alone(model, ids, ids, 144))


def test_a_model_that_ignores_the_cache_is_refused(store, monkeypatch):
    model = models.llama()
    monkeypatch.setattr(model, "forward", lambda **_: None)
    with pytest.raises(RequestError, match="layer 0 does not keep its KV"):
        reuse(model, store)


def test_beams_are_never_stored(store):
    model, ids = models.llama(), prompt(40)
    prefixes = reuse(model, store)
    with prefixes.begin(ids) as past:
        compute(model, ids, past)
        past.batch_repeat_interleave(2)
        compute(model, torch.cat([prompt(41).expand(2, -1)]), past)
    assert not store.chunks


def test_long_answers_outgrow_the_room_made_for_the_prompt(store):
    model, ids = models.llama(), prompt(40)
    with reuse(model, store).begin(ids) as past:
        tokens = model.generate(ids, past_key_values=past, max_new_tokens=400, do_sample=False)
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=400, do_sample=False))


def test_a_backward_pass_works_through_a_loaded_prefix(store):
    model, ids = models.llama(), prompt(60)
    prefixes = reuse(model, store)
    remember(prefixes, model, ids)
    past = prefixes.begin(ids)
    model(ids[:, 48:], past_key_values=past, labels=ids[:, 48:]).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
