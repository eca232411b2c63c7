"""Values per completion and per token of packed completions: [N] <-> [T]. All differentiable, without a loop."""

from __future__ import annotations

from typing import Literal

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


# MERGED: The one reduction rule: a loss is a sum over completion tokens of weight x per-token loss.
#
# The weight of a token depends on its completion alone, and is computed once per optimizer step over the completions of
# all ranks and micro-steps of that step; so the gradient is the same however the step is split. Completions that do not
# train (failed, dropped, masked) weigh nothing and are not counted; those with an advantage of zero are counted.
#

Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum", "constant_length", "prompt_mean"]


def token_weights(
    lengths_N: Tensor, groups_N: Tensor, trains_N: Tensor, aggregation: Aggregation, constant_length: int | None = None
) -> Tensor:
    """Weight of each token of a completion, float64 [N]; zero where `trains_N` is false.

    With B the completions that train, |o| the length of one and S the sum of their lengths:
        sequence_mean    1 / (B |o|)          mean over completions of the mean over tokens (GRPO, arXiv:2402.03300)
        token_mean       1 / S                mean over all tokens (DAPO, arXiv:2503.14476)
        sequence_sum     1 / B                mean over completions of the sum over tokens (LUSPO, arXiv:2602.05261)
        constant_length  1 / (B L)            the same, divided by a constant L (Dr. GRPO, arXiv:2503.20783)
        prompt_mean      1 / (P s)            mean over prompts of the mean over a prompt's s tokens (ScaleRL,
        arXiv:2510.13786)
    """
    trains_N = trains_N & (lengths_N > 0)
    lengths_N = lengths_N.double()
    count = trains_N.sum().clamp(min=1).double()
    if aggregation == "sequence_mean":
        weights_N = 1 / (count * lengths_N.clamp(min=1))
    elif aggregation == "token_mean":
        weights_N = (1 / lengths_N[trains_N].sum().clamp(min=1)).expand_as(lengths_N)
    elif aggregation == "sequence_sum":
        weights_N = (1 / count).expand_as(lengths_N)
    elif aggregation == "constant_length":
        if constant_length is None:
            raise ValueError(
                "aggregation 'constant_length' needs `constant_length`, the largest number of tokens of a completion"
            )
        weights_N = (1 / (count * constant_length)).expand_as(lengths_N)
    elif aggregation == "prompt_mean":
        _, group_of_N = torch.unique(groups_N, return_inverse=True)
        tokens_P = torch.zeros(
            int(group_of_N.max()) + 1 if len(group_of_N) else 0, dtype=torch.float64, device=lengths_N.device
        )
        tokens_P.index_add_(0, group_of_N[trains_N], lengths_N[trains_N])
        weights_N = 1 / ((tokens_P > 0).sum().clamp(min=1) * tokens_P.clamp(min=1)[group_of_N])
    else:
        raise ValueError(
            f"aggregation={aggregation!r} is not one of sequence_mean, token_mean, sequence_sum, constant_length,"
            " prompt_mean"
        )
    return torch.where(trains_N, weights_N, 0.0)
