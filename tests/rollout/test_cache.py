"""The preallocated cache against transformers' own, and what it refuses."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from stateset_lightning.errors import ConfigError
from stateset_lightning.rollout.cache import BufferLayer, make_cache


def states(rows: int, tokens: int, start: float) -> torch.Tensor:
    return start + torch.arange(rows * 2 * tokens * 3, dtype=torch.float32).reshape(rows, 2, tokens, 3)


def test_keys_and_values_are_those_written_so_far_in_order() -> None:
    layer = BufferLayer(capacity=6)
    first, second = states(2, 3, 0), states(2, 1, 1000)
    layer.update(first, -first)
    keys, values = layer.update(second, -second)
    assert torch.equal(keys, torch.cat([first, second], dim=2))
    assert torch.equal(values, -keys)
    assert layer.get_seq_length() == 4


def test_a_token_is_written_without_copying_the_others() -> None:
    layer = BufferLayer(capacity=6)
    before, _ = layer.update(states(2, 3, 0), states(2, 3, 0))
    after, _ = layer.update(states(2, 1, 0), states(2, 1, 0))
    assert before.data_ptr() == after.data_ptr()


def test_rows_can_be_repeated_reordered_and_dropped() -> None:
    layer = BufferLayer(capacity=5)
    first = states(3, 2, 0)
    layer.update(first, -first)
    layer.batch_select_indices(torch.tensor([2, 0, 0, 1]))
    second = states(4, 1, 1000)
    keys, values = layer.update(second, -second)
    assert torch.equal(keys, torch.cat([first[[2, 0, 0, 1]], second], dim=2))
    layer.batch_select_indices(torch.tensor([1]))
    assert torch.equal(layer.keys, keys[[1]])
    assert torch.equal(layer.values, values[[1]])


def test_repeated_rows_do_not_share_memory() -> None:
    layer = BufferLayer(capacity=3)
    layer.update(states(1, 1, 0), states(1, 1, 0))
    layer.batch_select_indices(torch.tensor([0, 0]))
    new = states(2, 1, 50)
    keys, _ = layer.update(new, new)
    assert torch.equal(keys[0, :, 1], new[0, :, 0])
    assert torch.equal(keys[1, :, 1], new[1, :, 0])


def test_rows_of_another_cache_join_at_the_same_column() -> None:
    layer, other = BufferLayer(capacity=4), BufferLayer(capacity=2)
    old, new = states(2, 3, 0), states(1, 2, 1000)
    layer.update(old, -old)
    other.update(new, -new)
    layer.join(other, first=1, column=4, capacity=6)  # of the old rows columns 1 and 2 are wanted: they move to 2 and 3
    assert layer.get_seq_length() == 4
    assert torch.equal(layer.keys[:2, :, 2:], old[:, :, 1:])
    assert torch.equal(layer.keys[2:, :, 2:], new)
    assert torch.equal(layer.values, -layer.keys)
    assert not layer.keys[:, :, :2].any()
    token = states(3, 1, 2000)
    keys, _ = layer.update(token, -token)
    assert torch.equal(keys[:, :, 4], token[:, :, 0])
    layer.update(token, -token)  # up to the capacity


def test_empty_rows_can_be_added_and_old_columns_go() -> None:
    layer = BufferLayer(capacity=3)
    old = states(2, 3, 0)
    layer.update(old, -old)
    layer.grow(rows=1, first=2, capacity=4)
    assert layer.get_seq_length() == 1
    assert torch.equal(layer.keys[:2], old[:, :, 2:])
    assert not layer.keys[2].any()
    token = states(3, 1, 2000)
    keys, values = layer.update(token, -token)
    assert torch.equal(keys[:, :, 1], token[:, :, 0])
    assert torch.equal(values, -keys)


def test_an_unused_layer_can_lose_rows() -> None:
    layer = BufferLayer(capacity=3)
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.get_seq_length() == 0


def test_outputs_equal_those_with_transformers_cache(make_model: Callable[..., Any], architecture: str) -> None:
    model = make_model(architecture)
    ids = torch.tensor([[20, 31, 42, 53, 64, 75, 86, 97, 108], [11, 22, 33, 44, 55, 66, 77, 88, 99]])
    ours, theirs = make_cache(model, capacity=9), DynamicCache(config=model.config)
    with torch.no_grad():
        for part in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 9)):
            expected = model(ids[:, part], past_key_values=theirs, use_cache=True).logits
            torch.testing.assert_close(
                model(ids[:, part], past_key_values=ours, use_cache=True).logits, expected, atol=1e-5, rtol=1e-5
            )
    assert [layer.get_seq_length() for layer in ours.layers] == [9, 9]


def test_dropping_rows_leaves_the_others_outputs_alone(make_model: Callable[..., Any], architecture: str) -> None:
    model = make_model(architecture)
    ids = torch.tensor([[20, 31, 42, 53, 64], [11, 22, 33, 44, 55], [100, 90, 80, 70, 60]])
    cache = make_cache(model, capacity=6)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([2, 0]))
        logits = model(torch.tensor([[7], [8]]), past_key_values=cache, use_cache=True).logits[:, -1]
        expected = model(torch.tensor([[*ids[2].tolist(), 7], [*ids[0].tolist(), 8]])).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_model_whose_layers_keep_something_else_is_refused() -> None:
    from transformers import CONFIG_MAPPING

    model = SimpleNamespace(config=CONFIG_MAPPING["deepseek_v32"](num_hidden_layers=2))
    with pytest.raises(ConfigError, match="DynamicIndexedLayer beside attention keys and values"):
        make_cache(model, 4)
