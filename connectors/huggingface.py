"""Prefix reuse for Hugging Face transformers models.

    prefixes = PrefixReuse(model)
    with prefixes.begin(input_ids) as past:
        output = model.generate(input_ids, past_key_values=past)

`begin` looks up the longest stored prefix of the prompt and loads it; the model computes the
rest; leaving the block stores the new chunks of the prompt. `past.finish(output)` stores the
chunks of the answer as well. Without a daemon every look-up is a miss and nothing is stored;
the model never notices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore.client.cache import PrefixCache
from kvstore.compression.guard import CodecCounters
from kvstore.connectors.chunks import ChunkCache, Group, StoreCounts, joint_hit, window_chunks
from kvstore.connectors.codecs import CodecChoice, counted, read_codec
from kvstore.connectors.huggingface_device import OpenDevice, device_group, open_cuda
from kvstore.connectors.huggingface_groups import ModelGroup, Planes
from kvstore.connectors.huggingface_layers import HEADROOM_TOKENS, SlidingLayer, own_layer
from kvstore.connectors.huggingface_model import Geometry, fingerprint, manifest_of, observe
from kvstore.errors import RequestError
from kvstore.hashing import chunk_digests, scope_digest
from kvstore.limits import STAGING_SIZE_BYTES, STAGING_SIZE_MAX_BYTES
from kvstore.protocol.manifest import Manifest
from kvstore.types import Digest

CHUNK_TOKENS_DEFAULT: Final = 256
# A chunk that fails its checksum shortens the hit; after that often, the prompt is computed.
_LOAD_ATTEMPTS_MAX: Final = 3
# Tokens that stand for something else than text: their KV depends on what the digest cannot see.
_MEDIA_TOKEN_NAMES: Final = (
    "image_token_id",
    "video_token_id",
    "audio_token_id",
    "image_token_index",
)

TokenIds: TypeAlias = torch.Tensor | Sequence[int] | npt.NDArray[np.integer]
OpenCache = Callable[[Manifest], ChunkCache]


@dataclass(frozen=True, slots=True)
class Report:
    """What prefix reuse did for one prompt. Chunks are counted once per KV group."""

    prompt_tokens: int
    reused_tokens: int
    bytes_loaded: int
    chunks_stored: int = 0
    chunks_present: int = 0
    chunks_refused: int = 0
    bytes_stored: int = 0


class PrefixReuse:
    """Keeps the prefixes of one model in the daemon, and begins new prompts from them.

    *revision* names the weights (`"org/name@commit"`); without it all weights are hashed once.
    Make a new one when the weights change. Chunks are stored with *codec*: a name, or a table as
    in `read_codec`; prefixes of other codecs are not found. Where the model is on a GPU, that moves
    its chunks by itself, and takes *gpu_staging_bytes* for each KV group and direction.
    *open_cache* and *open_device* are for tests and other stores.

    Raises `RequestError` when the model's state cannot be cut into chunks of tokens or
    *gpu_staging_bytes* is out of range, and `ConfigError` for a codec that is unknown.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        chunk_tokens: int = CHUNK_TOKENS_DEFAULT,
        socket: Path | str | None = None,
        revision: str | None = None,
        timeout_seconds: float = 0.04,
        codec: CodecChoice = "raw",
        gpu_staging_bytes: int = STAGING_SIZE_BYTES,
        open_cache: OpenCache | None = None,
        open_device: OpenDevice = open_cuda,
    ) -> None:
        policy = read_codec(codec)
        if not 0 < gpu_staging_bytes <= STAGING_SIZE_MAX_BYTES:
            raise RequestError(f"gpu_staging_bytes must lie in [1, {STAGING_SIZE_MAX_BYTES}]")

        def connect(manifest: Manifest) -> ChunkCache:
            return PrefixCache(
                manifest,
                socket=socket,
                timeout_seconds=timeout_seconds,
                name="huggingface",
                policy=policy,
            )

        self._model = model
        self._chunk_tokens = chunk_tokens
        self._codec = policy.codec
        self._open_cache = open_cache or connect
        self._open_device = open_device
        self._gpu_staging_bytes = gpu_staging_bytes
        self._revision = fingerprint(model, weights=revision)
        self._groups = [self._group(geometry) for geometry in observe(model)]

    def begin(
        self,
        input_ids: TokenIds,
        *,
        adapter: str | None = None,
        adapter_revision: str = "",
        salt: bytes = b"",
    ) -> PrefixedCache:
        """Return a `past_key_values` for *input_ids* (one prompt) with its longest stored prefix.

        At least one token is left to compute. *adapter* names the active LoRA (`""` for none)
        and must be given when the model has any; *salt* keeps a tenant's prefixes apart.

        Raises `RequestError` for more than one prompt, media tokens, or a model in training.
        """
        tokens = _flat_tokens(input_ids)
        self._refuse_unfit(tokens, adapter)
        scope = scope_digest(adapter=adapter or "", adapter_revision=adapter_revision, salt=salt)
        digests = chunk_digests(tokens, self._chunk_tokens, scope=scope)
        usable = digests[: max(0, len(tokens) - 1) // self._chunk_tokens]
        planes, hit = self._load(usable, room_tokens=len(tokens) + HEADROOM_TOKENS)
        past = PrefixedCache(self._model, self._groups, tokens, digests, scope=scope)
        if hit:
            past.adopt(planes, hit)
        return past

    @property
    def codec_counters(self) -> CodecCounters:
        """What encoding has done so far: bytes, errors, fallbacks, chunks that did not fit."""
        return counted(group.group.cache for group in self._groups)

    @property
    def device_counters(self) -> dict[str, int]:
        """What GPUs have moved so far, and every fallback; nothing where there are none."""
        counted = [group.device.counters.values() for group in self._groups if group.device]
        return {name: sum(each[name] for each in counted) for name in (counted or [{}])[0]}

    def close(self) -> None:
        """End the connections to the daemon, and free what was taken of a GPU."""
        for group in self._groups:
            group.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _group(self, geometry: Geometry) -> ModelGroup:
        manifest = manifest_of(
            self._model,
            geometry,
            revision=self._revision,
            chunk_tokens=self._chunk_tokens,
            codec=self._codec,
        )
        window = geometry.window_tokens and window_chunks(
            geometry.window_tokens, self._chunk_tokens
        )
        cache = self._open_cache(manifest)
        device = device_group(
            cache,
            geometry,
            self._chunk_tokens,
            self._open_device,
            staging_bytes=self._gpu_staging_bytes,
        )
        return ModelGroup(geometry, Group(cache, window), self._chunk_tokens, device)

    def _load(self, digests: Sequence[Digest], *, room_tokens: int) -> tuple[Planes, int]:
        """Return the planes of the longest prefix that every group can serve, and its chunks."""
        for _ in range(_LOAD_ATTEMPTS_MAX):
            hit = joint_hit([group.group for group in self._groups], digests)
            if not hit:
                break
            planes: Planes = {}
            good = hit
            for group in self._groups:
                loaded, good = group.load(digests[:hit], room_tokens)
                planes |= loaded
                if good < hit:
                    break
            if good == hit:
                return planes, hit
            digests = digests[:good]
        return {}, 0

    def _refuse_unfit(self, tokens: npt.NDArray[np.integer], adapter: str | None) -> None:
        model = self._model
        if model.training:
            raise RequestError(
                "the model is in training mode; call model.eval() before its KV is kept"
            )
        has_adapters = hasattr(model, "peft_config") or getattr(
            model, "_hf_peft_config_loaded", False
        )
        if has_adapters and adapter is None:
            raise RequestError(
                "the model has adapters; say which is active: adapter='name', or '' for none"
            )
        for name in _MEDIA_TOKEN_NAMES:
            media = getattr(model.config, name, None)
            if media is not None and media in tokens:
                raise RequestError(
                    f"the prompt has media tokens ({name} {media}); only text is reused"
                )


class PrefixedCache(DynamicCache):
    """A `DynamicCache` that begins with a stored prefix, and stores what is computed after it.

    As a context it calls `finish` at the end, unless the block raised.
    """

    layers: list[Any]

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Sequence[ModelGroup],
        tokens: npt.NDArray[np.integer],
        digests: Sequence[Digest],
        *,
        scope: Digest | None,
    ) -> None:
        super().__init__(config=model.config)
        self.layers = [own_layer(layer, len(tokens)) for layer in self.layers]
        self.report = Report(len(tokens), reused_tokens=0, bytes_loaded=0)
        self._groups = groups
        self._digests = digests
        self._scope = scope
        self._hit = 0
        self._finished = False

    def adopt(self, planes: Planes, hit: int) -> None:
        """Begin with the first *hit* chunks, which *planes* hold."""
        tokens = hit * self._groups[0].chunk_tokens
        for index in sorted({layer for layer, _ in planes}):
            self.layers[index].adopt(planes[index, "keys"], planes[index, "values"], tokens)
        loaded = sum(group.bytes_needed(hit) for group in self._groups)
        self.report = replace(self.report, reused_tokens=tokens, bytes_loaded=loaded)
        self._hit = hit

    def finish(self, token_ids: TokenIds | None = None) -> Report:
        """Store the new whole chunks and say what was done; later calls only say it again.

        Without *token_ids* these are the chunks of the prompt. With the prompt and its answer,
        as `generate` returns them, they are the chunks of both.

        Raises `RequestError` when *token_ids* does not begin with the prompt.
        """
        if self._finished:
            return self.report
        digests = self._digests if token_ids is None else self._digests_with(token_ids)
        for group in self._groups:
            counts = group.store(self.layers, digests, self._hit)
            if counts is not None:
                self.report = _added(self.report, counts)
        self._stop()
        return self.report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._stop()

    def _stop(self) -> None:
        self._finished = True
        for layer in self.layers:
            if isinstance(layer, SlidingLayer):
                layer.stop_recording()

    def _digests_with(self, token_ids: TokenIds) -> Sequence[Digest]:
        tokens = _flat_tokens(token_ids)
        digests = chunk_digests(tokens, self._groups[0].chunk_tokens, scope=self._scope)
        if digests[: len(self._digests)] != self._digests:
            raise RequestError("the tokens to store do not begin with the prompt")
        return digests


def _added(report: Report, counts: StoreCounts) -> Report:
    return replace(
        report,
        chunks_stored=report.chunks_stored + counts.stored,
        chunks_present=report.chunks_present + counts.present,
        chunks_refused=report.chunks_refused + counts.refused,
        bytes_stored=report.bytes_stored + counts.bytes_stored,
    )


def _flat_tokens(token_ids: TokenIds) -> npt.NDArray[np.integer]:
    """Return *token_ids* (`[tokens]` or `[1, tokens]`) as a flat array."""
    ids = token_ids.cpu().numpy() if isinstance(token_ids, torch.Tensor) else np.asarray(token_ids)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise RequestError(
            f"token ids of shape {ids.shape}; prefix reuse takes one prompt at a time"
        )
    return ids
