"""Prefix reuse for transformers models, against a store in memory: what is reused and stored."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore.connectors import huggingface_groups
from tests.engine import models
from tests.engine.oracle import (
    CHUNK_TOKENS,
    compute,
    engine_alone,
    generate,
    prompt,
    remember,
    reuse,
    reused,
)
from tests.engine.standin import MemoryCache


@pytest.fixture(params=models.FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return models.FAMILIES[request.param]()


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
