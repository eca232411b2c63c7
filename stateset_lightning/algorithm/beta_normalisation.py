"""BNPO's advantages: a Beta density that follows the batch takes the place of the standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor

from stateset_lightning.algorithm.advantages import centred, drop_small_groups, is_constant
from stateset_lightning.errors import ConfigError


def beta_normalised_advantages(rewards_PG: Tensor) -> Tensor:
    """BNPO's advantages for rewards in [0, 1], float64 [P, G] (arXiv:2506.02864).

    With p a group's mean reward, the advantage is (r - p) / f(p; alpha, beta), where f is the density of a Beta
    distribution. Its parameters minimise the variance of the gradient when p itself is Beta(a, b): alpha = 1 + a/3 and
    beta = 1 + b/3; a and b are those of the batch's p by the method of moments. Where the moments fit no Beta
    distribution (fewer than two groups, no variance, or more than a Bernoulli's) a = b = 0, so f = 1 and the advantage
    is the difference alone.
    """
    rewards_PG = drop_small_groups(rewards_PG.double())
    survivors = rewards_PG[rewards_PG.isfinite()]
    if ((survivors < 0) | (survivors > 1)).any():
        raise ConfigError(
            f"BNPO needs total rewards in [0, 1], got {survivors.min().item():g} to {survivors.max().item():g}: "
            "rescale the rewards or their weights, or use another algorithm"
        )
    p_P = rewards_PG.nanmean(-1)
    alpha, beta = _beta_parameters(p_P[p_P.isfinite()])
    # A constant group may sit where the density is zero or infinite; its difference is zero whatever the density.
    inside_P = torch.where(is_constant(rewards_PG), 0.5, p_P).clamp(1e-6, 1 - 1e-6)
    density_P = torch.distributions.Beta(alpha, beta).log_prob(inside_P).exp()
    return centred(rewards_PG) / density_P[:, None]


def _beta_parameters(p: Tensor) -> tuple[Tensor, Tensor]:
    """(1 + a/3, 1 + b/3) with Beta(a, b) fitted to `p` by the method of moments."""
    one = torch.ones((), dtype=torch.float64)
    if len(p) < 2:
        return one, one
    mean, variance = p.mean(), p.var(unbiased=False)
    if not 0 < variance < mean * (1 - mean):
        return one, one
    total = mean * (1 - mean) / variance - 1
    return 1 + mean * total / 3, 1 + (1 - mean) * total / 3
