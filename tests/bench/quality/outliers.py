"""Outliers in keys, as large models have them and small ones do not, without another output.

Keys of published models have a few channels 5 to 30 times larger than the rest, and constant
offsets. Here every pair of channels that rotates together gets a gain and some get an offset:
stored K' = g K + o. A query divided by g gives the same scores up to a constant per query,
which softmax does not see. The model's output stays what it was, so whatever changes it is
the codec's doing.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVELS: Final = (0, 8, 30)
"""The mean gain of the outlier pairs; 0 leaves keys alone."""

_OUTLIER_PAIRS: Final = 3
_OFFSET_PAIRS: Final = 2
_SPREAD: Final = 0.35

Floats = NDArray[np.float32]


class Outliers(NamedTuple):
    """Gain and offset of every channel, `[layer, kv_head, 1, head_dim]`."""

    gain: Floats
    offset: Floats

    def inject(self, keys: Floats) -> Floats:
        """Return *keys* `[layer, kv_head, token, head_dim]` as they would be stored."""
        return keys * self.gain + self.offset

    def undo(self, keys: Floats) -> Floats:
        """Return stored keys as the model's own queries expect them."""
        return (keys - self.offset) / self.gain


def make_outliers(level: int, keys: Floats, seed: int = 0) -> Outliers:
    """Return outliers of *level* for *keys* `[layer, kv_head, token, head_dim]`.

    Gains are log-normal, with three pairs a head from level / 2 to 1.5 level; two of the
    slowest pairs also get an offset of that many root mean squares of the head.
    """
    layers, heads, _, dim = keys.shape
    if level == 0:
        neutral = np.ones((layers, heads, 1, dim), np.float32)
        return Outliers(neutral, neutral * 0)
    chance = np.random.default_rng(seed)
    pairs = dim // 2
    gain = chance.lognormal(0.0, _SPREAD, (layers, heads, pairs))
    offset = np.zeros((layers, heads, pairs))
    rms = np.sqrt((keys.astype(np.float64) ** 2).mean(axis=(2, 3)))
    for layer, head in np.ndindex(layers, heads):
        chosen = chance.choice(pairs, _OUTLIER_PAIRS, replace=False)
        gain[layer, head, chosen] *= chance.uniform(level / 2, 1.5 * level, _OUTLIER_PAIRS)
        # The last pairs rotate slowest.
        slow = pairs - 1 - chance.choice(pairs // 4, _OFFSET_PAIRS, replace=False)
        offset[layer, head, slow] = level * rms[layer, head] * chance.choice([-1, 1], _OFFSET_PAIRS)
    return Outliers(_both_halves(gain), _both_halves(offset))


def _both_halves(pairs: NDArray[np.float64]) -> Floats:
    """Return a value per channel: pair i is channels i and i + D/2."""
    return np.concatenate((pairs, pairs), axis=-1)[:, :, None, :].astype(np.float32)
