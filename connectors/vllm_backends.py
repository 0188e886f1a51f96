"""Which attention backends write pages of rows: `[block, head, token, keys then values]`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from kvstore.errors import KVStoreError

# They split the last axis of a page, or write latent vectors whole. Those of CPUs are tried.
_ROW_BACKENDS: Final = frozenset(
    {
        "CPU_ATTN",
        "CUTLASS_MLA",
        "FLASHINFER",
        "FLASHINFER_MLA",
        "FLASHMLA",
        "FLASH_ATTN",
        "FLASH_ATTN_MLA",
        "FLEX_ATTENTION",
        "TRITON_ATTN",
        "TRITON_MLA",
    }
)
ROWS: Final = "rows"
"""What all of them have in common, for an engine that chooses one of them itself."""


class UnknownBackendError(KVStoreError):
    """Nobody knows how this backend lays out its pages."""


def backend_name(vllm_config: Any) -> str:
    """Return the backend that was asked for, or what all those have in common that it may be."""
    asked = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    name = str(getattr(asked, "name", asked) or ROWS)
    return ROWS if name in _ROW_BACKENDS else name


def check_backends(
    vllm_config: Any, layers: Mapping[str, Any], names: Iterable[str], *, converted: bool
) -> None:
    """Raise `UnknownBackendError` when *layers* are written by a backend that is not understood.

    Pages that are not *converted* may be anybody's whose name is in their manifest.
    """
    asked = backend_name(vllm_config)
    for name in names:
        found = layers[name].get_attn_backend().get_name()
        if found in _ROW_BACKENDS or (not converted and found == asked):
            continue
        raise UnknownBackendError(
            f"the pages of {found} in layer {name} are not understood; set layout to "
            f'"opaque" in kv_connector_extra_config and start vLLM with --attention-backend {found}'
        )
