"""Presets with the plain policy gradient, told apart by their baselines: each as its paper defines it.

The loss, -A log-prob, has no importance ratio: it is meant for one optimizer step per episode (`num_iterations` 1, all
micro-steps accumulated). With more, use a preset with a ratio. A completion's tokens are added up, the completions
averaged.
"""

from typing import Any

from torch import Tensor

from stateset_lightning.algorithm.advantages import (
    greedy_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    mean_normalised_advantages,
    total_scores,
)
from stateset_lightning.algorithm.aggregation import Aggregation
from stateset_lightning.algorithm.algorithm import Algorithm
from stateset_lightning.algorithm.clipped_presets import refuse_kl_in_reward
from stateset_lightning.algorithm.terms import KL


class _WithKLInReward(Algorithm):
    """Plain policy gradient whose KL, where `beta` is set, is k1 in the reward."""

    def __init__(
        self,
        *,
        kl: KL = KL(estimator="k1", place="reward"),  # noqa: B008 (frozen)
        aggregation: Aggregation = "sequence_sum",
        **kwargs: Any,
    ) -> None:
        super().__init__(scale="none", kl=kl, aggregation=aggregation, **kwargs)


class RLOO(_WithKLInReward):
    """REINFORCE leave-one-out (arXiv:2402.14740).

    The baseline of a completion is the mean reward of its group's other completions. The paper's KL, where `beta` is
    set, is k1 in the reward. Implementations that clip an importance ratio add what the paper argues is not needed.
    """

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        return leave_one_out_advantages(total_scores(scores_PGF, weights_F))


class OPO(Algorithm):
    """On-policy RL with optimal reward baseline (arXiv:2505.23585).

    The baseline is the group's mean reward weighted by length. Exactly on-policy, without KL or entropy term.
    """

    def __init__(self, *, aggregation: Aggregation = "sequence_sum", **kwargs: Any) -> None:
        super().__init__(scale="none", aggregation=aggregation, **kwargs)

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        assert lengths_PG is not None
        return length_weighted_advantages(total_scores(scores_PGF, weights_F), lengths_PG)


class ReMax(_WithKLInReward):
    """ReMax (arXiv:2310.10505).

    The baseline is the reward of the prompt's greedy completion, sampled and scored for this alone: one more completion
    per prompt. The paper's KL, where `beta` is set, is k1 in the reward; the baseline is without it.
    """

    @property
    def needs_greedy_baseline(self) -> bool:
        return True

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        assert baseline_PF is not None
        # The greedy completion has no score of the KL, which comes after those of the rewards.
        baseline_P = total_scores(baseline_PF, weights_F[: baseline_PF.shape[-1]])
        return greedy_advantages(total_scores(scores_PGF, weights_F), baseline_P)


class MaxRL(Algorithm):
    """Maximum likelihood reinforcement learning (arXiv:2602.02710), for rewards of 0 and 1.

    Differences from the group's mean are divided by that mean: the rarer a right answer, the more it counts. In the
    limit of many completions this climbs the log-probability of a right answer, where other presets climb the
    probability.
    """

    def __init__(self, *, aggregation: Aggregation = "sequence_sum", **kwargs: Any) -> None:
        super().__init__(scale="none", aggregation=aggregation, **kwargs)
        refuse_kl_in_reward(self, "its advantages need rewards of at least 0")

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        return mean_normalised_advantages(total_scores(scores_PGF, weights_F))
