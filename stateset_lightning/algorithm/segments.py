"""Values per completion and per token of packed completions: [N] <-> [T]. All differentiable, without a loop."""

from __future__ import annotations

import torch
from torch import Tensor


def per_token(values_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Repeats a value per completion for each of its tokens: [N] -> [T]."""
    return values_N.repeat_interleave(lengths_N.to(values_N.device), dim=0)


def sequence_sums(values_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Sum over the tokens of each completion: [T] -> [N]."""
    lengths_N = lengths_N.to(values_T.device)
    completion_T = per_token(torch.arange(len(lengths_N), device=values_T.device), lengths_N)
    return torch.zeros(len(lengths_N), dtype=values_T.dtype, device=values_T.device).index_add(
        0, completion_T, values_T
    )


def sequence_means(values_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Mean over the tokens of each completion: [T] -> [N]; 0 for a completion without tokens."""
    return sequence_sums(values_T, lengths_N) / lengths_N.to(values_T.device).clamp(min=1)
