"""Presets that learn by maximum likelihood: of targets, or of the best completion of a group.

The loss of a token is -log p, and nothing else decides: there is no worse completion to turn away from. It has no
importance ratio and needs none, for any number of optimizer steps per episode.

No `from __future__ import annotations`: the command line reads the types of the options.
"""

from typing import ClassVar

import torch
from torch import Tensor

from stateset_lightning.algorithm.algorithm import Algorithm, fixed
from stateset_lightning.algorithm.terms import KL, Mismatch
from stateset_lightning.errors import tell_once


def target_advantages(rewards_PG: Tensor) -> Tensor:
    """1, float64 [P, G]: a target is what is wanted, whatever a reward says of it, and also where one failed."""
    return torch.ones_like(rewards_PG)


def best_of_group_advantages(rewards_PG: Tensor, minimum_reward: float | None = None) -> Tensor:
    """RAFT's, float64 [P, G]: 1 for the best of a group, of several the first; NaN for all others (arXiv:2304.06767).

    NaN and not 0: what is not chosen is no part of the data that is learned, and does not count in a mean over it. A
    group has a best if any of its completions has a reward, also if that is the only one, or all have the same; none if
    the best is below `minimum_reward`.
    """
    rewards_PG = rewards_PG.double().where(rewards_PG.isfinite(), -torch.inf)
    best_P1, index_P1 = rewards_PG.max(-1, keepdim=True)  # of equal ones the first
    enough_P1 = best_P1.isfinite() & (best_P1 >= (-torch.inf if minimum_reward is None else minimum_reward))
    if best_P1.isfinite().any() and not enough_P1.any():
        tell_once(f"model.algorithm.minimum_reward={minimum_reward:g}: no reward of an episode reaches it; lower it")
    chosen_P1 = torch.ones_like(best_P1).where(enough_P1, torch.nan)
    return torch.full_like(rewards_PG, torch.nan).scatter(-1, index_P1, chosen_P1)


class MaximumLikelihood(Algorithm):
    """What both share: each token's -log p, whoever sampled it and whatever a reward says of it."""

    aggregation = "token_mean"
    mismatch = fixed(Mismatch("none"))
    off_policy_threshold = fixed(None)
    positive_coefficient = fixed(0.0)
    advantage_clip = fixed(None)
    why_no_kl_in_reward = "what it learns is not weighed by rewards"
    learns_from_equal_rewards = True


class Supervised(MaximumLikelihood, advantage=target_advantages):
    """Supervised fine-tuning on targets, as it comes before reinforcement learning in InstructGPT (arXiv:2203.02155).

    The loss is the mean cross-entropy over the tokens of the scenarios' targets, with the token that ends them:
    at temperature 1 what `labels` make in transformers, over the whole optimizer step. Nothing is sampled to be trained
    on: a prompt has one completion, its target, or the first of several. Rewards score it, and the score is only shown.
    `validate` samples from the model as ever.
    """

    mask_truncated = fixed(False)
    trains_on_targets: ClassVar[bool] = True


class RAFT(MaximumLikelihood, advantage=best_of_group_advantages):
    """Reward-ranked fine-tuning (arXiv:2304.06767): supervised steps on the best completion of each group.

    Also called rejection sampling or best-of-n fine-tuning. The loss is the mean cross-entropy over the tokens of what
    is chosen. The paper's KL is k1 in the reward, where it takes part in the choice; here, where `beta` is set, it is
    k2 in the loss, so that `minimum_reward` is compared with rewards alone.

    Args:
        minimum_reward: A group whose best total reward is below this trains nothing; None as in the paper, where the
            best of a group trains, whatever it is worth. With rewards of 0 and 1, set it to 1: right answers alone
            train (arXiv:2504.11343).
    """

    minimum_reward: float | None = None
    kl = KL(estimator="k2")
