"""What a transformers model caches, and what its KV depends on.

The geometry comes from the model itself: one token is run through it, and what each layer
has cached is looked at. The identity covers the configuration and the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import xxhash
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvstore.connectors.identity import (
    LENGTH_DEPENDENT_ROPE,
    canonical_json,
    group_name,
    revision_of,
    rope_types,
)
from kvstore.errors import RequestError
from kvstore.protocol.manifest import Manifest

# What stands in for layers that share the KV of others; older versions have no such class.
_STAND_INS: Final[Any] = getattr(cache_utils, "DummyLayer", ())

Side = str
"""`"keys"` or `"values"`: the name of the tensor of a cache layer."""


class Plane(NamedTuple):
    """One tensor of one layer, of shape `[1, heads, tokens, head_dim]`."""

    layer: int
    side: Side
    device: torch.device


@dataclass(frozen=True, slots=True)
class Geometry:
    """The layers that share one kind of attention and one shape: one group, one namespace.

    *planes* are in canonical order. *window_tokens* is 0 for full attention.
    """

    planes: tuple[Plane, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype
    window_tokens: int

    @property
    def layers(self) -> list[int]:
        """The layers of this group, in order."""
        return sorted({plane.layer for plane in self.planes})

    @property
    def sides(self) -> list[Side]:
        """The tensors of a layer that are in this group."""
        return sorted({plane.side for plane in self.planes})

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one head of one plane."""
        return self.head_dim * int(self.dtype.itemsize)


def observe(model: PreTrainedModel) -> list[Geometry]:
    """Return the groups of *model*, full attention first.

    Layers that share the KV of others (Gemma3n) have none of their own and are in no group.
    Raises `RequestError` when some layer's state cannot be cut into chunks of tokens.
    """
    _refuse_unsupported(model)
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        _refuse_state_without_tokens(index, layer)
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    found: dict[tuple[object, ...], list[Plane]] = {}
    for index, layer in enumerate(cache.layers):
        for key, plane in _planes_of(index, layer):
            found.setdefault(key, []).append(plane)
    groups = [_geometry(key, planes) for key, planes in found.items()]
    return sorted(groups, key=lambda group: (group.window_tokens, group.layers, group.sides))


def manifest_of(
    model: PreTrainedModel,
    geometry: Geometry,
    *,
    revision: str,
    chunk_tokens: int,
    codec: str = "raw",
) -> Manifest:
    """Return the manifest of one group of *model*."""
    config = model.config.get_text_config(decoder=True)
    return Manifest(
        model=type(model).__name__,
        revision=revision,
        dtype=str(geometry.dtype).removeprefix("torch."),
        layers=len(geometry.layers),
        kv_heads=geometry.heads,
        head_dim=geometry.head_dim,
        chunk_tokens=chunk_tokens,
        codec=codec,
        rope=canonical_json(getattr(config, "rope_parameters", None) or {}),
        group=group_name(geometry.window_tokens, geometry.sides, geometry.layers),
        values="k|v" if len(geometry.sides) == 2 else "k",
    )


def fingerprint(model: PreTrainedModel, *, weights: str | None = None) -> str:
    """Return what stands for the configuration and the weights of *model*.

    *weights* names them (`"org/name@commit"`) and must change whenever they do; without it
    every tensor is hashed, which reads all of the weights once. The hash guards against
    accidents; it is no proof against somebody who makes weights collide.
    """
    config = model.config.to_dict()
    if weights is not None:
        return revision_of(config, weights)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(_content_digest(name, tensor))
    return revision_of(config, f"sha256-{digest.hexdigest()[:32]}")


def _content_digest(name: str, tensor: torch.Tensor) -> bytes:
    if tensor.is_meta:
        raise RequestError(f"weights of {name} are not in memory; pass revision= to name them")
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_128_digest(raw)


def _refuse_unsupported(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise RequestError(f"{name} is an encoder-decoder; only decoders have prefixes")
    if getattr(config, "use_bidirectional_attention", None):
        raise RequestError(f"{name} attends in both directions; it has no prefixes")
    for kind in rope_types(getattr(config, "rope_parameters", None)):
        if kind in LENGTH_DEPENDENT_ROPE:
            raise RequestError(
                f"rope scaling {kind!r} moves old positions when the text grows,"
                " so no prefix keeps its KV"
            )


def _refuse_state_without_tokens(index: int, layer: object) -> None:
    known = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    if not known and not isinstance(layer, _STAND_INS):
        raise RequestError(
            f"layer {index} keeps its state in {type(layer).__name__}; only full and sliding-window"
            " attention can be cut into chunks of tokens"
        )


def _planes_of(index: int, layer: Any) -> Iterable[tuple[tuple[object, ...], Plane]]:
    """Yield the planes of one layer, each with what its group has in common."""
    if isinstance(layer, _STAND_INS):
        return
    if not layer.is_initialized or layer.get_seq_length() != 1:
        raise RequestError(f"layer {index} does not keep its KV in the cache it is given")
    window = layer.sliding_window if layer.is_sliding else 0
    # Keys and values of different width are kept in two groups.
    apart = layer.keys.shape != layer.values.shape
    for side in ("keys", "values"):
        tensor = getattr(layer, side)
        key = (window, tensor.shape[1], tensor.shape[3], tensor.dtype, side if apart else "")
        yield key, Plane(index, side, tensor.device)


def _geometry(key: tuple[Any, ...], planes: Sequence[Plane]) -> Geometry:
    window, heads, head_dim, dtype, _ = key
    return Geometry(tuple(planes), heads, head_dim, dtype, window)
