"""From scores to advantages: how much better a completion is than its group (or, for ReMax, than the greedy one).

Scores are in reward units; advantages are detached, one per completion, float64. A completion with a score of NaN has
failed: it does not count in its group's baseline, and its advantage is NaN. A group with fewer than two survivors is
dropped: all its advantages are NaN. A constant group, whose survivors all have the same reward, has advantages of
exactly zero. Letters: P prompts (of all ranks), G completions per prompt, F rewards.

The parameters of an advantage function are the scores (`scores_PGF`, `weights_F`), their weighted sums (`rewards_PG`),
`lengths_PG`, the greedy completions' rewards (`baseline_P`), or options of the preset.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from stateset_lightning.errors import ConfigError
from stateset_lightning.types import NOT_APPLICABLE

STD_EPSILON = 1e-4  # added to a standard deviation, outside the root

Scale = Literal["group", "batch", "none", "leave_one_out"]

# What the formulas share ----------------------------------------------------------------------------------------------


def total_scores(scores_PGF: Tensor, weights_F: Tensor) -> Tensor:
    """Weighted sum over the rewards that apply, float64 [P, G]; NaN where one failed or none applies."""
    scores_PGF = scores_PGF.double()
    applies_PGF = scores_PGF != NOT_APPLICABLE
    # Rounded, so that equal sums of other parts (0.1 + 0.2, 0.3) are equal: a group of such has nothing to compare.
    total_PG = torch.where(applies_PGF, scores_PGF * weights_F.double(), 0.0).sum(-1).round(decimals=12)
    return torch.where(applies_PGF.any(-1), total_PG, torch.nan)


def drop_small_groups(rewards_PG: Tensor) -> Tensor:
    """NaN for a group with fewer than two survivors, which has nothing to compare with, and for failed completions."""
    survivors_P = rewards_PG.isfinite().sum(-1)
    return torch.where((survivors_P >= 2)[:, None] & rewards_PG.isfinite(), rewards_PG, torch.nan)


def is_constant(rewards_PG: Tensor) -> Tensor:
    """Whether all survivors of a group have the same reward, bool [P]; True for a dropped group."""
    finite_PG = rewards_PG.isfinite()
    largest_P = rewards_PG.where(finite_PG, -torch.inf).amax(-1)
    smallest_P = rewards_PG.where(finite_PG, torch.inf).amin(-1)
    return largest_P <= smallest_P


def centred(rewards_PG: Tensor, baseline_P1: Tensor | None = None) -> Tensor:
    """Rewards minus a baseline of their group, which lies among them; None for the group's mean. NaN is kept.

    Exactly zero in a constant group (the mean itself is not exact).
    """
    difference_PG = rewards_PG - (rewards_PG.nanmean(-1, keepdim=True) if baseline_P1 is None else baseline_P1)
    return torch.where(is_constant(rewards_PG)[:, None] & rewards_PG.isfinite(), 0.0, difference_PG)


def nan_std(values: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation over the finite values; zero where there are fewer than two."""
    values = values.where(values.isfinite(), torch.nan)
    count = values.isfinite().sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _check_totals(rewards_PG: Tensor, largest: float, needs: str, remedy: str) -> None:
    """ConfigError unless all rewards that are not NaN lie between 0 and `largest`."""
    if ((rewards_PG < 0) | (rewards_PG > largest)).any():
        survivors = rewards_PG[rewards_PG.isfinite()]
        got = f"{survivors.min().item():g} to {survivors.max().item():g}"
        raise ConfigError(f"{needs}, got {got}: {remedy}, or use another algorithm")


# One formula per preset, or several presets ---------------------------------------------------------------------------


def group_advantages(rewards_PG: Tensor, scale: Scale = "group") -> Tensor:
    """Group-relative advantages, float64 [P, G].

    `scale` "group" divides by the group's standard deviation (GRPO, arXiv:2402.03300, section 4.1.2), "batch" by that
    of all rewards (arXiv:2508.08221), "none" not at all (Dr. GRPO, arXiv:2503.20783, section 3.2). "leave_one_out"
    takes mean and standard deviation of a group's other completions, and does not divide where those are all equal
    (NeMo RL's default).
    """
    rewards_PG = drop_small_groups(rewards_PG.double())
    if scale == "leave_one_out":
        return leave_one_out_advantages(rewards_PG) / _spread_of_others(rewards_PG)
    difference_PG = centred(rewards_PG)
    if scale == "none":
        return difference_PG
    std = nan_std(rewards_PG, dim=-1) if scale == "group" else nan_std(rewards_PG.flatten(), dim=0)
    return difference_PG / (std + STD_EPSILON)


def _spread_of_others(rewards_PG: Tensor) -> Tensor:
    """What scale "leave_one_out" divides by, [P, G]: 1 for a completion whose group has no spread without it."""
    is_itself_GG = torch.eye(rewards_PG.shape[-1], dtype=torch.bool, device=rewards_PG.device)
    others_PGG = rewards_PG[:, None].where(~is_itself_GG, torch.nan)
    return (nan_std(others_PGG, dim=-1).squeeze(-1) + STD_EPSILON).where(~is_constant(others_PGG), 1.0)


def batch_advantages(rewards_PG: Tensor) -> Tensor:
    """REINFORCE++'s, float64 [P, G]: (r - mean) / std of the whole batch, which is one group here (arXiv:2501.03262).

    So a constant group has an advantage: it is better or worse than the batch.
    """
    rewards_PG = drop_small_groups(rewards_PG.double())
    return group_advantages(rewards_PG.reshape(1, -1)).reshape(rewards_PG.shape)


def whitened_advantages(rewards_PG: Tensor) -> Tensor:
    """REINFORCE++-baseline's, float64 [P, G]: centred rewards over their standard deviation in the whole batch.

    arXiv:2501.03262. The paper subtracts the batch's mean too; it is zero, as every group's is. Scale "batch" of
    `group_advantages` divides by the spread of the rewards instead, in which differences between groups count.
    """
    difference_PG = centred(drop_small_groups(rewards_PG.double()))
    return difference_PG / (nan_std(difference_PG.flatten(), dim=0) + STD_EPSILON)


def leave_one_out_advantages(rewards_PG: Tensor) -> Tensor:
    """RLOO's, float64 [P, G]: each reward minus the mean of the group's other ones (arXiv:2402.14740).

    With n survivors this is n / (n - 1) times the difference from the group's mean.
    """
    rewards_PG = drop_small_groups(rewards_PG.double())
    survivors_P1 = rewards_PG.isfinite().sum(-1, keepdim=True)
    return centred(rewards_PG) * survivors_P1 / (survivors_P1 - 1).clamp(min=1)


def length_weighted_advantages(rewards_PG: Tensor, lengths_PG: Tensor) -> Tensor:
    """OPO's, float64 [P, G]: reward minus the group's mean weighted by length (arXiv:2505.23585).

    This baseline has the least variance when the squared gradient of a completion's log-prob grows with its length.
    """
    rewards_PG = drop_small_groups(rewards_PG.double())
    lengths_PG = lengths_PG.to(rewards_PG).where(rewards_PG.isfinite(), 0.0)
    weighted_P1 = (rewards_PG * lengths_PG).nansum(-1, keepdim=True)
    return centred(rewards_PG, weighted_P1 / lengths_PG.sum(-1, keepdim=True).clamp(min=1))


def greedy_advantages(rewards_PG: Tensor, baseline_P: Tensor) -> Tensor:
    """ReMax's, float64 [P, G]: reward minus that of the prompt's greedy completion (arXiv:2310.10505).

    So a constant group has an advantage here, unless the greedy completion has the same reward. A failed greedy
    completion (NaN) drops its group.
    """
    return drop_small_groups(rewards_PG.double() - baseline_P.double()[:, None])


def mean_normalised_advantages(rewards_PG: Tensor) -> Tensor:
    """MaxRL's, float64 [P, G]: (r - mean) / mean of the group, and 0 where nothing is solved (arXiv:2602.02710).

    For rewards of 0 and 1 its mean is the gradient of the log-probability of a right answer, up to an order that grows
    with G.

    Raises:
        ConfigError: If a reward is negative: a mean near zero would blow the gradient up, one below turn it around.
    """
    rewards_PG = drop_small_groups(rewards_PG.double())
    _check_totals(rewards_PG, math.inf, "MaxRL needs total rewards of at least 0", "shift the rewards")
    mean_P1 = rewards_PG.nanmean(-1, keepdim=True)
    return torch.where((mean_P1 > 0) | rewards_PG.isnan(), centred(rewards_PG) / mean_P1, 0.0)


def decoupled_advantages(scores_PGF: Tensor, weights_F: Tensor) -> Tensor:
    """GDPO's, float64 [P, G]: rewards standardised in their group, weighed, added up, over the batch's deviation.

    arXiv:2601.05242. The standard deviation is that over the completions of the batch. The paper subtracts the batch's
    mean too; it is zero, as that of every reward in every group is. A completion that failed in one reward does not
    count in the baseline of any. A reward that does not apply to a completion, or to no other of its group, adds
    nothing to it.
    """
    total_PG = drop_small_groups(total_scores(scores_PGF, weights_F))
    survives_PG = total_PG.isfinite()
    applies_PGF = survives_PG[..., None] & (scores_PGF != NOT_APPLICABLE)
    columns_FPG = scores_PGF.double().where(applies_PGF, torch.nan).permute(2, 0, 1)
    standardised_FPG = group_advantages(columns_FPG.flatten(0, 1)).reshape(columns_FPG.shape).nan_to_num(nan=0.0)
    combined_PG = torch.einsum("fpg,f->pg", standardised_FPG, weights_F.double()).where(survives_PG, torch.nan)
    return combined_PG / (nan_std(combined_PG.flatten(), dim=0) + STD_EPSILON)


def beta_normalised_advantages(rewards_PG: Tensor) -> Tensor:
    """BNPO's, for rewards in [0, 1], float64 [P, G]: centred rewards over a Beta density (arXiv:2506.02864).

    With p a group's mean reward, the advantage is (r - p) / f(p; alpha, beta), where f is the density of a Beta
    distribution. Its parameters minimise the variance of the gradient when p itself is Beta(a, b): alpha = 1 + a/3 and
    beta = 1 + b/3; a and b are those of the batch's p by the method of moments. Where the moments fit no Beta
    distribution (fewer than two groups, no variance, or more than a Bernoulli's) a = b = 0, so f = 1 and the advantage
    is r - p. As in the authors' code, the variance is unbiased and 1 / f is at most 1e6.

    Raises:
        ConfigError: If a reward is outside [0, 1].
    """
    rewards_PG = drop_small_groups(rewards_PG.double())
    _check_totals(rewards_PG, 1, "BNPO needs total rewards in [0, 1]", "rescale the rewards or their weights")
    p_P = rewards_PG.nanmean(-1)
    mean = p_P.nanmean()
    variance = nan_std(p_P, dim=0).square()
    fits = (variance > 0) & (variance < mean * (1 - mean))
    a_plus_b = (mean * (1 - mean) / variance - 1).where(fits, 0.0)
    # A constant group may sit where the density is zero or infinite; its difference is zero whatever the density.
    inside_P = torch.where(is_constant(rewards_PG), 0.5, p_P).clamp(1e-6, 1 - 1e-6)
    beta = torch.distributions.Beta(1 + mean * a_plus_b / 3, 1 + (1 - mean) * a_plus_b / 3, validate_args=False)
    density_P = beta.log_prob(inside_P).exp()
    return centred(rewards_PG) * (1 / density_P).clamp(max=1e6)[:, None]


def pass_at_k_advantages(rewards_PG: Tensor, k: int) -> Tensor:
    """Pass@k training's, float64 [P, G]: what a completion adds to the best of k (arXiv:2508.10751, analytical form).

    Every subset of k completions of a group has a reward, the largest of its members'. With M and S the mean and the
    (biased) standard deviation of that reward over all subsets, a completion's advantage is (m - M) / S, where m is the
    mean over the subsets that hold the completion. For rewards of 0 and 1 with w wrong ones of n these are the paper's
    closed forms, M = 1 - C(w, k) / C(n, k) and so on. Here they hold for any rewards: sorted, the j-th smallest is the
    largest of C(j - 1, k - 1) subsets.

    A group with fewer than k survivors is dropped. Where all subsets have the same reward, as in a constant group,
    advantages are 0.

    Raises:
        ConfigError: If k is not below G.
    """
    num_generations = rewards_PG.shape[-1]
    if k >= num_generations:
        raise ConfigError(f"model.algorithm.k={k} must be below model.rollout.num_generations={num_generations}")
    rewards_PG = drop_small_groups(rewards_PG.double())
    advantages_PG = torch.full_like(rewards_PG, torch.nan)
    for rewards_G, advantages_G in zip(rewards_PG, advantages_PG, strict=True):
        survives_G = rewards_G.isfinite()
        if int(survives_G.sum()) >= k:
            advantages_G[survives_G] = _best_of_k_advantages(rewards_G[survives_G], k)
    return advantages_PG


def _best_of_k_advantages(rewards_G: Tensor, k: int) -> Tensor:
    """`pass_at_k_advantages` of one group, none of whose G >= k completions failed."""
    size = len(rewards_G)
    # Rewards may be huge: differences from the smallest one keep their precision.
    values_G, order_G = (rewards_G - rewards_G.min()).sort()
    # The smallest reward that a subset can have is the k-th, the largest the last: if they are equal, all subsets are.
    if values_G[k - 1] >= values_G[-1]:
        return torch.zeros_like(rewards_G)
    # With ranks j from 0, each is the largest of C(j, k - 1) of the C(G - 1, k - 1) subsets that hold it, since their
    # other members rank below. The shares of two other counts follow from this one:
    # of all C(G, k) = C(G - 1, k - 1) x G / k subsets, each is the largest of C(j, k - 1);
    # of the subsets that hold one of lower rank, it is the largest of C(j - 1, k - 2) = C(j, k - 1) x (k - 1) / j.
    holding = math.comb(size - 1, k - 1)
    own_share_G = values_G.new_tensor([math.comb(j, k - 1) / holding for j in range(size)])
    share_G = own_share_G * k / size
    mean = (share_G * values_G).sum()
    std = (share_G * (values_G - mean).square()).sum().sqrt()
    above_G = own_share_G * (k - 1) / torch.arange(size, device=values_G.device).clamp(min=1) * values_G
    from_here_G = above_G.flip(-1).cumsum(-1).flip(-1)
    sorted_G = (own_share_G * values_G + from_here_G - above_G - mean) / std
    return torch.empty_like(sorted_G).scatter(-1, order_G, sorted_G)
