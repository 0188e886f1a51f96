"""What cannot be kept is said once, with the way out; only contradictions stop an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvstore.connectors.vllm_layouts import UnsupportedError, groups_of
from kvstore.connectors.vllm_settings import read_settings
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine, EngineError


def config(
    *, cache: dict[str, object] | None = None, drafts: object = None, **parallel: object
) -> SimpleNamespace:
    fields = {"cache_dtype": "auto", "enable_prefix_caching": True} | (cache or {})
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(**fields),
        speculative_config=drafts,
    )


@pytest.mark.parametrize(
    ("vllm_config", "words"),
    [
        (config(cache={"cache_dtype": "fp8_e4m3"}), "fp8_e4m3.*--kv-cache-dtype auto"),
        (config(cache={"enable_prefix_caching": False}), "--enable-prefix-caching"),
        (config(pipeline_parallel_size=2), "pipeline_parallel_size is 2"),
        (config(decode_context_parallel_size=2), "decode_context_parallel_size is 2"),
        (config(drafts=SimpleNamespace(use_eagle=lambda: True)), "EAGLE and MTP"),
    ],
)
def test_an_engine_that_cannot_be_served_is_told_why(vllm_config, words):
    with pytest.raises(UnsupportedError, match=words):
        groups_of(vllm_config, SimpleNamespace(kv_cache_groups=[]), read_settings({}))


@pytest.mark.parametrize("extra", [{"chunk_tokens": 200}, {"sockets": "/x"}])
def test_a_contradiction_stops_the_engine_at_its_start(llama, tmp_path, extra):
    with pytest.raises(EngineError, match="kv_connector_extra_config"):
        Engine(llama, socket=tmp_path / "none.sock", extra=extra)


def test_a_wrong_socket_is_no_reason_not_to_serve(llama, tmp_path):
    asked = models.prompts(2, 600, seed=70)
    with Engine(llama, socket=tmp_path / "none.sock") as engine:
        first = engine.generate(asked)
        assert engine.generate(asked)[0].tokens == first[0].tokens
        engine.call("settle")


def test_a_quantised_cache_is_served_without_the_store(llama, tmp_path):
    arguments = {"kv_cache_dtype": "fp8_e4m3", "dtype": "bfloat16"}
    with Engine(llama, socket=tmp_path / "none.sock", **arguments) as engine:
        assert engine.generate(models.prompts(1, 600, seed=71))[0].tokens
