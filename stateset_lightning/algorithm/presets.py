"""Presets whose loss is by token: each as its paper defines it, with the paper's defaults.

A preset names its advantage and its policy loss, changes the defaults of options, adds the options that its formulas
read, and fixes those that they contradict. Any option can be changed by itself. Presets whose loss weighs whole
completions are in sequence_presets.py.

No `from __future__ import annotations`: the command line reads the types of the options.
"""

from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from stateset_lightning.algorithm import advantages, losses
from stateset_lightning.algorithm.algorithm import Algorithm, fixed
from stateset_lightning.algorithm.terms import KL, Mismatch, covariances, draw, largest
from stateset_lightning.errors import ConfigError
from stateset_lightning.types import TokenBatch

# PPO's clipped surrogate, told apart by the advantage -----------------------------------------------------------------


class Clipped(Algorithm, loss=losses.clipped_loss):
    """PPO's clipped surrogate on group-relative advantages: what GRPO and its closest relatives share.

    Args:
        epsilon_low: The importance ratio is clipped below at 1 - epsilon_low.
        epsilon_high: The importance ratio is clipped above at 1 + epsilon_high; None for the same as `epsilon_low`.
        delta: Upper bound of the importance ratio where the advantage is negative, which `epsilon_high` leaves
            unbounded: dual clip (arXiv:1912.09729, there c = 3) and the two-sided bound (INTELLECT-2, arXiv:2505.07291,
            there 4) are this one number.
    """

    epsilon_low: Annotated[float, Gt(0), Lt(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] | None = None
    delta: Annotated[float, Gt(1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.epsilon_high = self.epsilon_low if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.delta <= 1 + self.epsilon_high:
            least, why = f"{1 + self.epsilon_high:g}", "it bounds the ratios that the upper clip leaves alone"
            raise ConfigError(f"model.algorithm.delta={self.delta} must be above 1 + epsilon_high = {least}: {why}")


class GRPO(Clipped):
    """Group relative policy optimisation (DeepSeekMath, arXiv:2402.03300, equation 3).

    Group-standardised rewards, symmetric clipping, each completion's tokens averaged, then the completions. The KL
    coefficient `beta` is the paper's (section 4.2); set it to 0, as most later work does, to spare the reference model.
    """

    beta = 0.04


class DrGRPO(Clipped):
    """GRPO done right (arXiv:2503.20783, section 3.2).

    No division by the group's standard deviation (it favours easy and hard questions) and none by a completion's own
    length (it favours long wrong answers): the loss is divided by a constant length instead.
    """

    scale = "none"
    aggregation = "constant_length"


class DAPO(Clipped):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv:2503.14476, equation 8).

    A higher upper clip bound keeps exploration alive, and every token of the batch weighs the same. The paper's
    overlong reward shaping is a reward of its own, `stateset_lightning.rewards.OverlongPenalty`; its dynamic sampling
    is not part of this preset.
    """

    epsilon_high = 0.28
    aggregation = "token_mean"


class TopEntropy(DAPO):
    """DAPO on the fifth of the tokens whose entropy is highest (arXiv:2506.01939).

    Those are the tokens at which a completion could have gone on differently. The number of all tokens stays the
    divisor.
    """

    top_entropy: Annotated[float, Gt(0), Lt(1)] = 0.2  # never None


class BNPO(Clipped, advantage=advantages.beta_normalised_advantages):
    """Beta normalisation policy optimisation (arXiv:2506.02864), for rewards in [0, 1].

    Rewards are centred by their group's mean p and divided by a Beta density at p that follows the batch as it
    improves. TRL's `loss_type="bnpo"` is something else: GRPO's advantages and a mean over the tokens of one
    micro-batch. That mean, over the whole optimizer step, is the aggregation here.
    """

    aggregation = "token_mean"
    why_no_kl_in_reward = "its advantages need rewards between 0 and 1"


class GDPO(Clipped, advantage=advantages.decoupled_advantages):
    """Group reward-decoupled normalisation policy optimisation (arXiv:2601.05242), for several rewards.

    Each reward is standardised in its group before they are weighed and added, so that a reward of small spread is not
    drowned by one of large spread; the sum is standardised over the completions of the batch.
    """

    why_no_kl_in_reward = "it standardises each reward, and the KL would lose its scale"


class PassK(Clipped, advantage=advantages.pass_at_k_advantages):
    """Pass@k training (arXiv:2508.10751), for tasks where one right answer of k is enough.

    A completion is worth what it adds to the best of k. Once k - 1 wrong answers hardly ever stand alone, nothing is
    left to gain, so exploration is not trained away.

    Args:
        k: Completions of which the best counts; below `num_generations`. The paper leaves it to the task.
    """

    k: Annotated[int, Ge(1)] = 2


class ReinforcePlusPlus(Clipped, advantage=advantages.batch_advantages):
    """REINFORCE++ (arXiv:2501.03262), with the batch in place of a group.

    Rewards minus the mean of the whole batch, over its standard deviation: of completions, not of tokens as in some
    implementations. A group has no baseline of its own, so one that is all right or all wrong is trained on. The
    paper's KL, where `beta` is set, is k1 in the reward.
    """

    kl = KL(estimator="k1", place="reward")
    aggregation = "token_mean"
    learns_from_equal_rewards = True


class ReinforcePlusPlusBaseline(Clipped, advantage=advantages.whitened_advantages):
    """REINFORCE++ with a group baseline (arXiv:2501.03262).

    Rewards minus their group's mean, over the standard deviation of these differences in the whole batch: of
    completions, not of tokens as in some implementations, so that a long completion counts once and a constant group
    stays at zero. Its KL, where `beta` is set, is k2 in the loss.
    """

    kl = KL(estimator="k2")
    aggregation = "token_mean"


# The plain policy gradient, told apart by the baseline ----------------------------------------------------------------
#
# The loss, -A log-prob, has no importance ratio: it is meant for one optimizer step per episode (`num_iterations` 1,
# all micro-steps accumulated). With more, use a preset with a ratio. A completion's tokens are added up, the
# completions averaged.


class RLOO(Algorithm, advantage=advantages.leave_one_out_advantages):
    """REINFORCE leave-one-out (arXiv:2402.14740).

    The baseline of a completion is the mean reward of its group's other completions. The paper's KL, where `beta` is
    set, is k1 in the reward. Implementations that clip an importance ratio add what the paper argues is not needed.
    """

    kl = KL(estimator="k1", place="reward")
    aggregation = "sequence_sum"


class OPO(Algorithm, advantage=advantages.length_weighted_advantages):
    """On-policy RL with optimal reward baseline (arXiv:2505.23585).

    The baseline is the group's mean reward weighted by length. Exactly on-policy, without KL or entropy term.
    """

    aggregation = "sequence_sum"


class ReMax(Algorithm, advantage=advantages.greedy_advantages):
    """ReMax (arXiv:2310.10505).

    The baseline is the reward of the prompt's greedy completion, sampled and scored for this alone: one more completion
    per prompt. The paper's KL, where `beta` is set, is k1 in the reward; the baseline is without it.
    """

    kl = KL(estimator="k1", place="reward")
    aggregation = "sequence_sum"
    needs_greedy_baseline = True
    learns_from_equal_rewards = True


class MaxRL(Algorithm, advantage=advantages.mean_normalised_advantages):
    """Maximum likelihood reinforcement learning (arXiv:2602.02710), for rewards of 0 and 1.

    Differences from the group's mean are divided by that mean: the rarer a right answer, the more it counts. In the
    limit of many completions this climbs the log-probability of a right answer, where other presets climb the
    probability.
    """

    aggregation = "sequence_sum"
    why_no_kl_in_reward = "its advantages need rewards of at least 0"


# Other losses on GRPO's advantages ------------------------------------------------------------------------------------


class CISPO(Algorithm, loss=losses.cispo_loss):
    """Clipped importance-sampling weights (MiniMax-M1, arXiv:2506.13585).

    The importance weight is bounded at 1 + epsilon_high and held fixed, so that no token loses its gradient. Some
    implementations take `epsilon_high` itself for the bound (TRL), or add PPO's lower bound (verl).

    Args:
        epsilon_high: The weight is at most 1 + epsilon_high. The paper names no number; the default makes it 5, as in
            ScaleRL (arXiv:2510.13786).
    """

    epsilon_high: Annotated[float, Gt(0)] = 4.0
    aggregation = "token_mean"


class SAPO(Algorithm, loss=losses.sapo_loss):
    """Soft adaptive policy optimisation (arXiv:2511.20347).

    A smooth gate of the importance ratio in place of a clip, steeper where the advantage is negative.

    Args:
        tau_positive: Steepness of the gate where the advantage is positive.
        tau_negative: Steepness of the gate elsewhere.
    """

    tau_positive: Annotated[float, Gt(0)] = 1.0
    tau_negative: Annotated[float, Gt(0)] = 1.05


class DPPO(Algorithm, loss=losses.dppo_loss):
    """Divergence proximal policy optimisation (arXiv:2602.04879): binary total variation, or binary KL.

    A token stops training when its probability, not the ratio of probabilities, has moved too far from the policy that
    sampled it. That policy is the sampler's where its log-probs are known: a mismatch is part of the ratio, and has no
    correction of its own. Without the standard deviation and with a constant length, as in the authors' experiments.

    Args:
        divergence: `tv`: the difference of a token's probabilities; `kl`: the KL divergence, in nats, between the
            choice of this token or any other then and now.
        delta_low: Divergence by a fall of a token's probability that ends training on it, where the advantage is
            negative; None for the authors' 0.15 (`tv`) or 0.05 (`kl`).
        delta_high: The same by a rise, where the advantage is positive.
        maximum_ratio: The importance ratio, a fixed weight, is at most this.
    """

    divergence: losses.Divergence = "tv"
    delta_low: Annotated[float, Gt(0), Lt(1)] | None = None
    delta_high: Annotated[float, Gt(0), Lt(1)] | None = None
    maximum_ratio: Annotated[float, Gt(1)] = 20.0
    mismatch = fixed(Mismatch("none"))
    scale = "none"
    aggregation = "constant_length"

    def __post_init__(self) -> None:
        super().__post_init__()
        default = 0.15 if self.divergence == "tv" else 0.05
        self.delta_low = default if self.delta_low is None else self.delta_low
        self.delta_high = default if self.delta_high is None else self.delta_high


class ClipCov(Algorithm, loss=losses.clip_cov_loss):
    """Clip-Cov (arXiv:2505.22617).

    Of the tokens whose log-prob and advantage vary together, those that drive the entropy down, a few are drawn that do
    not train.

    Args:
        share: Tokens drawn, of all tokens of the optimizer step; one at least, if any is within the bounds.
        omega_low: Only tokens whose covariance is above this are drawn.
        omega_high: Only tokens whose covariance is below this are drawn.
        epsilon_low: The importance ratio is clipped below at 1 - epsilon_low, as in the authors' code (at 0.2), which
            matters with several optimizer steps per episode. None: no bound, as in the paper's formula.
        epsilon_high: Likewise above, at 1 + epsilon_high.
    """

    share: Annotated[float, Gt(0), Lt(1)] = 2e-4
    omega_low: float = 1.0
    omega_high: float = 5.0
    epsilon_low: Annotated[float, Gt(0), Lt(1)] | None = None
    epsilon_high: Annotated[float, Gt(0)] | None = None
    top_entropy = fixed(None)
    aggregation = "token_mean"
    selects_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.omega_low < self.omega_high:
            raise ConfigError(f"model.algorithm.omega_low={self.omega_low} must be below omega_high={self.omega_high}")

    def select(self, tokens: TokenBatch, seed: int) -> Tensor:
        covariances_T = covariances(tokens)
        within_T = (covariances_T > self.omega_low) & (covariances_T < self.omega_high)
        return ~draw(within_T, max(int(self.share * within_T.numel()), 1), seed)


class KLCov(Algorithm, loss=losses.kl_cov_loss):
    """KL-Cov (arXiv:2505.22617).

    The tokens whose log-prob and advantage vary together the most are held near the policy that sampled them.

    Args:
        share: Tokens held, of all tokens of the optimizer step; one at least. The paper's for 7B models; 2e-4 for 32B.
        coefficient: Weight of the absolute log ratio that holds them.
    """

    share: Annotated[float, Gt(0), Lt(1)] = 2e-3
    coefficient: Annotated[float, Ge(0)] = 1.0
    top_entropy = fixed(None)
    aggregation = "token_mean"
    selects_tokens: ClassVar[bool] = True
    trains_on_zero_advantage: ClassVar[bool] = True  # the penalty does not depend on the advantage

    def select(self, tokens: TokenBatch, seed: int) -> Tensor:
        covariances_T = covariances(tokens)
        return ~largest(covariances_T, max(int(self.share * covariances_T.numel()), 1))
