"""The name of a model's weights: a commit of the hub, or a hash of their files."""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from pathlib import Path
from typing import Final

from kvstore.connectors.identity import digest_of_files
from kvstore.errors import KVStoreError

log = logging.getLogger(__name__)

_SLOW_SECONDS: Final = 5.0


class UnsupportedError(KVStoreError):
    """This engine's KV cannot be kept. The message says why and, if possible, what to do."""


def weights_name(model: str, revision: str | None) -> str:
    """Return what stands for the weights of *model*, a folder or a name on the hub.

    Folders are read once. Raises `UnsupportedError` for weights that cannot be told apart.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _hub_snapshot(model, revision)
    if folder.parent.name == "snapshots":
        return folder.name
    times = tuple(sorted(path.stat().st_mtime_ns for path in folder.iterdir()))
    if found := _hashed(folder, times):
        return found
    raise UnsupportedError(
        f"{folder} has no weight files that could be told apart by their bytes;"
        ' name them with "revision" in the connector\'s extra config'
    )


def _hub_snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  # only beside an engine

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise UnsupportedError(
            f"it is not known which weights {name!r} stands for;"
            ' name them with "revision" in the connector\'s extra config'
        )
    return Path(found).parent


@lru_cache(maxsize=8)
def _hashed(folder: Path, times: tuple[int, ...]) -> str:
    assert times, "an empty folder is no model"
    started = time.perf_counter()
    found = digest_of_files(folder)
    taken = time.perf_counter() - started
    if taken > _SLOW_SECONDS:
        log.warning(
            'reading the weights to name them took %.0f s; "revision" in the connector\'s'
            " extra config saves that",
            taken,
        )
    return found
