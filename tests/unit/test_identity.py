"""The words by which connectors name the same thing alike, and different things differently."""

from __future__ import annotations

from kvstore.connectors.identity import (
    digest_of_files,
    group_name,
    ranges,
    revision_of,
    rope_types,
)

CONFIG = {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


def test_a_revision_depends_on_configuration_and_weights():
    revision = revision_of(CONFIG, "org/name@1")
    assert revision == revision_of(dict(reversed(CONFIG.items())), "org/name@1")
    assert revision != revision_of(CONFIG, "org/name@2")
    assert revision != revision_of(CONFIG | {"hidden_size": 65}, "org/name@1")
    assert revision != revision_of(CONFIG | {"rope_parameters": {}}, "org/name@1")


def test_a_revision_does_not_depend_on_names_and_versions():
    unrelated = {"_name_or_path": "/models/x", "transformers_version": "5", "use_cache": False}
    assert revision_of(CONFIG | unrelated, "w") == revision_of(CONFIG, "w")
    nested = {"text_config": CONFIG}
    assert revision_of({"text_config": CONFIG | unrelated}, "w") == revision_of(nested, "w")


def test_groups_are_named_by_their_attention_and_layers():
    assert group_name(0, ["keys", "values"], [0, 1, 2, 5]) == "full; keys+values; layers 0-2,5"
    assert group_name(512, ["keys"], [3]) == "sliding 512; keys; layers 3"
    assert ranges([]) == ""


def test_rope_types_are_found_wherever_they_are():
    parameters = {"full": {"rope_type": "yarn"}, "sliding": {"rope_type": "default"}}
    assert sorted(rope_types(parameters)) == ["default", "yarn"]
    assert list(rope_types(None)) == []


def test_weights_are_known_by_name_and_content(tmp_path):
    assert digest_of_files(tmp_path) == ""
    (tmp_path / "notes.txt").write_text("not a weight")
    assert digest_of_files(tmp_path) == ""
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = digest_of_files(tmp_path)
    (tmp_path / "notes.txt").write_text("still not")
    assert digest_of_files(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    second = digest_of_files(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert len({first, second, digest_of_files(tmp_path)}) == 3
