"""Linear layers for decoding on a CPU: the weights are laid out once per sampling for a few rows at a time.

A decoding step multiplies a handful of rows with every weight. The stock kernel then reads float32 weights at a
fraction of the memory's speed; oneDNN with weights in its own layout is 1.5 to 2 times as fast
(`benchmarks/RESULTS.md`). The layout is a copy of the weights, held while sampling, when there are no gradients or
activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

MAX_ROWS = 64
"""Inputs with more rows (a prefill) take the stock kernel, which is as fast there."""


def is_supported(module: nn.Module) -> bool:
    """Whether this torch has the operations, and the weights are float32 on a CPU (in lower precisions the stock kernel
    is oneDNN's).
    """
    has_operations = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_operations and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in module.parameters())


@contextmanager
def fast_linears(model: nn.Module, num_rows: int) -> Iterator[None]:
    """Replaces the forward of every plain linear layer while the context lasts; weights must not change in it."""
    plain = (
        [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)] if is_supported(model) else []
    )
    try:
        for linear in plain:
            laid_out = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), min(num_rows, MAX_ROWS))
            vars(linear)["forward"] = partial(_forward, linear, laid_out)
        yield
    finally:
        for linear in plain:
            vars(linear).pop("forward", None)


def _forward(linear: nn.Linear, laid_out: Tensor, x: Tensor) -> Tensor:
    if x.numel() > MAX_ROWS * linear.in_features:
        return nn.functional.linear(x, linear.weight, linear.bias)
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid_out, linear.bias, "none", [], "")
    return output
