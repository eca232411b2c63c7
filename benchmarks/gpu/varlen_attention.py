"""A candidate for the packed attention: two variable-length flash calls per layer, no copied prompts and no padding.

    prompt 1 | completion 1.1 | completion 1.2 | ... | prompt 2 | completion 2.1 | ...

First call: every prompt and every completion is a causal sequence of its own. Second call: the completions of a prompt,
one behind the other, are one sequence of queries to the prompt's keys, not causal. Their log-sum-exps merge the two
into one softmax. The backward kernels get the merged output and log-sum-exp, which makes each call's part of the
gradient exact (as in ring attention): nothing is computed twice.

The kernels are PyTorch's own (half precision, grouped heads, head dimension up to 256). On a CPU and in float32 plain
products compute the same, sequence by sequence, to test the scheme. Letters: S tokens of the packed sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stateset_lightning.policy import packed_attention

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Spans:
    """Sequences one behind the other, as the kernel wants them: int32 cumulative lengths and the longest length."""

    cumulative: Tensor
    longest: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Spans:
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(ends.to(device), max(lengths, default=0), tuple(lengths))


@dataclass(frozen=True)
class Layout:
    """Where prompts and completions lie in the packed sequence."""

    sequences: Spans  # prompts and completions in their order
    prompts: Spans
    queries: Spans  # completion tokens of each prompt
    prompt_places: Tensor
    completion_places: Tensor

    @classmethod
    def of(
        cls, prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], device: torch.device
    ) -> Layout:
        lengths: list[int] = []
        is_prompt: list[bool] = []
        for prompt, completions in zip(prompt_lengths, completion_lengths, strict=True):
            lengths += [prompt, *completions]
            is_prompt += [True] + [False] * len(completions)
        is_prompt_S = torch.tensor(is_prompt).repeat_interleave(torch.tensor(lengths))
        places_S = torch.arange(len(is_prompt_S))
        return cls(
            Spans.of(lengths, device),
            Spans.of(prompt_lengths, device),
            Spans.of([sum(lengths) for lengths in completion_lengths], device),
            places_S[is_prompt_S].to(device),
            places_S[~is_prompt_S].to(device),
        )


def forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [S, heads, d] and log-sum-exp, float32 [heads, S]."""
    if q.is_cuda and q.dtype in HALF:
        spans = (queries.cumulative, keys.cumulative, queries.longest, keys.longest)
        out = torch.ops.aten._flash_attention_forward(q, k, v, *spans, 0.0, causal, False, scale=scale)
        return out[0], out[1]
    outputs, normalisers = [], []
    for q_i, k_i, v_i in zip(q.split(queries.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True):
        scores = _scores(q_i, k_i, causal, scale)
        normaliser = scores.logsumexp(-1)
        values = _repeated(v_i, q.shape[1]).to(scores.dtype)
        outputs.append(torch.einsum("hqk,khd->qhd", (scores - normaliser[..., None]).exp(), values))
        normalisers.append(normaliser)
    return torch.cat(outputs).to(q.dtype), torch.cat(normalisers, 1)


def backward_kernel(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    normalisers: Tensor,
    queries: Spans,
    keys: Spans,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from the merged output and log-sum-exp."""
    if q.is_cuda and q.dtype in HALF:
        spans = (queries.cumulative, keys.cumulative, queries.longest, keys.longest)
        no_dropout = (torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, normalisers.contiguous(), *spans, 0.0, causal, *no_dropout, scale=scale
        )
    columns = zip(
        *(x.split(queries.lengths) for x in (grad, q, out)),
        normalisers.split(queries.lengths, 1),
        *(x.split(keys.lengths) for x in (k, v)),
        strict=True,
    )
    grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for grad_i, q_i, out_i, normaliser, k_i, v_i in columns:
        p = (_scores(q_i, k_i, causal, scale) - normaliser[..., None]).exp()
        g, repeated_k, repeated_v = (
            x.to(p.dtype) for x in (grad_i, _repeated(k_i, q.shape[1]), _repeated(v_i, q.shape[1]))
        )
        grad_p = torch.einsum("qhd,khd->hqk", g, repeated_v)
        grad_scores = p * (grad_p - (g * out_i.to(p.dtype)).sum(-1).t()[..., None]) * scale
        grads[0].append(torch.einsum("hqk,khd->qhd", grad_scores, repeated_k))
        grads[1].append(_summed(torch.einsum("hqk,qhd->khd", grad_scores, q_i.to(p.dtype)), k.shape[1]))
        grads[2].append(_summed(torch.einsum("hqk,qhd->khd", p, g), k.shape[1]))
    dq, dk, dv = (torch.cat(parts).to(like.dtype) for parts, like in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _summed(x: Tensor, key_heads: int) -> Tensor:
    return x.unflatten(1, (key_heads, -1)).sum(2)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), _repeated(k, q.shape[1]).to(dtype)) * scale
    if causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~past, -torch.inf)
    return scores


class SharedPromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        out, normalisers = forward_kernel(q, k, v, layout.sequences, layout.sequences, True, scale)
        places = layout.completion_places
        if len(places):
            prompt_k, prompt_v = (x.index_select(0, layout.prompt_places) for x in (k, v))
            to_prompt, prompt_normalisers = forward_kernel(
                q.index_select(0, places), prompt_k, prompt_v, layout.queries, layout.prompts, False, scale
            )
            to_itself, own_normalisers = out.index_select(0, places), normalisers.index_select(1, places)
            merged = torch.logaddexp(own_normalisers, prompt_normalisers)
            weight = (own_normalisers - merged).exp().t()[..., None]
            mixed = torch.lerp(to_prompt.to(weight.dtype), to_itself.to(weight.dtype), weight)
            out = out.index_copy(0, places, mixed.to(out.dtype))
            normalisers = normalisers.index_copy(1, places, merged)
        ctx.save_for_backward(q, k, v, out, normalisers)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, normalisers = ctx.saved_tensors
        layout, (grad,) = ctx.layout, grads
        sequences = (layout.sequences, layout.sequences, True, ctx.scale)
        dq, dk, dv = backward_kernel(grad, q, k, v, out, normalisers, *sequences)
        places, prompts = layout.completion_places, layout.prompt_places
        if len(places):
            more_q, more_k, more_v = backward_kernel(
                grad.index_select(0, places),
                q.index_select(0, places),
                k.index_select(0, prompts),
                v.index_select(0, prompts),
                out.index_select(0, places),
                normalisers.index_select(1, places),
                layout.queries,
                layout.prompts,
                False,
                ctx.scale,
            )
            dq = dq.index_add(0, places, more_q)
            dk, dv = dk.index_add(0, prompts, more_k), dv.index_add(0, prompts, more_v)
        return dq, dk, dv, None, None


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Takes the place of `packed_attention.packed_attention` for a `Layout` of this file; all else goes there."""
    layout = kwargs.get(packed_attention.ARGUMENT)
    if not isinstance(layout, Layout):
        return packed_attention.packed_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Under autocast queries and keys come in float32 from the rotation, values in half precision.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype).contiguous() for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return SharedPromptAttention.apply(q, k, v, layout, scale)[None], None


@contextmanager
def installed() -> Iterator[None]:
    """`Policy` scores with this attention while the context lasts."""
    from transformers import AttentionInterface

    make_layout = packed_attention.make_layout
    AttentionInterface.register(packed_attention.NAME, attention)
    packed_attention.make_layout = Layout.of  # type: ignore[assignment]
    try:
        yield
    finally:
        packed_attention.make_layout = make_layout
        packed_attention.register()
