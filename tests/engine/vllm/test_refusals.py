"""What cannot be kept is said once, with the way out; only contradictions stop an engine."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvstore.client.cache import PrefixCache
from kvstore.client.sync import Client
from kvstore.connectors.vllm import _announce
from kvstore.connectors.vllm_layouts import groups_of
from kvstore.connectors.vllm_manifests import manifests_of
from kvstore.connectors.vllm_settings import read_settings
from kvstore.connectors.weights import UnsupportedError
from kvstore.errors import ConfigError, VersionError
from kvstore.protocol import messages as m
from kvstore.protocol.framing import FrameReader, frame
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine, EngineError
from tests.support.making import make_digests, opaque_manifest


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


def test_a_daemon_of_another_version_is_named_and_not_waited_for(tmp_path, caplog):
    """A real server that speaks, but not our protocol."""
    manifest = opaque_manifest(4096)
    settings = read_settings({"socket": str(tmp_path / "other.sock")})
    with other_version(settings.socket_path):
        with caplog.at_level("WARNING", logger="vllm.kvstore"):
            _announce([manifest], settings)
        with PrefixCache(manifest, socket=settings.socket_path) as cache:
            assert not cache.is_connected
            assert cache.lookup(make_digests(3)) == 0
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "serving without the cache" in line
    assert "this daemon 999" in line


@contextmanager
def other_version(path: Path) -> Iterator[None]:
    """Answer every hello at *path* as a daemon of version 999 does, and hang up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        server = threading.Thread(target=_refuse_all, args=(listener,))
        server.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()


def _refuse_all(listener: socket.socket) -> None:
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        with peer:
            frames = FrameReader()
            while not (bodies := list(frames.feed(peer.recv(65536)))):
                pass
            hello = m.decode_request(bodies[0])
            words = f"client speaks protocol {hello.version}, this daemon 999"
            peer.sendall(frame(m.Error(hello.request_id, VersionError.code, words, False)))


@pytest.mark.parametrize(
    "extra", [{"sockets": "/x"}, {"chunk_token": 256}, {"store_decode": True}, {"layout": 3}]
)
def test_keys_that_are_unknown_are_named_with_those_that_are_known(extra):
    with pytest.raises(ConfigError, match=r"kv_connector_extra_config.*known are socket"):
        read_settings(extra)


def test_dummy_weights_have_no_name():
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(), load_config=SimpleNamespace(load_format="dummy")
    )
    with pytest.raises(UnsupportedError, match=r'dummy weights.*"revision"'):
        manifests_of(vllm_config, [], read_settings({}))


def test_dummy_weights_are_served_without_the_store(llama, socket):
    with Engine(llama, socket=socket, load_format="dummy") as engine:
        asked = models.prompts(1, 600, seed=72)
        assert engine.generate(asked)[0].tokens == engine.generate(asked)[0].tokens
    with Client.connect(socket) as client:
        assert client.stats().counters["commit_chunks"] == 0


def test_a_quantised_cache_is_served_without_the_store(llama, tmp_path):
    arguments = {"kv_cache_dtype": "fp8_e4m3", "dtype": "bfloat16"}
    with Engine(llama, socket=tmp_path / "none.sock", **arguments) as engine:
        assert engine.generate(models.prompts(1, 600, seed=71))[0].tokens
