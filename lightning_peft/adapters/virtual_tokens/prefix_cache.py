"""Key-value caches that put a prefix before the keys and values of attention, and store nothing of it.

What is stored, reordered and cropped is the user's own cache, so that every kind of it works, and beam search too.
Imports transformers: to be imported once there is a transformers model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from lightning_peft.errors import PEFTError


class ShiftedCache(Cache):
    """What a decoder sees: a cache in which ``shift`` more positions are taken, for masks and position ids."""

    def __init__(self, inner: Any, shift: int, config: Any) -> None:
        # Not Cache.__init__: the layers are those of the cache behind it.
        self.stored = inner
        self.inner = DynamicCache(config=config) if inner is None else inner
        self.layers = self.inner.layers
        self.shift = shift

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store keys and values ``[batch, heads, tokens, head_dim]``, if a cache is wanted; return all stored ones."""
        if self.stored is None:
            return key_states, value_states
        return self.stored.update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions taken."""
        return self.shift + self.inner.get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the next query."""
        return self.shift + self.inner.get_query_offset(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys, and the position of the first one."""
        length, offset = self.inner.get_mask_sizes(query_length, layer_idx)
        return (length, self.shift + offset) if self._slid(query_length, layer_idx) else (self.shift + length, offset)

    def _slid(self, query_length: int, layer_idx: int) -> bool:
        """Whether a sliding window has left its first token behind, and with it the prefix."""
        return bool(self.inner.get_mask_sizes(query_length, layer_idx)[1] > 0)

    def before(self, prefix: Tensor, query_length: int, layer_idx: int) -> Tensor:
        """Return those of the keys or values ``prefix`` ``[heads, tokens, head_dim]`` that the layer still sees."""
        return prefix[:, :0] if self._slid(query_length, layer_idx) else prefix


class PrefixedCache(Cache):
    """What one attention block sees: a cache whose ``update`` puts the prefix before what it returns."""

    def __init__(self, inner: ShiftedCache | None, keys: Tensor, values: Tensor) -> None:
        self.inner = inner
        self.layers = [] if inner is None else inner.layers
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Return keys and values ``[batch, heads, prefix + tokens, head_dim]``."""
        keys, values, length = self.keys, self.values, key_states.shape[-2]
        if self.inner is not None:
            keys, values = (self.inner.before(prefix, length, layer_idx) for prefix in (keys, values))
            key_states, value_states = self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        return _joined(keys, key_states), _joined(values, value_states)


def _joined(prefix: Tensor, states: Tensor) -> Tensor:
    heads, _, width = prefix.shape
    if states.shape[1] != heads or states.shape[-1] != width:
        raise PEFTError(
            f"PrefixTuning: the prefix has {heads} heads of width {width}, but attention has keys or values of shape "
            f"{list(states.shape)}. This attention cannot take a prefix; take another method."
        )
    return torch.cat([prefix.to(states.dtype).expand(len(states), -1, -1, -1), states], dim=-2)
