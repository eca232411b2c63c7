"""Log-probs and entropies of sampled tokens from hidden states, without ever holding all logits.

The last linear layer is applied to some tokens, and on a GPU to a part of the vocabulary, at a time and recomputed in
the backward pass, so memory does not grow with tokens x vocabulary. From part to part go the log-sum-exp of the logits
and their mean (which is what entropy lacks). Softmax is float32 whatever the model's dtype. A teacher's logits, which
distributions may be compared with, come in the same chunks. Letters: T sampled tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from stateset_lightning.policy.sampling_mask import SamplingMask

if TYPE_CHECKING:
    from stateset_lightning.policy.policy import Group, Policy

CHUNK_BYTES = 64 * 2**20
# On a GPU fewer tokens would have every product wait for the head's weights, and their gradient, to be read: there all
# of this many tokens see a part of the vocabulary at a time.
GPU_CHUNK_TOKENS, GPU_CHUNK_BYTES = 4096, 128 * 2**20


# Of logits (or log-probs) [t, V] and the place of their tokens in a batch: the divergence from another distribution
# [t], and its gradient by the logits [t, V' <= V].
Comparison = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class HeadOptions:
    """How hidden states become log-probs.

    Args:
        temperature: Divides the logits.
        softcap: A bound c of the logits, as c tanh(x / c), applied before the temperature.
        chunk_tokens: Tokens whose logits exist at a time. None: on a CPU as many as fit in `CHUNK_BYTES`, at least 16;
            on a GPU `GPU_CHUNK_TOKENS`.
        dtype: Of the products. None: autocast's on a GPU, else that of the weights.
        mask: Of the tokens: their distributions are over what it keeps.
        comparison: What each distribution is compared with; it then sees all of the vocabulary at a time. Not beside a
            mask, which is no part of it (`training.teacher` refuses that).
    """

    temperature: float = 1.0
    softcap: float | None = None
    chunk_tokens: int | None = None
    dtype: torch.dtype | None = None
    mask: SamplingMask | None = None
    comparison: Comparison | None = None

    def chunk(self, vocabulary: int, is_on_gpu: bool = False) -> tuple[int, int]:
        """Tokens, and entries of the vocabulary, whose logits exist at a time."""
        if not is_on_gpu or self.comparison is not None:
            return self.chunk_tokens or max(16, CHUNK_BYTES // (4 * vocabulary)), vocabulary
        tokens = self.chunk_tokens or GPU_CHUNK_TOKENS
        return tokens, max(GPU_CHUNK_BYTES // (4 * tokens), 1)


def softcap(config: PretrainedConfig) -> float | None:
    """The bound of a model's logits, under the name that its family has for it; None without one."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None))), None)


def token_logprobs(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_T: Tensor, options: HeadOptions
) -> tuple[Tensor, ...]:
    """Log-prob of each target, entropy of each distribution (nats, float32 [T]) and, with a comparison, its divergence.

    All are differentiable.
    """
    dtype, device = options.dtype or weight_VH.dtype, hidden_TH.device.type
    if options.dtype is None and on_gpu(weight_VH) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return _ChunkedHead.apply(hidden_TH, weight_VH, bias_V, targets_T, replace(options, dtype=dtype))


def head_of(
    policy: "Policy", temperature: float, mask: SamplingMask | None = None, comparison: Comparison | None = None
) -> tuple[Tensor, Tensor | None, HeadOptions]:
    """Weight and bias of a policy's head, and how they make log-probs of hidden states."""
    head, asked = policy.model.get_output_embeddings(), policy.config.head_dtype
    is_rounded = head.weight.dtype.itemsize == 2 and not on_gpu(head.weight)
    dtype = torch.float32 if asked == "float32" or (asked is None and is_rounded) else None
    options = HeadOptions(temperature, policy.softcap, policy.config.head_chunk_tokens, dtype, mask, comparison)
    return head.weight, getattr(head, "bias", None), options


@torch.no_grad()
def compared_with(
    teacher: "Policy", groups: Sequence["Group"], temperature: float, divergence: Callable[..., tuple[Tensor, Tensor]]
) -> Comparison:
    """A comparison with a teacher's distributions at the same places; its logits, too, exist for a chunk at a time.

    Args:
        teacher: A model with the policy's tokenizer. Products are in the dtype of its weights, or its own `head_dtype`.
        groups: The completions.
        temperature: Divides its logits.
        divergence: Of log-probs from the teacher's, both [t, V]: value [t] and gradient by the logits [t, V].
    """
    outputs_TX = teacher.outputs(groups)

    def compare(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        theirs = outputs_TX[chunk].float() / temperature
        if teacher.uses_chunked_head:
            weight_VH, bias_V, options = head_of(teacher, temperature)
            dtype = options.dtype or weight_VH.dtype
            theirs = _logits(outputs_TX[chunk].to(dtype), weight_VH.to(dtype), bias_V, options)
        both = min(logits.shape[-1], theirs.shape[-1])  # models of one family may pad their vocabularies differently
        return divergence(logits[:, :both].log_softmax(-1), theirs[:, :both].to(logits.dtype).log_softmax(-1))

    return compare


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores within a bound, by c tanh(x / c)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def on_gpu(x: Tensor) -> bool:
    """Whether PyTorch has the kernels there that multiply half precision and sum and return float32."""
    return x.is_cuda and torch.version.hip is None


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The host does not wait, but for Apple's GPUs, where the copy may outlive its source."""
    return tensor.to(device, non_blocking=device.type != "mps")


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 at least. Sums that were rounded to half precision on the way would bias the gradient."""
    if on_gpu(a) and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Tensor:
    logits = _product(hidden, weight.t())
    if bias is not None:
        logits += bias
    logits = capped(logits, options.softcap)
    return logits.div_(options.temperature) if options.temperature != 1.0 else logits


class _ChunkedHead(torch.autograd.Function):
    """Keeps the hidden states and two numbers per token; `backward` computes the logits again, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_T: Tensor, options: HeadOptions
    ) -> tuple[Tensor, ...]:
        kept_TH = hidden_TH.to(options.dtype)
        normalisers_T = hidden_TH.new_full(targets_T.shape, -torch.inf, dtype=torch.float32)
        means_T, chosen_T = torch.zeros_like(normalisers_T), torch.zeros_like(normalisers_T)
        divergences: list[Tensor] = []
        for part, chunk, _, logits in _chunks(kept_TH, weight_VH, bias_V, options):
            if options.comparison is not None:
                divergences.append(options.comparison(logits, chunk)[0])
            logits = logits.float()
            columns, is_here = _within(part, targets_T[chunk])
            chosen_T[chunk] += torch.where(is_here, logits.gather(-1, columns[:, None])[:, 0], 0.0)
            largest = logits.amax(-1, keepdim=True)
            weights = (logits - largest).exp_()
            total = weights.sum(-1)
            normaliser, mean = largest[:, 0] + total.log(), weights.mul_(logits).sum(-1) / total
            merged = torch.logaddexp(normalisers_T[chunk], normaliser)
            means_T[chunk] = torch.lerp(means_T[chunk], mean, (normaliser - merged).exp())
            normalisers_T[chunk] = merged
        entropies_T = normalisers_T - means_T
        ctx.save_for_backward(kept_TH, weight_VH, bias_V, targets_T, normalisers_T, entropies_T)
        ctx.options, ctx.hidden_dtype = options, hidden_TH.dtype
        ctx.set_materialize_grads(False)
        return chosen_T - normalisers_T, entropies_T, *([torch.cat(divergences)] if divergences else [])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept_TH, weight_VH, bias_V, targets_T, normalisers_T, entropies_T = ctx.saved_tensors
        options: HeadOptions = ctx.options
        # Sums are float32: in bfloat16 those over many chunks would lose most of their digits.
        sums = torch.promote_types(kept_TH.dtype, torch.float32)
        grad_hidden_TH = torch.zeros_like(kept_TH, dtype=sums) if ctx.needs_input_grad[0] else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=sums) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=sums) if ctx.needs_input_grad[2] else None
        for part, chunk, weight, logits in _chunks(kept_TH, weight_VH, bias_V, options):
            incoming = [None if grad_T is None else grad_T[chunk] for grad_T in grads]
            targets, logp = _within(part, targets_T[chunk]), logits.float() - normalisers_T[chunk, None]
            grad = _grad_logits(logp, *targets, entropies_T[chunk], *incoming[:2]).to(logits.dtype)
            if options.comparison is not None and incoming[2] is not None:
                gradient = options.comparison(logits, chunk)[1]
                grad[:, : gradient.shape[1]] += incoming[2][:, None] * gradient
            if options.temperature != 1.0:
                grad /= options.temperature
            if options.softcap is not None:
                grad *= 1 - (logits * (options.temperature / options.softcap)).square()
            if grad_bias_V is not None:
                grad_bias_V[part] += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden_TH is not None:
                _add_product(grad_hidden_TH[chunk], grad, weight)
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH[part], grad.t(), kept_TH[chunk])
        grad_hidden_TH = None if grad_hidden_TH is None else grad_hidden_TH.to(ctx.hidden_dtype)
        return grad_hidden_TH, _cast(grad_weight_VH, weight_VH), _cast(grad_bias_V, bias_V), None, None


def _grad_logits(logp: Tensor, columns: Tensor, is_here: Tensor, entropies: Tensor, *grads: Tensor | None) -> Tensor:
    """d(log p_y)/dz = onehot - p;  dH/dz = -p (log p + H). Both scaled by the incoming gradients; float32."""
    grad_logprobs, grad_entropies = grads
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(entropies)
    factor = -grad_logprobs[:, None]
    if grad_entropies is not None:
        factor = torch.addcmul(factor - (entropies * grad_entropies)[:, None], logp, grad_entropies[:, None], value=-1)
    onehot = torch.where(is_here, grad_logprobs, 0.0)
    return logp.exp_().mul_(factor).scatter_add_(1, columns[:, None], onehot[:, None])


def _chunks(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, options: HeadOptions
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Parts of the vocabulary and, for each, of the tokens: both places, the part's weights, and the logits there."""
    tokens, columns = options.chunk(len(weight_VH), on_gpu(weight_VH))
    for part in _slices(len(weight_VH), columns):
        weight, bias = weight_VH[part].to(hidden_TH.dtype), None if bias_V is None else bias_V[part]
        for chunk in _slices(len(hidden_TH), tokens):
            logits = _logits(hidden_TH[chunk], weight, bias, options)
            if options.mask is not None:
                options.mask[chunk].exclude(logits, part.start)
            yield part, chunk, weight, logits


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _within(part: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the targets in a part of the vocabulary, and whether they are there; elsewhere any column."""
    columns, last = targets - part.start, part.stop - part.start - 1
    return columns.clamp(0, last), (columns >= 0) & (columns <= last)


def _cast(grad: Tensor | None, like: Any) -> Tensor | None:
    return None if grad is None else grad.to(like.dtype)
