"""The digests of a vLLM request: everything that makes its KV differ from another's."""

from __future__ import annotations

import hashlib
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvstore.connectors.identity import digest_of_files
from kvstore.hashing import chunk_digests, scope_digest
from kvstore.types import Digest


class RequestKeys:
    """The chain of digests of one request, extended as its tokens become known. Thread-safe.

    *epoch* sets apart what was computed before a reset; it is empty until the first.
    """

    def __init__(self, request: Any, chunk_tokens: int, epoch: bytes) -> None:
        self._request = request
        self._chunk_tokens = chunk_tokens
        self._epoch = epoch
        self._digests: list[Digest] = []
        self._extending = threading.Lock()

    def up_to(self, chunks: int) -> list[Digest]:
        """Return the digests of the first *chunks* chunks, as far as there are tokens."""
        with self._extending:
            self._extend(chunks)
            return self._digests[:chunks]

    def before(self, chunk: int) -> Digest | None:
        """Return the digest before *chunk*, if it is not the first."""
        return self.up_to(chunk)[-1] if chunk else None

    def _extend(self, chunks: int) -> None:
        known = len(self._digests)
        if known < chunks:
            start, stop = known * self._chunk_tokens, chunks * self._chunk_tokens
            tokens = list(self._request.all_token_ids[start:stop])
            self._digests += chunk_digests(
                tokens,
                self._chunk_tokens,
                scope=self._digests[-1] if known else _scope(self._request, self._epoch),
                extras=[
                    _extras(self._request, first, first + self._chunk_tokens)
                    for first in range(start, start + len(tokens), self._chunk_tokens)
                ],
            )


def _scope(request: Any, epoch: bytes) -> Digest | None:
    lora = request.lora_request
    salt = (request.cache_salt or "").encode()
    if epoch:
        # Length first: no salt can be taken for another salt and an epoch.
        salt = len(salt).to_bytes(4, "little") + salt + epoch
    if lora is None:
        return scope_digest(salt=salt)
    return scope_digest(
        adapter=lora.lora_name, adapter_revision=_adapter_revision(lora.lora_path), salt=salt
    )


def _adapter_revision(path: str) -> str:
    """Return what stands for the weights of the adapter at *path*."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    times = tuple(sorted(file.stat().st_mtime_ns for file in folder.iterdir()))
    return _folder_revision(folder, times)


@lru_cache(maxsize=1024)
def _folder_revision(folder: Path, times: tuple[int, ...]) -> str:
    # What has no weights that are known of is only like itself, at this place and time.
    return digest_of_files(folder) or f"{folder} {times}"


def _extras(request: Any, start: int, stop: int) -> list[bytes]:
    """Return what tokens [start, stop) stand for besides their ids."""
    extras = [
        field
        for feature in request.mm_features
        if feature.mm_position.offset < stop
        and start < feature.mm_position.offset + feature.mm_position.length
        for field in (
            feature.identifier.encode(),
            (feature.mm_position.offset - start).to_bytes(8, "little", signed=True),
        )
    ]
    embeds = request.prompt_embeds
    if embeds is not None and start < len(embeds):
        extras.append(hashlib.sha256(_raw(embeds[start:stop])).digest())
    return extras


def _raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes())
