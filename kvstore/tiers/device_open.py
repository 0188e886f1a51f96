"""How the device tier is opened: a pool on one GPU. CUDA is imported by nobody else here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.errors import ConfigError
from kvstore.gpu.cupy_device import open_device
from kvstore.gpu.device import DeviceError, DeviceMemoryError
from kvstore.gpu.standin import Standin
from kvstore.limits import EXTENT_ALIGNMENT_BYTES
from kvstore.tiers.device import DeviceTier

if TYPE_CHECKING:
    from kvstore.gpu.device import Device

log = logging.getLogger(__name__)

STANDIN: Final = "standin"


def open_device_tier(gpu: str, capacity_bytes: int) -> DeviceTier:
    """Return a tier of *capacity_bytes* on GPU number *gpu*, or on the stand-in for one.

    Blocking: CUDA takes its time. Raises `ConfigError` without that GPU, or room on it.
    """
    device = _open(gpu)
    try:
        pool = device.pools().make(capacity_bytes - capacity_bytes % EXTENT_ALIGNMENT_BYTES)
    except DeviceMemoryError as error:
        raise ConfigError(f"tiers.device.capacity is {capacity_bytes} bytes: {error}") from error
    except DeviceError as error:
        raise ConfigError(f"tiers.device: its memory cannot be shared: {error}") from error
    try:
        tier = DeviceTier(device, pool)
    except DeviceError as error:
        pool.close()
        raise ConfigError(f"tiers.device: {error}") from error
    by = "handle" if pool.exported.handle else "descriptor"
    log.info("device memory", extra={"device": device.name, "by": by, "bytes": pool.size_bytes})
    return tier


def _open(gpu: str) -> Device:
    if gpu == STANDIN:
        return Standin(np.random.default_rng(0), eager=True)
    # Engines launch kernels on the pool; the daemon copies.
    device = open_device(int(gpu), launches=False)
    if device is None:
        raise ConfigError(
            f"tiers.device.gpu is {gpu}, and there is no such GPU, or no CuPy for it: "
            "pip install 'kvstore[cuda12]' or 'kvstore[cuda13]'"
        )
    return device
