"""The interface between an algorithm and the loop around it, and its stock implementation.

An algorithm is three choices: an advantage, a per-token loss and an aggregation. It sees packed tensors and knows nothing of
models, prompts or Lightning. Letters: P prompts, G completions per prompt, N completions, T completion tokens, F rewards.
"""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from stateset_lightning.algorithm.advantages import Scale, group_advantages, total_scores
from stateset_lightning.algorithm.aggregation import Aggregation, token_weights
from stateset_lightning.algorithm.losses import clipped_loss, k3, per_token
from stateset_lightning.bounds import check_bounds
from stateset_lightning.errors import ConfigError
from stateset_lightning.types import Metrics, TokenBatch


class Algorithm:
    """Clipped policy gradient on group-relative advantages: what GRPO and its closest relatives share.

    Args:
        epsilon_low: The importance ratio is clipped below at 1 - epsilon_low.
        epsilon_high: The importance ratio is clipped above at 1 + epsilon_high; None for the same as `epsilon_low`.
        beta: Coefficient of the KL divergence from the reference policy (k3, added to the loss). 0 means that no reference exists.
        scale: What centred rewards are divided by: the standard deviation of the group, that of the whole batch, or nothing.
        aggregation: How per-token losses are averaged; see `stateset_lightning.algorithm.aggregation`.
        constant_length: Divisor of aggregation "constant_length"; None for the rollout's `max_new_tokens`.
        mask_truncated: Leave completions that were cut at `max_new_tokens` out of the loss (and out of its normaliser).
    """

    def __init__(
        self,
        *,
        epsilon_low: Annotated[float, Gt(0), Lt(1)] = 0.2,
        epsilon_high: Annotated[float, Gt(0)] | None = None,
        beta: Annotated[float, Ge(0)] = 0.0,
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
        values = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "beta": beta, "constant_length": constant_length}
        check_bounds("model.algorithm", Algorithm.__init__, values)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
        self.beta = beta
        self.scale = scale
        self.aggregation = aggregation
        self.constant_length = constant_length
        self.mask_truncated = mask_truncated

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs the reference policy's log-probs."""
        return self.beta > 0

    @property
    def trains_on_zero_advantage(self) -> bool:
        """Whether the loss has a term beside the advantage's, so that completions with an advantage of zero still train."""
        return self.beta > 0

    def setup(self, max_new_tokens: int) -> None:
        """Fills in what follows from the rollout; called once, before training."""
        if self.aggregation == "constant_length" and self.constant_length is None:
            self.constant_length = max_new_tokens

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

    def per_token_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Loss of each token, [T], and metrics as (sum, count). Not yet weighted: see `token_weights`."""
        loss_T, metrics = clipped_loss(
            tokens.logprobs_T,
            tokens.old_logprobs_T,
            per_token(tokens.advantages_N, tokens.lengths_N).to(tokens.logprobs_T.dtype),
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
        )
        if self.beta > 0:
            if tokens.ref_logprobs_T is None:
                raise ValueError(f"algorithm.beta={self.beta} needs the reference's log-probs, and there are none")
            kl_T = k3(tokens.logprobs_T, tokens.ref_logprobs_T)
            loss_T = loss_T + self.beta * kl_T
            metrics["policy/kl"] = (kl_T.detach().sum(), kl_T.numel())
        return loss_T, metrics

    def token_weights(self, lengths_N: Tensor, groups_N: Tensor, trains_N: Tensor | None = None) -> Tensor:
        """Weight of each token of a completion, float64 [N]; called once per optimizer step on all its completions.

        Args:
            lengths_N: Tokens of each completion of the optimizer step, of all ranks and micro-steps.
            groups_N: Which prompt each completion answers.
            trains_N: Which completions train; None for all.
        """
        trains_N = torch.ones_like(lengths_N, dtype=torch.bool) if trains_N is None else trains_N
        return token_weights(lengths_N, groups_N, trains_N, self.aggregation, self.constant_length)

    def state_dict(self) -> dict[str, float]:
        """Adaptive quantities, as plain floats; empty for an algorithm without any."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no adaptive state, the checkpoint holds {sorted(state)}")
