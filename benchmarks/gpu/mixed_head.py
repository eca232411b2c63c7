"""A candidate for the head: products in half precision that accumulate and come out in float32, in larger chunks.

It gives what `stateset_lightning.policy.head` gives but for the rounding of the operands. On a CPU, where no product of
half precision comes out in float32, products run in `dtype` itself, to test the rest. Letters: T completion tokens,
H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stateset_lightning.policy import policy as policy_file
from stateset_lightning.policy.head import HeadOptions


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, float32; on a GPU without a pass over `total` of its own."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Tensor:
    logits = _product(hidden, weight.t())
    if bias is not None:
        logits += bias
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    return logits.div_(options.temperature) if options.temperature != 1.0 else logits


class MixedHead(torch.autograd.Function):
    """`apply(hidden_TH, weight_VH, bias_V, targets_T, options, dtype, chunk_tokens)` -> log-probs and entropies [T]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        options: HeadOptions,
        dtype: torch.dtype,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        half_TH, weight = hidden_TH.to(dtype), weight_VH.detach().to(dtype)
        logprobs_T = hidden_TH.new_empty(len(targets_T), dtype=torch.float32)
        entropies_T, normalisers_T = torch.empty_like(logprobs_T), torch.empty_like(logprobs_T)
        for start in range(0, len(targets_T), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = _logits(half_TH[chunk], weight, bias_V, options)
            normalisers_T[chunk] = logits.logsumexp(-1)
            logprobs_T[chunk] = logits.gather(-1, targets_T[chunk, None])[:, 0] - normalisers_T[chunk]
            p = (logits - normalisers_T[chunk, None]).exp_()
            entropies_T[chunk] = normalisers_T[chunk] - p.mul_(logits).sum(-1)
        ctx.save_for_backward(half_TH, weight_VH, bias_V, targets_T, normalisers_T, entropies_T)
        ctx.options, ctx.dtype, ctx.hidden_dtype, ctx.chunk_tokens = options, dtype, hidden_TH.dtype, chunk_tokens
        ctx.set_materialize_grads(False)
        return logprobs_T, entropies_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprobs_T, grad_entropies_T = grads
        half_TH, weight_VH, bias_V, targets_T, normalisers_T, entropies_T = ctx.saved_tensors
        options: HeadOptions = ctx.options
        weight = weight_VH.detach().to(ctx.dtype)
        grad_hidden_TH = torch.empty_like(half_TH, dtype=ctx.hidden_dtype) if ctx.needs_input_grad[0] else None
        grad_weight_VH = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for start in range(0, len(targets_T), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            logits = _logits(half_TH[chunk], weight, bias_V, options)
            capped = None if options.softcap is None else 1 - (logits * options.temperature / options.softcap).square()
            logp = logits.sub_(normalisers_T[chunk, None])
            p = logp.exp()
            # dH/dz = -p (log p + H);  d(log p_y)/dz = onehot - p. In place, since a pass over [T, V] costs what a
            # product does.
            if grad_entropies_T is None:
                grad = p.mul_(-grad_logprobs_T[chunk, None])  # type: ignore[index]
            else:
                grad = logp.add_(entropies_T[chunk, None]).mul_(-grad_entropies_T[chunk, None])
                if grad_logprobs_T is not None:
                    grad.sub_(grad_logprobs_T[chunk, None])
                grad.mul_(p)
            if grad_logprobs_T is not None:
                grad.scatter_add_(1, targets_T[chunk, None], grad_logprobs_T[chunk, None])
            if options.temperature != 1.0:
                grad /= options.temperature
            if capped is not None:
                grad *= capped
            if grad_bias_V is not None:
                grad_bias_V += grad.sum(0)
            half = grad.to(ctx.dtype)
            if grad_hidden_TH is not None:
                grad_hidden_TH[chunk] = _product(half, weight)
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, half.t(), half_TH[chunk])
        return (
            grad_hidden_TH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *(None,) * 4,
        )


@contextmanager
def installed(dtype: torch.dtype, chunk_tokens: int) -> Iterator[None]:
    """`Policy.score` uses this head while the context lasts."""
    original = policy_file.token_logprobs

    def token_logprobs(
        hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_T: Tensor, options: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden_TH, weight_VH, bias_V, targets_T, options, dtype, chunk_tokens)
        with torch.autocast(hidden_TH.device.type, enabled=False):
            logprobs_T, entropies_T = MixedHead.apply(*inputs)
        return logprobs_T, entropies_T

    policy_file.token_logprobs = token_logprobs
    try:
        yield
    finally:
        policy_file.token_logprobs = original
