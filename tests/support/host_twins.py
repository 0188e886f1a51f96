"""The kernels themselves in place of their twins: built for the host, and run by the stand-in."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from kvstore.gpu.cupy_device import SOURCES_OF
from kvstore.gpu.twins import MemoryAt, Step, Twin
from tests.support.kernels import BLOCKS, build_host_library


class HostTwins(dict[str, Twin]):
    """What runs each kernel as a GPU would, built when it is first asked for.

    Addresses of a stand-in are those of the host. Skips the test where there is no g++.
    """

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._factory = factory

    def __missing__(self, kernel: str) -> Twin:
        library = build_host_library(SOURCES_OF[kernel.partition("_")[0]], self._factory)
        address = ctypes.cast(getattr(library, kernel), ctypes.c_void_p)

        def twin(batch: np.ndarray[Any, np.dtype[Any]], _memory: MemoryAt) -> list[Step]:
            def run() -> None:
                argument = ctypes.c_void_p(batch.ctypes.data)
                library.host_launch(address, ctypes.c_uint(BLOCKS), argument)

            return [run]

        self[kernel] = twin
        return twin
