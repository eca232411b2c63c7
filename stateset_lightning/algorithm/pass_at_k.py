"""Advantages of the best of k: what a completion adds to the largest reward of k completions of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from stateset_lightning.algorithm.advantages import drop_small_groups


def pass_at_k_advantages(rewards_PG: Tensor, k: int) -> Tensor:
    """Pass@k training, float64 [P, G] (arXiv:2508.10751, its analytical form).

    Every subset of k completions of a group has a reward, the largest of its members'. With M and S the mean and the
    (biased) standard deviation of that reward over all subsets, a completion's advantage is (its mean over the subsets
    that hold the completion
    - M) / S. For rewards of 0 and 1 with w wrong ones of n these are the paper's closed forms, M = 1 - C(w, k) / C(n,
      k) and so on;
    here they hold for any rewards: sorted, the j-th smallest is the largest of C(j - 1, k - 1) subsets.

    A group with fewer than k survivors is dropped. Where all subsets have the same reward, as in a constant group,
    advantages are 0.
    """
    num_generations = rewards_PG.shape[-1]
    rewards_PG = drop_small_groups(rewards_PG.double())
    n_P1 = rewards_PG.isfinite().sum(-1, keepdim=True)
    rewards_PG = rewards_PG.where(n_P1 >= k, torch.nan)
    finite_PG = rewards_PG.isfinite()
    # In float, the smallest reward is best taken off first. Failed completions sort to the end, where every count below
    # is zero.
    lowest_P1 = rewards_PG.where(finite_PG, torch.inf).amin(-1, keepdim=True)
    sorted_PG, order_PG = (rewards_PG - lowest_P1).where(finite_PG, torch.inf).sort(-1)
    values_PG = sorted_PG.where(sorted_PG.isfinite(), 0.0)
    j_G = torch.arange(1, num_generations + 1, dtype=torch.float64, device=rewards_PG.device)

    def share(members_G: Tensor, chosen: int, out_of_P1: Tensor) -> Tensor:
        """C(members, chosen) / C(out_of, chosen) for each rank of a survivor, [P, G]; `chosen` others make up a
        subset.
        """
        return (_log_choose(members_G, chosen) - _log_choose(out_of_P1, chosen)).exp().where(j_G <= n_P1, 0.0)

    n_P1 = n_P1.double()
    # Of all subsets, those whose largest member is the j-th: C(j - 1, k - 1) / C(n, k) = C(j - 1, k - 1) / C(n - 1, k -
    # 1) k / n.
    largest_PG = share(j_G - 1, k - 1, n_P1 - 1) * k / n_P1.clamp(min=1)
    mean_P1 = (largest_PG * values_PG).sum(-1, keepdim=True)
    std_P1 = (largest_PG * (values_PG - mean_P1).square()).sum(-1, keepdim=True).sqrt()
    # Of the subsets that hold the i-th: its own reward where the others rank below; the j-th's, j > i, where that is
    # the largest, which leaves k - 2 of j - 2 others: C(j - 2, k - 2) / C(n - 1, k - 1) = C(j - 2, k - 2) / C(n - 2, k
    # - 2) (k - 1) / (n - 1).
    own_PG = share(j_G - 1, k - 1, n_P1 - 1) * values_PG
    above_PG = (
        share(j_G - 2, k - 2, n_P1 - 2) * (k - 1) / (n_P1 - 1).clamp(min=1) * values_PG
        if k > 1
        else torch.zeros_like(values_PG)
    )
    from_here_PG = above_PG.flip(-1).cumsum(-1).flip(-1)
    advantages_PG = torch.empty_like(values_PG).scatter(
        -1, order_PG, (own_PG + from_here_PG - above_PG - mean_P1) / std_P1
    )

    # The smallest reward that a subset can have is the k-th, the largest the n-th: if they are equal, all subsets are.
    biggest_P1 = values_PG.amax(-1, keepdim=True)
    alike_P1 = values_PG[:, k - 1 : k] >= biggest_P1
    return torch.where(finite_PG, torch.where(alike_P1, 0.0, advantages_PG), torch.nan)


def _log_choose(n: Tensor, k: int) -> Tensor:
    """Logarithm of the binomial coefficient; -inf where there is nothing to choose from."""
    possible = n >= k
    n = n.where(possible, float(k))
    logarithm = torch.lgamma(n + 1) - torch.lgamma(n - k + 1) - torch.lgamma(torch.tensor(k + 1.0, dtype=torch.float64))
    return logarithm.where(possible, -torch.inf)
