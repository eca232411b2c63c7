"""Presets with PPO's clipped surrogate, told apart by their advantages: each as its paper defines it, with the paper's
defaults.

Any option can be changed by itself.
"""

from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from stateset_lightning.algorithm.advantages import (
    Scale,
    beta_normalised_advantages,
    decoupled_advantages,
    pass_at_k_advantages,
    total_scores,
    whitened_advantages,
)
from stateset_lightning.algorithm.aggregation import Aggregation
from stateset_lightning.algorithm.algorithm import Algorithm
from stateset_lightning.algorithm.losses import clipped_loss
from stateset_lightning.algorithm.terms import KL
from stateset_lightning.errors import ConfigError, check_bounds
from stateset_lightning.types import Metrics, TokenBatch


class Clipped(Algorithm):
    """PPO's clipped surrogate on group-relative advantages: what GRPO and its closest relatives share.

    Args:
        epsilon_low: The importance ratio is clipped below at 1 - epsilon_low.
        epsilon_high: The importance ratio is clipped above at 1 + epsilon_high; None for the same as `epsilon_low`.
        delta: Upper bound of the importance ratio where the advantage is negative, which `epsilon_high` leaves
            unbounded: dual clip (arXiv:1912.09729, there c = 3) and the two-sided bound (INTELLECT-2, arXiv:2505.07291,
                there 4) are this one number.
    """

    def __init__(
        self,
        *,
        epsilon_low: Annotated[float, Gt(0), Lt(1)] = 0.2,
        epsilon_high: Annotated[float, Gt(0)] | None = None,
        delta: Annotated[float, Gt(1)] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        values = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "delta": delta}
        check_bounds("model.algorithm", Clipped.__init__, values)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
        self.delta = delta
        if delta is not None and delta <= 1 + self.epsilon_high:
            raise ConfigError(
                f"model.algorithm.delta={delta} must be above 1 + epsilon_high = {1 + self.epsilon_high:g}: "
                "it bounds the ratios that the upper clip leaves alone"
            )

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        return clipped_loss(
            tokens.logprobs_T,
            tokens.old_logprobs_T,
            self.advantages_per_token(tokens),
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
        )


class GRPO(Clipped):
    """Group relative policy optimisation (DeepSeekMath, arXiv:2402.03300, equation 3).

    Group-standardised rewards, symmetric clipping, each completion's tokens averaged, then the completions. The KL
    coefficient `beta` is the paper's (section 4.2); set it to 0, as most later work does, to spare the reference model.
    """

    def __init__(self, *, beta: Annotated[float, Ge(0)] = 0.04, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)


class DrGRPO(Clipped):
    """GRPO done right (arXiv:2503.20783, section 3.2).

    No division by the group's standard deviation (it favours easy and hard questions) and none by a completion's own
    length (it favours long wrong answers): the loss is divided by a constant length instead.
    """

    def __init__(self, *, scale: Scale = "none", aggregation: Aggregation = "constant_length", **kwargs: Any) -> None:
        super().__init__(scale=scale, aggregation=aggregation, **kwargs)


class DAPO(Clipped):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv:2503.14476, equation 8).

    A higher upper clip bound keeps exploration alive, and every token of the batch weighs the same. The paper's
    overlong reward shaping is a reward of its own, `stateset_lightning.rewards.OverlongPenalty`; its dynamic sampling
    is not part of this preset.
    """

    def __init__(
        self,
        *,
        epsilon_high: Annotated[float, Gt(0)] | None = 0.28,
        aggregation: Aggregation = "token_mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(epsilon_high=epsilon_high, aggregation=aggregation, **kwargs)


class TopEntropy(DAPO):
    """DAPO on the fifth of the tokens whose entropy is highest (arXiv:2506.01939).

    Those are the tokens at which a completion could have gone on differently. The number of all tokens stays the
    divisor.
    """

    def __init__(self, *, top_entropy: Annotated[float, Gt(0), Lt(1)] = 0.2, **kwargs: Any) -> None:
        super().__init__(top_entropy=top_entropy, **kwargs)


class BNPO(Clipped):
    """Beta normalisation policy optimisation (arXiv:2506.02864), for rewards in [0, 1].

    Rewards are centred by their group's mean p and divided by a Beta density at p that follows the batch as it
    improves. TRL's `loss_type="bnpo"` is something else: GRPO's advantages and a mean over the tokens of one
    micro-batch. That mean, over the whole optimizer step, is the aggregation here.
    """

    def __init__(self, *, aggregation: Aggregation = "token_mean", **kwargs: Any) -> None:
        super().__init__(scale="none", aggregation=aggregation, **kwargs)
        refuse_kl_in_reward(self, "its advantages need rewards between 0 and 1")

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        return beta_normalised_advantages(total_scores(scores_PGF, weights_F))


class GDPO(Clipped):
    """Group reward-decoupled normalisation policy optimisation (arXiv:2601.05242), for several rewards.

    Each reward is standardised in its group before they are weighed and added, so that a reward of small spread is not
    drowned by one of large spread; the sum is standardised over the completions of the batch.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(scale="none", **kwargs)
        refuse_kl_in_reward(self, "it standardises each reward, and the KL would lose its scale")

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        return decoupled_advantages(scores_PGF, weights_F)


class PassK(Clipped):
    """Pass@k training (arXiv:2508.10751), for tasks where one right answer of k is enough.

    A completion is worth what it adds to the best of k; once k - 1 wrong answers hardly ever stand alone, nothing is
    left to gain, and exploration is not trained away.

    Args:
        k: Completions of which the best counts; below `num_generations`. The paper leaves it to the task.
    """

    def __init__(self, *, k: Annotated[int, Ge(1)] = 2, **kwargs: Any) -> None:
        super().__init__(scale="none", **kwargs)
        check_bounds("model.algorithm", PassK.__init__, {"k": k})
        self.k = k

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        num_generations = scores_PGF.shape[1]
        if self.k >= num_generations:
            raise ConfigError(
                f"model.algorithm.k={self.k} must be below model.rollout.num_generations={num_generations}: "
                "a group needs several subsets of k completions to compare; lower k or raise num_generations"
            )
        return pass_at_k_advantages(total_scores(scores_PGF, weights_F), self.k)


class ReinforcePlusPlusBaseline(Clipped):
    """REINFORCE++ with a group baseline (arXiv:2501.03262).

    Rewards minus their group's mean, over the standard deviation of these differences in the whole batch: of
    completions, not of tokens as in some implementations, so that a long completion counts once and a constant group
    stays at zero. Its KL, where `beta` is set, is k2 in the loss.
    """

    def __init__(
        self,
        *,
        kl: KL = KL(estimator="k2"),  # noqa: B008 (frozen)
        aggregation: Aggregation = "token_mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(scale="none", kl=kl, aggregation=aggregation, **kwargs)

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        return whitened_advantages(total_scores(scores_PGF, weights_F))


def refuse_kl_in_reward(algorithm: Algorithm, why: str) -> None:
    """An error if the KL is to be part of the reward."""
    if algorithm.kl.place == "reward":
        raise ConfigError(
            f"model.algorithm.kl.place='reward' does not go with {type(algorithm).__name__}: {why}; use kl.place='loss'"
        )
