"""Attention over packed groups on a GPU: PyTorch's variable-length flash kernels, called twice per layer at most.

    prompt 1 | completion 1.1 | completion 1.2 | ... | prompt 2 | completion 2.1 | ...

In the first call every prompt and every completion is a causal sequence of its own. In the second one the completions
of a prompt, one behind the other, are one sequence of queries to the prompt's keys. Their log-sum-exps merge the two
into one softmax. The backward kernels get the merged output and log-sum-exp, which makes each call's part of the
gradient exact (as in ring attention, arXiv:2310.01889): no prompt is copied, nothing padded or computed twice.

Where a layer sees a window of W tokens, a completion sees another part of its prompt from each place. There is one call
then, and a completion's keys are copies of the last W - 1 tokens of its prompt, and its own.

`torch.nn.attention.varlen` has no gradient for the log-sum-exp, so the operators below it are called. Letters: S tokens
of the packed sequence, d size of a head.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stateset_lightning.errors import tell_once
from stateset_lightning.policy.head import uploaded

Piece = tuple[int, int]  # first place in the packed sequence, and length
CAUSAL, WHOLE = (-1, 0), (-1, -1)
HAS_KERNELS = find_spec("torch.nn.attention.varlen") is not None  # since PyTorch 2.10


@dataclass(frozen=True)
class Spans:
    """Sequences one behind the other, as the kernel is told of them."""

    ends: Tensor  # int32, of each sequence, behind a 0
    longest: int  # at least 2: where all queries are single ones, the forward kernel takes another way

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Spans":
        ends = np.cumsum([0, *lengths], dtype=np.int32)
        return cls(uploaded(torch.from_numpy(ends), device), max([2, *lengths]))


@dataclass(frozen=True)
class Call:
    """One call of the kernel. Its i-th sequence of queries sees the i-th one of keys.

    Args:
        queries: Lengths of the sequences.
        keys: Likewise.
        query_places: Of all queries in the packed sequence. None: the whole sequence as it is.
        key_places: Likewise.
        window: Keys before and behind the one of its place that a query sees, counted from the ends of the two
            sequences; -1 is all of them. So (-1, 0) is causal.
    """

    queries: Spans
    keys: Spans
    query_places: Tensor | None
    key_places: Tensor | None
    window: tuple[int, int]

    def arguments(self) -> tuple[Any, ...]:
        """The lengths, no dropout, and whether it is causal."""
        queries, keys = self.queries, self.keys
        return queries.ends, keys.ends, queries.longest, keys.longest, 0.0, self.window == CAUSAL

    def options(self, scale: float) -> dict[str, float]:
        return {"scale": scale, "window_size_left": self.window[0], "window_size_right": self.window[1]}


def make_calls(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], window: int | None, device: torch.device
) -> list[Call]:
    """The calls for several groups, one behind the other in the sequence; their number does not depend on the groups'.

    Args:
        prompt_lengths: Of each group.
        completion_lengths: Likewise.
        window: Tokens that a token sees, itself included. None: all of its past.
        device: Of queries and keys.
    """
    own: list[Piece] = []  # prompts and completions
    seen: list[list[Piece]] = []  # of each of these, what it sees in a window
    prompts: list[Piece] = []  # those with completions
    answers: list[Piece] = []  # all completions of each of these
    start = 0
    for prompt, lengths in zip(prompt_lengths, completion_lengths, strict=True):
        end = start + prompt
        own.append((start, prompt))
        seen.append([(start, prompt)])
        kept = prompt if window is None else min(prompt, window - 1)
        if lengths:
            prompts.append((start, prompt))
            answers.append((end, sum(lengths)))
        start = end
        for length in lengths:
            own.append((start, length))
            seen.append([(end - kept, kept), (start, length)])
            start += length
    sequences = Spans.of(_lengths(own), device)
    if window is not None:
        keys = Spans.of([sum(_lengths(pieces)) for pieces in seen], device)
        places = _places((piece for pieces in seen for piece in pieces), device)
        return [Call(sequences, keys, None, places, (window - 1, 0))]
    calls = [Call(sequences, sequences, None, None, CAUSAL)]
    if prompts:
        queries, keys = Spans.of(_lengths(answers), device), Spans.of(_lengths(prompts), device)
        calls.append(Call(queries, keys, _places(answers, device), _places(prompts, device), WHOLE))
    return calls


def _lengths(pieces: Sequence[Piece]) -> list[int]:
    return [length for _, length in pieces]


def _places(pieces: Iterable[Piece], device: torch.device) -> Tensor:
    return uploaded(torch.from_numpy(np.concatenate([np.arange(start, start + n) for start, n in pieces])), device)


# Where the kernels are


def operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """What the kernel is given, [S, heads, d] each; None where it computes in another precision, or not (announced).

    Args:
        query: [1, heads, S, d], on a GPU.
        key: [1, key heads, S, d].
        value: Likewise.
    """
    device, dtype = value.device.type, value.dtype
    # Under autocast queries and keys come in float32 from the rotation, values in half precision.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    if dtype.itemsize != 2:
        return None
    reason = None if HAS_KERNELS else f"PyTorch {torch.__version__} has no variable-length attention (2.10 has)"
    q, k, v = (x[0].transpose(0, 1).to(dtype).contiguous() for x in (query, key, value))
    if reason is None and not is_supported(q, k, v):
        card = torch.cuda.get_device_name(value.device)
        reason = f"flash attention does not support heads of size {query.shape[-1]} and {value.shape[-1]} on {card}"
    if reason is not None:
        tell_once(f"Attention in training is slower than it could be on this GPU: {reason}.")
        return None
    return q, k, v


def is_supported(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the card has a kernel for these heads, by PyTorch's own test."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, q.shape[1] != k.shape[1])
    has_a_size = q.shape[-1] % 8 == 0 and q.shape[-1] == v.shape[-1]
    return has_a_size and torch.backends.cuda.can_use_flash_attention(parameters)


# One softmax over all calls


class Attention(torch.autograd.Function):
    """Query [S, heads, d], key and value [S, key heads, d] -> output [S, heads, d]; see `operands`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: Sequence[Call], scale: float) -> Tensor:
        first, *others = calls
        out, normalisers = _forward(first, q, k, v, scale)
        for call in others:
            more, more_normalisers = _forward(call, q, k, v, scale)
            places = call.query_places
            assert places is not None
            own, own_normalisers = out.index_select(0, places), normalisers.index_select(1, places)
            merged = torch.logaddexp(own_normalisers, more_normalisers)
            share = (own_normalisers - merged).exp().t()[..., None]
            mixed = torch.lerp(more.to(share.dtype), own.to(share.dtype), share)
            out.index_copy_(0, places, mixed.to(out.dtype))
            normalisers.index_copy_(1, places, merged)
        ctx.save_for_backward(q, k, v, out, normalisers)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, normalisers = ctx.saved_tensors
        # Sums in float32: in a window, many completions see one token of a prompt.
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)]
        for call in ctx.calls:
            parts = _backward(call, grads[0], q, k, v, out, normalisers, ctx.scale)
            places = call.query_places, call.key_places, call.key_places
            for total, part, at in zip(sums, parts, places, strict=True):
                part = part.to(total.dtype)
                total.add_(part) if at is None else total.index_add_(0, at, part)
        dq, dk, dv = (total.to(x.dtype) for total, x in zip(sums, (q, k, v), strict=True))
        return dq, dk, dv, None, None


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [queries, heads, d] and log-sum-exps, float32 [heads, queries]."""
    operands = _taken(q, call.query_places), _taken(k, call.key_places), _taken(v, call.key_places)
    kernel = torch.ops.aten._flash_attention_forward
    output, normalisers, *_ = kernel(*operands, *call.arguments(), False, **call.options(scale))
    return output, normalisers


def _backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, normalisers: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the call's queries, keys and values, from the merged output and log-sum-exps."""
    grad, q, out = (_taken(x, call.query_places) for x in (grad.contiguous(), q, out))
    k, v = _taken(k, call.key_places), _taken(v, call.key_places)
    normalisers = _taken(normalisers, call.query_places, 1)
    no_dropout = grad.new_zeros(2, dtype=torch.uint64), grad.new_empty(0)
    kernel, options = torch.ops.aten._flash_attention_backward, call.options(scale)
    return kernel(grad, q, k, v, out, normalisers, *call.arguments(), *no_dropout, **options)


def _taken(x: Tensor, places: Tensor | None, dim: int = 0) -> Tensor:
    return x if places is None else x.index_select(dim, places)
