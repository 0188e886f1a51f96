"""Cache layers that begin with a stored prefix, and keep what is added so that it can be stored.

A full-attention layer appends in place, into room that was made for the whole prompt: nothing
is concatenated, so a loaded prefix is not copied again. A sliding layer forgets old tokens as
it must, but records new ones as they pass.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

HEADROOM_TOKENS: Final = 256

States = tuple[torch.Tensor, torch.Tensor]


def make_room(
    heads: int, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return an unfilled tensor `[1, heads, tokens, head_dim]` that any mode may write to."""
    # An inference tensor could not be written to outside of inference mode.
    with torch.inference_mode(mode=False):
        return torch.empty((1, heads, tokens, head_dim), dtype=dtype, device=device)


class FullLayer(DynamicLayer):
    """Full attention that appends in place while its room lasts, and then makes more."""

    def __init__(self, prompt_tokens: int) -> None:
        super().__init__()
        self._room_tokens = prompt_tokens + HEADROOM_TOKENS
        self._rooms: States | None = None

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        """Begin with the first *tokens* tokens of *keys* and *values*, and append behind them."""
        assert 0 < tokens <= keys.shape[-2], f"{tokens} tokens do not fit {tuple(keys.shape)}"
        self.lazy_initialization(keys, values)
        self._rooms = (keys, values)
        self.keys, self.values = keys[:, :, :tokens], values[:, :, :tokens]

    def states(self, side: str) -> tuple[torch.Tensor, int] | None:
        """Return the keys or values held and the position of the first; None when empty."""
        return (getattr(self, side), 0) if self.get_seq_length() else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> States:
        """Append the new states; return all keys and values, `[1, heads, tokens, head_dim]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        needs_graph = torch.is_grad_enabled() and key_states.requires_grad
        if needs_graph or key_states.dtype != self.dtype:
            # Nothing in place: a backward pass needs old states, and autocast promotes.
            self._rooms = None
            joined: States = super().update(key_states, value_states, *args, **kwargs)
            return joined
        keys, values = self._appendable(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]
        return self.keys, self.values

    def _appendable(self, key_states: torch.Tensor, value_states: torch.Tensor) -> States:
        """Return rooms that hold what is cached and have space for the new states behind it."""
        needed = self.get_seq_length() + key_states.shape[-2]
        if self._rooms is not None:
            held = _continues(self._rooms[0], self.keys, key_states, needed)
            if held and _continues(self._rooms[1], self.values, value_states, needed):
                return self._rooms
        tokens = max(self._room_tokens, needed + needed // 8 + HEADROOM_TOKENS)
        self._rooms = (
            _moved(self.keys, key_states, tokens),
            _moved(self.values, value_states, tokens),
        )
        return self._rooms


class SlidingLayer(DynamicSlidingWindowLayer):
    """Sliding attention that records every new token until `stop_recording`."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self._start = 0
        self._recorded: list[States] | None = []

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        """Begin at *tokens* tokens, the last of which are in *keys* and *values*."""
        self.lazy_initialization(keys, values)
        keep = self.sliding_window - 1
        # A window of one token keeps nothing, and [-0:] would keep everything.
        start = max(0, keys.shape[-2] - keep)
        self.keys, self.values = keys[:, :, start:], values[:, :, start:]
        self.cumulative_length = self._start = tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> States:
        """Append and record the new states; return what the window still sees."""
        if self._recorded is not None:
            self._recorded.append((key_states.detach(), value_states.detach()))
        result: States = super().update(key_states, value_states, *args, **kwargs)
        return result

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, also from the record."""
        super().crop(tokens_to_remove)
        if not tokens_to_remove or self._recorded is None:
            return
        kept = sum(keys.shape[-2] for keys, _ in self._recorded) + tokens_to_remove
        if kept < 0:
            # Tokens before the record went too: what comes next would be taken for them.
            self._recorded = None
        elif self._recorded:
            keys, values = (torch.cat(side, dim=-2) for side in zip(*self._recorded, strict=True))
            self._recorded = [(keys[:, :, :kept], values[:, :, :kept])]

    def reset(self) -> None:
        """Forget everything, the record too."""
        super().reset()
        self._recorded = None

    def states(self, side: str) -> tuple[torch.Tensor, int] | None:
        """Return the keys or values recorded and the position of the first; None when empty."""
        if not self._recorded:
            return None
        index = ("keys", "values").index(side)
        return torch.cat([pair[index] for pair in self._recorded], dim=-2), self._start

    def stop_recording(self) -> None:
        """Drop the record; what passes from now on is not kept."""
        self._recorded = None


def own_layer(layer: Any, prompt_tokens: int) -> Any:
    """Return the layer that stands in for *layer* of a fresh `DynamicCache`."""
    if type(layer) is DynamicSlidingWindowLayer:
        return SlidingLayer(layer.sliding_window)
    if type(layer) is DynamicLayer:
        return FullLayer(prompt_tokens)
    return layer


def _continues(room: torch.Tensor, held: torch.Tensor, states: torch.Tensor, needed: int) -> bool:
    """Whether *held* is still the beginning of *room*, and *states* fit behind it."""
    return bool(
        held.data_ptr() == room.data_ptr()
        and needed <= room.shape[-2]
        and room.shape[:2] == states.shape[:2]
    )


def _moved(held: torch.Tensor, states: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return new room for *tokens* tokens that begins with *held*."""
    with torch.inference_mode(mode=False):
        room = states.new_empty((*states.shape[:2], tokens, states.shape[3]))
    if held.numel():
        room[:, :, : held.shape[-2]] = held
    return room
