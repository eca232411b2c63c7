"""Norms and gated MLPs that keep less for the backward pass: what is cheap to compute is computed again there.

Plain PyTorch keeps every intermediate of a root-mean-square norm and of a gated MLP. The norm needs its input and one
number per token (arXiv:1910.07467); the gate needs its two inputs (SwiGLU, arXiv:2002.05202), and so does the layer
behind it: 20 kB less per token and layer at hidden size 512 and intermediate size 2048 in float32, two fifths of what a
layer keeps. The operations are those of the layers that are replaced, and a layer is replaced only where its output on
a probe is the same.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stateset_lightning.policy.head import on_gpu

HAS_FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm_backward")  # since PyTorch 2.9; without it 6 kernels


class _RootMeanSquareNorm(torch.autograd.Function):
    """w x / rms(x), computed in float32; keeps x, w and 1 / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x32 = x.float()
        inverse = x32.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return weight * (x32 * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad = grads[0].float()
        normed = x.float() * inverse
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        normed *= (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed).mul_(inverse).to(x.dtype), grad_weight, None


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if on_gpu(hidden_states) and HAS_FUSED_NORM and hidden_states.dtype == self.weight.dtype == torch.float32:
        # One kernel that keeps as little. In half precision it rounds once where the layers round twice.
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
    return _RootMeanSquareNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    if not torch.is_grad_enabled():
        return down(_gated(gate, up))
    # A checkpoint computes again up to the last input that the backward pass needs: not the product of a plain layer,
    # but that of one under an adapter.
    recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if type(down) is nn.Linear:
        return recomputed(lambda gate, up: down(_gated(gate, up)), gate, up)
    return down(recomputed(_gated, gate, up))


def use_recomputed_layers(model: nn.Module) -> int:
    """Replaces the forward of norms and gated MLPs that have one of the usual forms.

    Returns:
        The number of layers replaced.
    """
    found = [(module, forward) for module in model.modules() if (forward := _recomputed_forward(module)) is not None]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    same = [(module, forward) for module, forward in found if _is_same(module, forward, dtype)]
    for module, forward in same:
        vars(module)["forward"] = MethodType(forward, module)
    return len(same)


def _recomputed_forward(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """What could replace a layer's forward, judged by what the layer is made of."""
    if "forward" in vars(module) or len(signature(module.forward).parameters) != 1:
        return None  # somebody else's, or ours; or it takes more than its input, as gated norms do
    if hasattr(module, "variance_epsilon") and [name for name, _ in module.named_parameters()] == ["weight"]:
        return _norm_forward
    parts = {name: type(part).__name__ for name, part in module.named_children()}
    is_gated = parts.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    return _mlp_forward if is_gated and parts["act_fn"] in ("SiLU", "SiLUActivation") else None


@torch.no_grad()
def _is_same(module: Any, forward: Callable[[Any, Tensor], Tensor], dtype: torch.dtype) -> bool:
    """Whether both forwards give the same on a small input, but for rounding.

    The input has the model's `dtype`: some models keep the weights of norms in float32 beside others in bfloat16.
    """
    weight = module.weight if hasattr(module, "weight") else module.gate_proj.weight
    if not weight.is_floating_point():
        return False  # quantized: neither its shape nor its dtype is that of the layer
    x = torch.linspace(-2, 3, 3 * weight.shape[-1], device=weight.device, dtype=torch.float32).view(1, 3, -1).to(dtype)
    try:
        expected, output = module(x), forward(module, x)
    except Exception:  # it is another kind of layer than its parts say
        return False
    return output.dtype == expected.dtype and torch.allclose(output.float(), expected.float(), rtol=1e-5, atol=1e-6)
