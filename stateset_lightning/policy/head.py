"""Log-probs and entropies of sampled tokens from hidden states, without ever holding all logits.

The last linear layer is applied to a chunk of tokens at a time and recomputed in the backward pass, so memory does not
grow with tokens x vocabulary. Softmax is float32 whatever the model's dtype. Letters: T sampled tokens, H hidden size,
V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class HeadOptions:
    """How hidden states become log-probs.

    Args:
        temperature: Divides the logits.
        softcap: A bound c of the logits, as c tanh(x / c), applied before the temperature.
        chunk_tokens: Tokens whose logits exist at a time. None: as many as fit in `CHUNK_BYTES`, at least 16.
    """

    temperature: float = 1.0
    softcap: float | None = None
    chunk_tokens: int | None = None

    def chunk(self, vocabulary: int) -> int:
        return self.chunk_tokens or max(16, CHUNK_BYTES // (4 * vocabulary))


def softcap(config: PretrainedConfig) -> float | None:
    """The bound of a model's logits, under the name that its family has for it; None without one."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None))), None)


def token_logprobs(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_T: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution (both in nats, float32 [T]), differentiable."""
    with torch.autocast(hidden_TH.device.type, enabled=False):
        hidden_TH = hidden_TH.to(weight_VH.dtype)
        return _ChunkedHead.apply(hidden_TH, weight_VH, bias_V, targets_T, options)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores within a bound, by c tanh(x / c)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Tensor:
    logits = capped(torch.nn.functional.linear(hidden, weight, bias).float(), options.softcap)
    return logits / options.temperature if options.temperature != 1.0 else logits


class _ChunkedHead(torch.autograd.Function):
    """Keeps the hidden states and two numbers per token; `backward` computes the logits again, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_T: Tensor, options: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        logprobs_T = hidden_TH.new_empty(len(targets_T), dtype=torch.float32)
        entropies_T, normalisers_T = torch.empty_like(logprobs_T), torch.empty_like(logprobs_T)
        for chunk in _chunks(len(targets_T), options.chunk(len(weight_VH))):
            logits = _logits(hidden_TH[chunk], weight_VH, bias_V, options)
            normalisers_T[chunk] = logits.logsumexp(-1)
            logprobs_T[chunk] = logits.gather(-1, targets_T[chunk, None])[:, 0] - normalisers_T[chunk]
            entropies_T[chunk] = normalisers_T[chunk] - (logits.softmax(-1).mul_(logits)).sum(-1)
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, targets_T, normalisers_T, entropies_T)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return logprobs_T, entropies_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden_TH, weight_VH, bias_V, targets_T, normalisers_T, entropies_T = ctx.saved_tensors
        options: HeadOptions = ctx.options
        grad_hidden_TH = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        # Summed in float32: in bfloat16 the sum over many chunks would lose most of its digits.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for chunk in _chunks(len(targets_T), options.chunk(len(weight_VH))):
            logits = _logits(hidden_TH[chunk], weight_VH, bias_V, options)
            incoming = [None if grad_T is None else grad_T[chunk] for grad_T in grads]
            grad = _grad_logits(logits - normalisers_T[chunk, None], targets_T[chunk], entropies_T[chunk], *incoming)
            if options.temperature != 1.0:
                grad /= options.temperature
            if options.softcap is not None:
                grad *= 1 - (logits * (options.temperature / options.softcap)).square()
            if grad_bias_V is not None:
                grad_bias_V += grad.sum(0)
            grad = grad.to(weight_VH.dtype)
            if grad_hidden_TH is not None:
                torch.mm(grad, weight_VH, out=grad_hidden_TH[chunk])
            if grad_weight_VH is not None:
                if grad_weight_VH.dtype == grad.dtype:
                    grad_weight_VH.addmm_(grad.t(), hidden_TH[chunk])
                else:
                    grad_weight_VH += grad.t() @ hidden_TH[chunk]
        return grad_hidden_TH, _cast(grad_weight_VH, weight_VH), _cast(grad_bias_V, bias_V), None, None


def _grad_logits(
    logp: Tensor, targets: Tensor, entropies: Tensor, grad_logprobs: Tensor | None, grad_entropies: Tensor | None
) -> Tensor:
    """d(log p_y)/dz = onehot - p;  dH/dz = -p (log p + H). Both scaled by the incoming gradients; float32."""
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(entropies)
    factor = -grad_logprobs[:, None]
    if grad_entropies is not None:
        factor = factor - (logp + entropies[:, None]) * grad_entropies[:, None]
    return logp.exp().mul_(factor).scatter_add_(1, targets[:, None], grad_logprobs[:, None])


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _cast(grad: Tensor | None, like: Any) -> Tensor | None:
    return None if grad is None else grad.to(like.dtype)
