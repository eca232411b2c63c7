"""Which tokens of an optimizer step are treated apart: chosen once, before its first backward, over the tokens of all
ranks.

A selection depends on the policy, so it never changes what a loss is divided by.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stateset_lightning.algorithm.segments import per_token
from stateset_lightning.seeding import uniforms
from stateset_lightning.types import TokenBatch


def top_entropy_tokens(entropies_T: Tensor, share: float) -> Tensor:
    """The tokens whose entropy is at or above the (1 - share) quantile, bool [T] (arXiv:2506.01939).

    Of several with the threshold's entropy the first are kept, so that the number is the same whatever the entropies.
    """
    return largest(entropies_T, math.floor(share * (entropies_T.numel() - 1) + 1e-9) + 1)


def largest(values_T: Tensor, count: int) -> Tensor:
    """The `count` largest values, bool [T]; of equal ones the first."""
    order_T = values_T.argsort(descending=True, stable=True)
    chosen_T = torch.zeros_like(values_T, dtype=torch.bool)
    chosen_T[order_T[:count]] = True
    return chosen_T


def covariances(tokens: TokenBatch) -> Tensor:
    """Each token's part of the covariance of log-prob and advantage, [T] (arXiv:2505.22617).

    (log-prob - mean) (advantage - mean), the means over the tokens given. Its mean is what drives the entropy down.
    """
    advantages_T = per_token(tokens.advantages_N, tokens.lengths_N).double()
    logprobs_T = tokens.logprobs_T.double()
    return (logprobs_T - logprobs_T.mean()) * (advantages_T - advantages_T.mean())


def draw(candidates_T: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of the candidates, drawn at random from `seed`, bool [T]."""
    noise_T = torch.from_numpy(uniforms([seed], candidates_T.numel())[0]).to(candidates_T.device)
    return candidates_T & largest(noise_T.where(candidates_T, -1.0), count)
