"""Linear layers laid out for decoding: the same numbers, and gone without a trace afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stateset_lightning.rollout.fast_linear import MAX_ROWS, fast_linears, is_supported


def make_layers() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Linear(48, 32), nn.SiLU(), nn.Linear(32, 24, bias=False))
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layers


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5, 16, MAX_ROWS, MAX_ROWS + 1, 200])
def test_outputs_are_those_of_the_stock_layers(rows: int) -> None:
    layers = make_layers()
    x = torch.randn(rows, 1, 48, generator=torch.Generator().manual_seed(1))
    expected = layers(x)
    with fast_linears(layers, num_rows=16):
        assert "forward" in vars(layers[0])
        torch.testing.assert_close(layers(x), expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_stock_forward_comes_back_after_an_error() -> None:
    layers = make_layers()
    with pytest.raises(KeyError), fast_linears(layers, num_rows=4):
        raise KeyError
    assert all("forward" not in vars(layer) for layer in layers)
    layers[0].weight.data.zero_()
    layers[0].bias.data.zero_()
    assert layers(torch.ones(1, 48)).abs().max() == 0  # and sees the weights as they are now


@torch.no_grad()
def test_other_layers_and_precisions_are_left_alone() -> None:
    class Adapted(nn.Linear):
        pass

    layers = nn.Sequential(Adapted(8, 8), nn.Linear(8, 8))
    with fast_linears(layers, num_rows=4):
        assert "forward" not in vars(layers[0])
        assert "forward" in vars(layers[1])
    assert not is_supported(make_layers().to(torch.bfloat16))
    with fast_linears(half := make_layers().to(torch.bfloat16), num_rows=4):
        assert "forward" not in vars(half[0])
