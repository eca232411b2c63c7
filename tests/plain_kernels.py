"""The operators of PyTorch that the package calls on a GPU alone, computed on the CPU with plain products.

    with plain_kernels(): ...       the paths for a GPU are taken on a CPU, through the same operators

What a kernel asks of its arguments is checked as in `aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from stateset_lightning.policy import head, packed_attention, recomputed_layers, varlen_attention


@contextmanager
def plain_kernels(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> Iterator[None]:
    """A CPU is a GPU, and the dtypes are half precision for attention, too, so that results can be compared."""

    def operands(query: Tensor, key: Tensor, value: Tensor) -> Any:
        if value.dtype not in dtypes:
            return real(query, key, value)
        return tuple(x[0].transpose(0, 1).contiguous() for x in (query, key, value))

    real = varlen_attention.operands
    library = torch.library._scoped_library("aten", "IMPL")
    with (
        library as kernels,
        patch.object(head, "on_gpu", lambda x: True),
        patch.object(packed_attention, "on_gpu", lambda x: True),
        patch.object(recomputed_layers, "on_gpu", lambda x: True),
        patch.object(varlen_attention, "operands", operands),
        patch.object(varlen_attention, "is_supported", lambda q, k, v: True),
    ):
        kernels.impl("_flash_attention_forward", flash_forward, "CPU")
        kernels.impl("_flash_attention_backward", flash_backward, "CPU")
        kernels.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
        yield


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    **others: Any,
) -> tuple[Tensor, ...]:
    assert not any(others.values())
    _check(query, key, value, ends_q, ends_k, max_q, max_k, dropout)
    output, normalisers = torch.zeros_like(query), query.new_zeros(query.shape[1], len(query), dtype=_wide(query))
    for q, k in _sequences(ends_q, ends_k):
        scores = _scores(query[q], key[k], causal, scale, window_size_left, window_size_right)
        normalisers[:, q] = scores.logsumexp(-1)
        p = (scores - normalisers[:, q, None]).exp()
        output[q] = torch.einsum("hqk,khd->qhd", p, _repeated(value[k], query.shape[1])).to(query.dtype)
    nothing = query.new_empty(0)
    return output, normalisers, nothing, nothing.clone(), nothing.clone()


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalisers: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(query, key, value, ends_q, ends_k, max_q, max_k, dropout)
    assert grad.dtype == output.dtype == query.dtype
    assert normalisers.shape == (query.shape[1], len(query))
    assert normalisers.is_contiguous()  # the kernel is given where it begins
    assert normalisers.dtype == _wide(query)
    assert (state.shape, state.dtype) == ((2,), torch.uint64)
    heads, key_heads = query.shape[1], key.shape[1]
    dq, dk, dv = (torch.zeros_like(x, dtype=_wide(x)) for x in (query, key, value))
    for q, k in _sequences(ends_q, ends_k):
        scores = _scores(query[q], key[k], causal, scale, window_size_left, window_size_right)
        p = (scores - normalisers[:, q, None]).exp()
        g, o, qs = (x[q].to(p.dtype) for x in (grad, output, query))
        grad_p = torch.einsum("qhd,khd->hqk", g, _repeated(value[k], heads))
        grad_scores = p * (grad_p - (g * o).sum(-1).t()[..., None]) * scale
        dq[q] = torch.einsum("hqk,khd->qhd", grad_scores, _repeated(key[k], heads))
        dk[k] = torch.einsum("hqk,qhd->khd", grad_scores, qs).unflatten(1, (key_heads, -1)).sum(2)
        dv[k] = torch.einsum("hqk,qhd->khd", p, g).unflatten(1, (key_heads, -1)).sum(2)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _check(
    query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, dropout: float
) -> None:
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[1] % key.shape[1] == 0
    assert key.shape == value.shape
    assert key.shape[2] == query.shape[2]
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    for ends, tokens, longest in ((ends_q, query, max_q), (ends_k, key, max_k)):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert (ends[0], ends[-1]) == (0, len(tokens))  # what no sequence has is not written
        assert ends.diff().max() <= longest
    assert len(ends_q) == len(ends_k) > 1
    assert max_q > 1  # where all queries are single ones, the kernel takes their number to be that of the sequences
    assert dropout == 0


def _sequences(ends_q: Tensor, ends_k: Tensor) -> Iterator[tuple[slice, slice]]:
    q, k = ends_q.tolist(), ends_k.tolist()
    yield from zip(map(slice, q, q[1:]), map(slice, k, k[1:]), strict=False)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float, left: int, right: int) -> Tensor:
    """[heads, queries, keys]; the window is counted from the ends of queries and keys."""
    scores = torch.einsum("qhd,khd->hqk", query.to(_wide(query)), _repeated(key, query.shape[1])) * scale
    offset = torch.arange(len(key)) - torch.arange(len(query))[:, None] - (len(key) - len(query))
    right = 0 if causal else right
    hidden = ((offset > right) & (right >= 0)) | ((offset < -left) & (left >= 0))
    return scores.masked_fill(hidden, -torch.inf)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.to(_wide(x)).repeat_interleave(heads // x.shape[1], 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
