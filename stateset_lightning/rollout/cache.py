"""A key-value cache in preallocated buffers: a new token is written in place, finished rows are removed by copying.

Transformers' own dynamic cache concatenates, which copies everything once per token and layer. The states of recurrent
layers, which do not grow, are kept as transformers keeps them. Letters: B rows, C capacity in tokens, d size of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils

from stateset_lightning.errors import ConfigError


class BufferLayer(cache_utils.DynamicLayer):
    """Keys and values [B, heads, C, d] of one attention layer; `keys` and `values` are views of what has been written.

    A sliding-window layer keeps all its keys as well: the mask, which transformers derives from positions, hides the
    old ones.

    Args:
        capacity: Tokens per row that the buffers have room for.
    """

    def __init__(self, capacity: int, **kwargs: Any) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.buffers: list[Tensor] = []  # keys and values, once there are any

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new keys and values behind the old ones and returns all of them."""
        states = key_states, value_states
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [new.new_empty(*new.shape[:2], self.capacity, new.shape[3]) for new in states]
        start, self.length = self.length, self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, states, strict=True):
            buffer[:, :, start : self.length] = new
        self._update_views()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Makes row i what row `indices[i]` was. Rows may repeat: so a prompt's cache becomes that of its group."""
        self.buffers = [_select(buffer, indices, self.length) for buffer in self.buffers]
        self._update_views()

    def join(self, other: "BufferLayer", first: int, column: int, capacity: int) -> None:
        """Adds the rows of another layer, which loses them.

        Args:
            other: The layer.
            first: Columns of this layer before it are dropped.
            column: The columns of both layers move so that they end before it.
            capacity: Of the new buffers.
        """
        mine = [buffer[:, :, first : self.length] for buffer in self.buffers]
        added = [buffer[:, :, : other.length] for buffer in other.buffers]
        self.buffers = [_join(*pair, column, capacity) for pair in zip(mine, added, strict=True)]
        del other.buffers, other.keys, other.values  # so that the peak is one layer above the size of both caches
        self.length = column
        self._update_views()

    def fill(self, states: Sequence[Tensor], length: int) -> None:
        """Takes keys and values as they are, of which so many columns are written."""
        self.lazy_initialization(*states)
        self.buffers, self.length = list(states), length
        self._update_views()

    def grow(self, rows: int, first: int, capacity: int) -> None:
        """Adds empty rows, and drops the columns before `first`."""
        empty = BufferLayer(0)
        empty.buffers = [x.new_empty(rows, x.shape[1], 0, x.shape[3]) for x in self.buffers]
        self.join(empty, first, self.length - first, capacity)

    def _update_views(self) -> None:
        if self.buffers:
            self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


class StateLayer(cache_utils.LinearAttentionLayer):
    """The states of a recurrent layer: convolutions' last inputs, and what has been summed up. They have no columns."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `BufferLayer.batch_select_indices`."""
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: state.index_select(0, indices) for i, state in states.items() if state is not None})

    def join(self, other: "StateLayer", first: int, column: int, capacity: int) -> None:
        """See `BufferLayer.join`."""
        for states, added in ((self.conv_states, other.conv_states), (self.recurrent_states, other.recurrent_states)):
            states.update({i: torch.cat([state, added[i]]) for i, state in states.items() if state is not None})


class StateAndBufferLayer(StateLayer, cache_utils.LinearAttentionAndFullAttentionLayer, BufferLayer):
    """A layer that is both: attention, with or without a window, beside a recurrence."""

    def __init__(self, capacity: int, number_of_states: int) -> None:
        BufferLayer.__init__(self, capacity)
        cache_utils.LinearAttentionLayer.__init__(self, number_of_states)

    def batch_select_indices(self, indices: Tensor) -> None:
        for kind in (StateLayer, BufferLayer):
            kind.batch_select_indices(self, indices)

    def join(self, other: "StateAndBufferLayer", first: int, column: int, capacity: int) -> None:
        for kind in (StateLayer, BufferLayer):
            kind.join(self, other, first, column, capacity)


class EmptyLayer(cache_utils.DummyLayer):
    """Of a layer that has nothing to remember, such as one of experts alone."""

    def join(self, other: "EmptyLayer", first: int, column: int, capacity: int) -> None:
        """There is nothing to join."""


# In place of transformers' layers.
OURS: dict[type, type[BufferLayer | StateLayer | EmptyLayer]] = {
    cache_utils.DynamicLayer: BufferLayer,
    cache_utils.DynamicSlidingWindowLayer: BufferLayer,
    cache_utils.LinearAttentionLayer: StateLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer: StateAndBufferLayer,
    cache_utils.LinearAttentionAndSlidingWindowAttentionLayer: StateAndBufferLayer,
    cache_utils.DummyLayer: EmptyLayer,
}
# Attributes of modules that keep states of rows themselves, as RecurrentGemma's do.
MODULE_STATES = ("conv1d_state", "recurrent_states")


def make_cache(model: PreTrainedModel, capacity: int) -> cache_utils.DynamicCache:
    """An empty cache for `capacity` tokens per row.

    Raises:
        ConfigError: If the model has layers that keep something else than attention's keys and values or the states of
            transformers' recurrent layers.
    """
    cache = cache_utils.DynamicCache(config=model.config)
    if others := sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in OURS}):
        kept = f"{', '.join(others)} beside attention keys and values"
        raise ConfigError(f"{type(model).__name__} keeps {kept}, which this cannot")
    # A model without a layer list in its config grows its cache as layers ask for it.
    layers = cache.layers or [cache_utils.DynamicLayer()] * model.config.get_text_config().num_hidden_layers
    sizes = [{"capacity": capacity, "number_of_states": getattr(layer, "number_of_states", 1)} for layer in layers]
    cache.layers = [OURS[type(layer)](**size) for layer, size in zip(layers, sizes, strict=True)]
    if modules := modules_with_states(model):
        cache.layers.append(StateLayer(len(modules)))
    return cache


def modules_with_states(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Modules with an attribute of `MODULE_STATES`, and its name. A cache keeps these states in one more layer."""
    return [(module, name) for module in model.modules() for name in MODULE_STATES if name in vars(module)]


def _join(rows: Tensor, added: Tensor, column: int, capacity: int) -> Tensor:
    joined = rows.new_empty(len(rows) + len(added), rows.shape[1], capacity, rows.shape[3])
    # What a row does not fill is masked, but must be finite: masked weights are zero, and zero times NaN is NaN.
    joined[:, :, :column].zero_()
    joined[: len(rows), :, column - rows.shape[2] : column] = rows
    joined[len(rows) :, :, column - added.shape[2] : column] = added
    return joined


def _select(buffer: Tensor, rows: Tensor, length: int) -> Tensor:
    selected = buffer.new_empty(len(rows), *buffer.shape[1:])
    selected[:, :, :length] = buffer[:, :, :length].index_select(0, rows)
    return selected
