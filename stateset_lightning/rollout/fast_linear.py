"""Linear layers for decoding on a CPU: the weights are laid out once per sampling for a few rows at a time.

A decoding step multiplies a handful of rows with every weight. The stock kernel then reads float32 weights at a fraction of the
memory's speed; oneDNN with weights in its own layout is 1.5 to 2 times as fast, and layers that get the same input are faster as
one product (`benchmarks/RESULTS.md`). The layout is a copy of the weights, held while sampling, when there are no gradients or
activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

MAX_ROWS = 64
"""Inputs with more rows (a prefill) take the stock kernel, which is as fast there."""

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that many architectures give the same input, one after the other."""


def is_supported(module: nn.Module) -> bool:
    """Whether this torch has the operations, and the weights are float32 on a CPU (in lower precisions the stock kernel is oneDNN's)."""
    has_operations = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_operations and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in module.parameters())


@contextmanager
def fast_linears(model: nn.Module, num_rows: int) -> Iterator[None]:
    """Replaces the forward of every plain linear layer while the context lasts; weights must not change in it."""
    products = [_Product(linears, min(num_rows, MAX_ROWS)) for linears in _families(model)] if is_supported(model) else []
    try:
        for product in products:
            for index, linear in enumerate(product.linears):
                vars(linear)["forward"] = partial(product.forward, index)
        yield
    finally:
        for product in products:
            for linear in product.linears:
                vars(linear).pop("forward", None)


class _Product:
    """The outputs of layers with the same input, computed when the first of them is asked.

    Args:
        linears: In the order in which the model asks them.
        num_rows: Of the inputs that the layout is made for.
    """

    def __init__(self, linears: Sequence[nn.Linear], num_rows: int) -> None:
        self.linears = linears
        self.sizes = [linear.out_features for linear in linears]
        weight = torch.cat([linear.weight.detach() for linear in linears]) if len(linears) > 1 else linears[0].weight.detach()
        self.laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
        self.bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        self.input: Tensor | None = None
        self.outputs: Sequence[Tensor] = ()

    def forward(self, index: int, x: Tensor) -> Tensor:
        """The output of layer `index`."""
        linear = self.linears[index]
        is_few = x.numel() <= MAX_ROWS * linear.in_features
        if index == 0 and is_few:
            self.input, self.outputs = (
                x,
                torch.ops.mkldnn._linear_pointwise(x, self.laid_out, self.bias, "none", [], "").split(self.sizes, -1),
            )
        elif x is not self.input:
            return nn.functional.linear(x, linear.weight, linear.bias)
        return self.outputs[index]


def _families(model: nn.Module) -> list[list[nn.Linear]]:
    """Every plain linear layer once: siblings together, the others alone."""
    plain = {module: None for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)}
    families: list[list[nn.Linear]] = []
    for module in model.modules():
        for names in SIBLINGS:
            siblings = [child for child in (getattr(module, name, None) for name in names) if child in plain]
            if len(siblings) == len(names) and len({(linear.in_features, linear.bias is None) for linear in siblings}) == 1:
                families.append(siblings)
    taken = {linear for family in families for linear in family}
    return families + [[linear] for linear in plain if linear not in taken]
