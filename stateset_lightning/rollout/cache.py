"""A key-value cache in preallocated buffers: a token is written in place, finished rows leave by compaction.

The stock dynamic cache concatenates, which copies everything once per token and layer. Letters: B rows, C capacity in
tokens.
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

    A sliding-window layer keeps all its keys as well: the mask, which transformers derives from positions, hides the
    old ones.
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

    def join(self, other: BufferLayer, first: int, column: int, capacity: int) -> None:
        """Adds the rows of another layer. Columns from `first` on move so that those of both layers end before
        `column`.
        """
        (keys, values), (added_keys, added_values) = self._view(), other._view()
        self.key_buffer = _join(keys[:, :, first:], added_keys, column, capacity)
        self.value_buffer = _join(values[:, :, first:], added_values, column, capacity)
        self.length = column
        self._view()

    def grow(self, rows: int, first: int, capacity: int) -> None:
        """Adds empty rows, and lets the columns before `first` go."""
        keys, values = (x[:, :, first:] for x in self._view())
        empty = keys.new_empty(rows, keys.shape[1], 0, keys.shape[3])
        self.length -= first
        self.key_buffer = _join(keys, empty, self.length, capacity)
        self.value_buffer = _join(values, empty, self.length, capacity)
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
    others = {
        type(layer).__name__ for layer in cache.layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    }
    if others:
        raise ConfigError(
            f"{type(model).__name__} keeps {', '.join(sorted(others))} beside attention keys and values: the in-process"
            " engine samples from full and sliding-window attention only; choose another model"
        )
    # A model without a layer list in its config grows its cache as layers ask for it.
    num_layers = len(cache.layers) or model.config.num_hidden_layers
    cache.layers = [BufferLayer(capacity) for _ in range(num_layers)]
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keeps, drops or repeats rows of every layer."""
    for layer in cache.layers:
        layer.select(rows)


def join(cache: DynamicCache, other: DynamicCache, first: int, column: int, capacity: int) -> None:
    """Adds the rows of `other` to `cache`, layer by layer; see `BufferLayer.join`. `other` is used up."""
    for layer, added in zip(cache.layers, other.layers, strict=True):
        layer.join(added, first, column, capacity)
        added.key_buffer = added.value_buffer = None  # so that the peak is one layer above the two caches' size


def grow(cache: DynamicCache, rows: int, first: int, capacity: int) -> None:
    """Adds empty rows to every layer; see `BufferLayer.grow`."""
    for layer in cache.layers:
        layer.grow(rows, first, capacity)


def _join(rows: Tensor, added: Tensor, column: int, capacity: int) -> Tensor:
    joined = rows.new_empty(len(rows) + len(added), rows.shape[1], capacity, rows.shape[3])
    # What a row does not fill is masked, but must be finite: masked weights are zero, and zero times NaN is NaN.
    joined[:, :, :column].zero_()
    joined[: len(rows), :, column - rows.shape[2] : column] = rows
    joined[len(rows) :, :, column - added.shape[2] : column] = added
    return joined


def _allocate(states: Tensor, capacity: int) -> Tensor:
    return states.new_empty(states.shape[0], states.shape[1], capacity, states.shape[3])


def _select(buffer: Tensor, rows: Tensor, length: int) -> Tensor:
    selected = buffer.new_empty(len(rows), *buffer.shape[1:])
    selected[:, :, :length] = buffer[:, :, :length].index_select(0, rows)
    return selected
