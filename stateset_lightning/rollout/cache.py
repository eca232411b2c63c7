"""A key-value cache in preallocated buffers: a token is written in place, finished rows leave by compaction.

The stock dynamic cache concatenates, which copies everything once per token and layer. Letters: B rows, C capacity in tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from stateset_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BufferLayer(DynamicLayer):
    """Keys and values [B, heads, C, d] of one attention layer; `keys` and `values` are views of what has been written.

    A sliding-window layer keeps all its keys as well: the mask, which transformers derives from positions, hides the old ones.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values behind the old ones and returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.key_buffer is None or self.value_buffer is None:
            self.key_buffer = _allocate(key_states, self.capacity)
            self.value_buffer = _allocate(value_states, self.capacity)
        end = self.length + key_states.shape[2]
        self.key_buffer[:, :, self.length : end] = key_states
        self.value_buffer[:, :, self.length : end] = value_states
        self.length = end
        return self._view()

    def get_seq_length(self) -> int:
        return self.length

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was. Rows may repeat: that is how a prompt's cache becomes its group's."""
        if self.key_buffer is not None and self.value_buffer is not None:
            self.key_buffer = _select(self.key_buffer, rows, self.length)
            self.value_buffer = _select(self.value_buffer, rows, self.length)
            self._view()

    def _view(self) -> tuple[Tensor, Tensor]:
        assert self.key_buffer is not None
        assert self.value_buffer is not None
        self.keys = self.key_buffer[:, :, : self.length]
        self.values = self.value_buffer[:, :, : self.length]
        return self.keys, self.values


def make_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """An empty cache for `capacity` tokens per row.

    Raises:
        ConfigError: If the model has layers whose state is not keys and values of attention (recurrent ones, say).
    """
    cache = DynamicCache(config=model.config)
    others = {type(layer).__name__ for layer in cache.layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if others:
        raise ConfigError(
            f"{type(model).__name__} keeps {', '.join(sorted(others))} beside attention keys and values: the in-process engine "
            "samples from full and sliding-window attention only; choose another model"
        )
    # A model without a layer list in its config grows its cache as layers ask for it.
    num_layers = len(cache.layers) or model.config.num_hidden_layers
    cache.layers = [BufferLayer(capacity) for _ in range(num_layers)]
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keeps, drops or repeats rows of every layer."""
    for layer in cache.layers:
        layer.select(rows)


def _allocate(states: Tensor, capacity: int) -> Tensor:
    return states.new_empty(states.shape[0], states.shape[1], capacity, states.shape[3])


def _select(buffer: Tensor, rows: Tensor, length: int) -> Tensor:
    selected = buffer.new_empty(len(rows), *buffer.shape[1:])
    selected[:, :, :length] = buffer[:, :, :length].index_select(0, rows)
    return selected
