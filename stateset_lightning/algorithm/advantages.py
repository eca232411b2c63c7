"""Scores -> advantages: how much better a completion is than its group.

Scores are in reward units; advantages are detached, one value per completion, float64. A score of NaN fails its completion: it
leaves the group's baseline and its advantage is NaN. A group with fewer than two survivors is dropped: all its advantages are
NaN. A constant group has advantages of exactly zero. Letters: P prompts (of all ranks), G completions per prompt, F rewards.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stateset_lightning.errors import ConfigError
from stateset_lightning.types import NOT_APPLICABLE

STD_EPSILON = 1e-4
"""Added to a standard deviation, outside the root."""

Scale = Literal["group", "batch", "none"]


def total_scores(scores_PGF: Tensor, weights_F: Tensor) -> Tensor:
    """Weighted sum over the rewards that apply, float64 [P, G]; NaN where one failed or none applies."""
    scores_PGF = scores_PGF.double()
    applies_PGF = scores_PGF != NOT_APPLICABLE
    total_PG = torch.where(applies_PGF, scores_PGF * weights_F.double(), 0.0).sum(-1)
    return torch.where(applies_PGF.any(-1), total_PG, torch.nan)


def drop_small_groups(rewards_PG: Tensor) -> Tensor:
    """NaN for all of a group that has fewer than two survivors: nothing can be said relative to a group of one."""
    survivors_P = rewards_PG.isfinite().sum(-1)
    return torch.where((survivors_P >= 2)[:, None] & rewards_PG.isfinite(), rewards_PG, torch.nan)


def is_constant(rewards_PG: Tensor) -> Tensor:
    """Whether all survivors of a group have the same reward, bool [P]; true for a dropped group."""
    finite_PG = rewards_PG.isfinite()
    largest_P = rewards_PG.where(finite_PG, -torch.inf).amax(-1)
    smallest_P = rewards_PG.where(finite_PG, torch.inf).amin(-1)
    return largest_P <= smallest_P


def centred(rewards_PG: Tensor) -> Tensor:
    """Rewards minus their group's mean; exactly zero in a constant group (the mean itself is not exact), NaN kept."""
    difference_PG = rewards_PG - rewards_PG.nanmean(-1, keepdim=True)
    return torch.where(is_constant(rewards_PG)[:, None] & rewards_PG.isfinite(), 0.0, difference_PG)


def nan_std(values: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation over the values that are not NaN; zero where there are fewer than two."""
    finite = values.isfinite()
    count = finite.sum(dim, keepdim=True)
    mean = values.where(finite, 0.0).sum(dim, keepdim=True) / count.clamp(min=1)
    squares = (values - mean).where(finite, 0.0).square().sum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def group_advantages(rewards_PG: Tensor, scale: Scale = "group") -> Tensor:
    """Group-relative advantages, float64 [P, G].

    `scale` "group" divides by the group's standard deviation (GRPO, arXiv:2402.03300, section 4.1.2), "batch" by that of all
    rewards (arXiv:2508.08221), "none" not at all (Dr. GRPO, arXiv:2503.20783, section 3.2).
    """
    rewards_PG = drop_small_groups(rewards_PG.double())
    difference_PG = centred(rewards_PG)
    if scale == "none":
        return difference_PG
    if scale == "group":
        return difference_PG / (nan_std(rewards_PG, dim=-1) + STD_EPSILON)
    return difference_PG / (nan_std(rewards_PG.flatten(), dim=0) + STD_EPSILON)


def beta_normalised_advantages(rewards_PG: Tensor) -> Tensor:
    """BNPO's advantages for rewards in [0, 1], float64 [P, G] (arXiv:2506.02864).

    With p a group's mean reward, the advantage is (r - p) / f(p; alpha, beta), where f is the density of a Beta distribution. Its
    parameters minimise the variance of the gradient when p itself is Beta(a, b): alpha = 1 + a/3 and beta = 1 + b/3; a and b are
    those of the batch's p by the method of moments. Where the moments fit no Beta distribution (fewer than two groups, no variance,
    or more than a Bernoulli's) a = b = 0, so f = 1 and the advantage is the difference alone.
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
