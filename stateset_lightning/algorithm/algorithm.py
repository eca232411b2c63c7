"""The interface between an algorithm and the loop around it, and all that algorithms share.

An algorithm is three choices: an advantage, a policy loss and an aggregation. It sees packed tensors and knows nothing
of models, prompts or Lightning. Letters: P prompts, G completions per prompt, N completions, T completion tokens, F
rewards.

A preset is a subclass that overrides `policy_loss` or `advantages`. An option that its formula does not read is hidden
by giving it a value in `super().__init__(...)`, or is not inherited at all; so it can be set neither from Python nor on
the command line.
"""

import logging
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from stateset_lightning.algorithm.advantages import Scale, group_advantages, total_scores
from stateset_lightning.algorithm.aggregation import (
    Aggregation,
    per_token,
    sequence_means,
    sequence_sums,
    token_weights,
)
from stateset_lightning.algorithm.losses import policy_gradient_loss
from stateset_lightning.algorithm.terms import (
    KL,
    AdaptiveEntropy,
    Mismatch,
    adapted_coefficient,
    kl_estimate,
    mismatch_metrics,
    mismatch_weights,
    top_entropy_tokens,
)
from stateset_lightning.errors import ConfigError, check_bounds
from stateset_lightning.types import Metrics, TokenBatch

log = logging.getLogger("stateset_lightning")


class Algorithm:
    """Plain policy gradient on group-relative advantages, with what all algorithms share: further terms, corrections,
    aggregation.

    Args:
        beta: Coefficient of the KL divergence from the reference policy. 0 means that no reference exists.
        kl: How that divergence is estimated, and where it enters; see `KL`.
        entropy_coefficient: Coefficient of an entropy bonus, the start of an adaptive one. 0 for none.
        adaptive_entropy: Moves the entropy coefficient; see `AdaptiveEntropy`. None keeps it fixed.
        top_entropy: Train this share of the tokens alone, those of the highest entropy (arXiv:2506.01939); None for
            all.
        mismatch: Correction for a sampler whose log-probs differ from the trainer's; see `Mismatch`. None: truncated
            importance sampling where another process samples, else nothing.
        off_policy_threshold: Leave a completion with a negative advantage out of the policy loss when its tokens'
            log-probs have fallen by more than this on average since they were sampled (DeepSeek-V3.2,
            arXiv:2512.02556); None for never.
        scale: What centred rewards are divided by: the standard deviation of the group, that of the whole batch, or
            nothing.
        aggregation: How per-token losses are averaged; see `stateset_lightning.algorithm.aggregation`.
        constant_length: Divisor of aggregation "constant_length"; None for the rollout's `max_new_tokens`.
        mask_truncated: Leave completions that were cut at `max_new_tokens` out of the loss (and out of its normaliser).
    """

    def __init__(
        self,
        *,
        beta: Annotated[float, Ge(0)] = 0.0,
        kl: KL = KL(),  # noqa: B008 (frozen)
        entropy_coefficient: Annotated[float, Ge(0)] = 0.0,
        adaptive_entropy: AdaptiveEntropy | None = None,
        top_entropy: Annotated[float, Gt(0), Lt(1)] | None = None,
        mismatch: Mismatch | None = None,
        off_policy_threshold: Annotated[float, Gt(0)] | None = None,
        scale: Scale = "group",
        aggregation: Aggregation = "sequence_mean",
        constant_length: Annotated[int, Ge(1)] | None = None,
        mask_truncated: bool = False,
    ) -> None:
        if constant_length is not None and aggregation != "constant_length":
            raise ConfigError(
                f"algorithm.constant_length={constant_length} has no effect with aggregation={aggregation!r}: "
                "remove it, or set aggregation to 'constant_length'"
            )
        values = {"beta": beta, "entropy_coefficient": entropy_coefficient, "top_entropy": top_entropy}
        values |= {"off_policy_threshold": off_policy_threshold, "constant_length": constant_length}
        check_bounds("model.algorithm", Algorithm.__init__, values)
        if kl.target is not None and beta == 0:
            raise ConfigError(
                f"model.algorithm.kl.target={kl.target} has no effect with beta=0: set beta, where the adaptive"
                " coefficient starts, or remove the target"
            )
        self.beta = beta
        self.kl = kl
        self.kl_coefficient = beta
        self.entropy_coefficient = entropy_coefficient
        self.adaptive_entropy = adaptive_entropy
        # In force now: an adaptive one has measured no entropy yet.
        self.entropy_bonus = entropy_coefficient if adaptive_entropy is None else 0.0
        self.top_entropy = top_entropy
        self.mismatch = mismatch
        self.off_policy_threshold = off_policy_threshold
        self.scale = scale
        self.aggregation = aggregation
        self.constant_length = constant_length
        self.mask_truncated = mask_truncated

    # What the training side has to provide

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or the reward needs the reference policy's log-probs."""
        return self.beta > 0

    @property
    def kl_in_reward(self) -> bool:
        """Whether `kl_scores` are one more score of every completion, with weight -kl_coefficient."""
        return self.beta > 0 and self.kl.place == "reward"

    @property
    def needs_greedy_baseline(self) -> bool:
        """Whether `advantages` compares with the scores of a greedy completion per prompt."""
        return False

    @property
    def selects_tokens(self) -> bool:
        """Whether `select` is to be called, once per optimizer step."""
        return self.top_entropy is not None

    @property
    def trains_on_zero_advantage(self) -> bool:
        """Whether the loss has a term beside the advantage's, so that completions with an advantage of zero still
        train.
        """
        return (self.beta > 0 and self.kl.place == "loss") or self._has_entropy_bonus

    @property
    def _has_entropy_bonus(self) -> bool:
        return self.entropy_coefficient > 0 or self.adaptive_entropy is not None

    elsewhere: ClassVar[Mismatch | None] = Mismatch()
    """The correction where an engine outside of this process samples, unless one is given."""

    def setup(self, max_new_tokens: int, samples_elsewhere: bool = False) -> None:
        """Fills in what follows from the rollout; called once, before training."""
        if samples_elsewhere and self.mismatch is None and self.elsewhere is not None:
            self.mismatch = self.elsewhere
            log.info(
                "model.algorithm.mismatch: %s, since another process samples (kind: none for no correction)",
                self.mismatch,
            )
        if self.aggregation == "constant_length" and self.constant_length is None:
            self.constant_length = max_new_tokens

    # Scores -> advantages

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        """Advantages of the completions of all ranks, float64 [P, G]; NaN for failed completions and dropped groups.

        Args:
            scores_PGF: Scores by reward; NaN = failed, `NOT_APPLICABLE` = left out of the sum.
            weights_F: Weights of the rewards.
            lengths_PG: Completion lengths in tokens, for algorithms that weigh by length.
            baseline_PF: Scores of a greedy completion per prompt, for algorithms that compare with it.
        """
        return group_advantages(total_scores(scores_PGF, weights_F), self.scale)

    def kl_scores(self, logprobs_T: Tensor, ref_logprobs_T: Tensor, lengths_N: Tensor) -> Tensor:
        """The KL estimate summed over each completion's tokens, nats, [N]; a score to be weighted by
        -kl_coefficient.
        """
        return sequence_sums(kl_estimate(self.kl.estimator, logprobs_T, ref_logprobs_T).detach(), lengths_N)

    # Tokens -> loss

    def select(self, tokens: TokenBatch, seed: int) -> Tensor:
        """Which tokens the policy loss treats as usual, bool [T]; called before an optimizer step's first backward.

        Args:
            tokens: All completions of the optimizer step that train, of all ranks, as the policy was before the step.
            seed: For selections that draw.
        """
        assert self.top_entropy is not None
        assert tokens.entropies_T is not None
        return top_entropy_tokens(tokens.entropies_T, self.top_entropy)

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """The advantage's part of each token's loss, [T], and metrics as (sum, count)."""
        return policy_gradient_loss(tokens.logprobs_T, self.advantages_per_token(tokens)), {}

    @staticmethod
    def advantages_per_token(tokens: TokenBatch) -> Tensor:
        """The advantage of each token's completion, [T], in the precision of the log-probs."""
        return per_token(tokens.advantages_N, tokens.lengths_N).to(tokens.logprobs_T.dtype)

    def per_token_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Loss of each token, [T], and metrics as (sum, count). Not yet weighted: see `token_weights`.

        The policy loss, less what selection and off-policy mask leave out, times the mismatch weights; plus the KL
        term, minus the entropy bonus. The last two act on every token.
        """
        loss_T, metrics = self.policy_loss(tokens)
        if self.top_entropy is not None:
            loss_T = torch.where(needed(tokens.select_T, "top_entropy", "select_T"), loss_T, 0.0)
        if self.off_policy_threshold is not None:
            keep_N = on_policy(tokens, self.off_policy_threshold)
            loss_T = torch.where(per_token(keep_N, tokens.lengths_N), loss_T, 0.0)
            metrics["policy/off_policy"] = ((~keep_N).sum(), keep_N.numel())
        loss_T = self._corrected(loss_T, tokens, metrics)
        if self.beta > 0:
            loss_T = self._with_kl(loss_T, tokens, metrics)
        if self._has_entropy_bonus:
            entropies_T = needed(tokens.entropies_T, "entropy_coefficient", "entropies_T")
            metrics["policy/entropy"] = (entropies_T.detach().sum(), entropies_T.numel())
            loss_T = loss_T - self.entropy_bonus * entropies_T
        return loss_T, metrics

    def _corrected(self, loss_T: Tensor, tokens: TokenBatch, metrics: Metrics) -> Tensor:
        if tokens.sampling_logprobs_T is not None:
            metrics |= mismatch_metrics(tokens.old_logprobs_T, tokens.sampling_logprobs_T)
        if self.mismatch is None or self.mismatch.kind == "none":
            return loss_T
        sampling_T = needed(tokens.sampling_logprobs_T, "mismatch", "sampling_logprobs_T")
        weights_T = mismatch_weights(tokens.old_logprobs_T, sampling_T, tokens.lengths_N, self.mismatch).to(
            loss_T.dtype
        )
        metrics["mismatch/masked"] = ((weights_T == 0).sum(), weights_T.numel())
        return weights_T * loss_T

    def _with_kl(self, loss_T: Tensor, tokens: TokenBatch, metrics: Metrics) -> Tensor:
        if tokens.ref_logprobs_T is None:
            raise ValueError(f"algorithm.beta={self.beta} needs the reference's log-probs, and there are none")
        kl_T = kl_estimate(self.kl.estimator, tokens.logprobs_T, tokens.ref_logprobs_T, tokens.old_logprobs_T)
        metrics["policy/kl"] = (kl_T.detach().sum(), kl_T.numel())
        return loss_T + self.kl_coefficient * kl_T if self.kl.place == "loss" else loss_T

    def token_weights(self, lengths_N: Tensor, groups_N: Tensor, trains_N: Tensor | None = None) -> Tensor:
        """Weight of each token of a completion, float64 [N]; called once per optimizer step on all its completions.

        Args:
            lengths_N: Tokens of each completion of the optimizer step, of all ranks and micro-steps.
            groups_N: Which prompt each completion answers.
            trains_N: Which completions train; None for all.
        """
        trains_N = torch.ones_like(lengths_N, dtype=torch.bool) if trains_N is None else trains_N
        return token_weights(lengths_N, groups_N, trains_N, self.aggregation, self.constant_length)

    # Adaptive quantities

    def adapt(self, metrics: Mapping[str, float]) -> None:
        """Moves adaptive coefficients; called after each optimizer step with the means of its metrics over all
        ranks.
        """
        if self.kl.target is not None:
            self.kl_coefficient = adapted_coefficient(self.kl_coefficient, metrics["policy/kl"], self.kl)
        if self.adaptive_entropy is not None:
            entropy = metrics["policy/entropy"]
            self.entropy_coefficient = self.adaptive_entropy.adapted(self.entropy_coefficient, entropy)
            self.entropy_bonus = self.entropy_coefficient if entropy <= self.adaptive_entropy.target else 0.0

    def state_dict(self) -> dict[str, float]:
        """Adaptive quantities, as plain floats; empty for an algorithm without any."""
        state = {} if self.kl.target is None else {"kl_coefficient": self.kl_coefficient}
        if self.adaptive_entropy is not None:
            state |= {"entropy_coefficient": self.entropy_coefficient, "entropy_bonus": self.entropy_bonus}
        return state

    def load_state_dict(self, state: dict[str, float]) -> None:
        if unknown := sorted(set(state) - set(self.state_dict())):
            raise ConfigError(
                f"the checkpoint holds the adaptive {', '.join(unknown)}, and {type(self).__name__} is not set to adapt"
                " them: resume with the options that the run was started with"
            )
        for name, value in state.items():
            setattr(self, name, value)


@torch.no_grad()
def on_policy(tokens: TokenBatch, threshold: float) -> Tensor:
    """Completions that the off-policy sequence mask keeps, bool [N] (DeepSeek-V3.2, arXiv:2512.02556, equation 9).

    Left out are those with a negative advantage whose mean of (sampling log-prob - log-prob) is above `threshold`; the
    log-probs are the sampler's where they are known, else the old ones.
    """
    sampling_T = tokens.old_logprobs_T if tokens.sampling_logprobs_T is None else tokens.sampling_logprobs_T
    drift_N = sequence_means(sampling_T - tokens.logprobs_T, tokens.lengths_N)
    return (tokens.advantages_N >= 0) | (drift_N <= threshold)


def needed(values_T: Tensor | None, option: str, name: str) -> Tensor:
    if values_T is None:
        raise ValueError(f"algorithm.{option} needs TokenBatch.{name}, and there is none")
    return values_T
