"""Presets on GRPO's advantages with other losses than a clip, by token: each as its paper defines it, with the paper's
defaults.
"""

from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from stateset_lightning.algorithm.advantages import Scale
from stateset_lightning.algorithm.aggregation import Aggregation
from stateset_lightning.algorithm.algorithm import Algorithm, needed
from stateset_lightning.algorithm.losses import (
    cispo_loss,
    covariance_penalised_loss,
    dppo_loss,
    importance_loss,
    sapo_loss,
)
from stateset_lightning.algorithm.terms import covariances, draw, largest
from stateset_lightning.errors import ConfigError, check_bounds
from stateset_lightning.types import Metrics, TokenBatch


class CISPO(Algorithm):
    """Clipped importance-sampling weights (MiniMax-M1, arXiv:2506.13585).

    The importance weight is bounded at 1 + epsilon_high and held fixed, so that no token loses its gradient. Some
    implementations take `epsilon_high` itself for the bound (TRL), or add PPO's lower bound (verl).

    Args:
        epsilon_high: The weight is at most 1 + epsilon_high. The paper names no number; the default makes it 5, as in
            ScaleRL (arXiv:2510.13786).
    """

    def __init__(
        self, *, epsilon_high: Annotated[float, Gt(0)] = 4.0, aggregation: Aggregation = "token_mean", **kwargs: Any
    ) -> None:
        super().__init__(aggregation=aggregation, **kwargs)
        check_bounds("model.algorithm", CISPO.__init__, {"epsilon_high": epsilon_high})
        self.epsilon_high = epsilon_high

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        advantages_T = self.advantages_per_token(tokens)
        return cispo_loss(tokens.logprobs_T, tokens.old_logprobs_T, advantages_T, epsilon_high=self.epsilon_high)


class SAPO(Algorithm):
    """Soft adaptive policy optimisation (arXiv:2511.20347).

    A smooth gate of the importance ratio in place of a clip, steeper where the advantage is negative.

    Args:
        tau_positive: Steepness of the gate where the advantage is positive.
        tau_negative: Steepness of the gate elsewhere.
    """

    def __init__(
        self,
        *,
        tau_positive: Annotated[float, Gt(0)] = 1.0,
        tau_negative: Annotated[float, Gt(0)] = 1.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_bounds("model.algorithm", SAPO.__init__, {"tau_positive": tau_positive, "tau_negative": tau_negative})
        self.tau_positive = tau_positive
        self.tau_negative = tau_negative

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        taus = {"tau_positive": self.tau_positive, "tau_negative": self.tau_negative}
        return sapo_loss(tokens.logprobs_T, tokens.old_logprobs_T, self.advantages_per_token(tokens), **taus)


class DPPO(Algorithm):
    """Divergence proximal policy optimisation with binary total variation (arXiv:2602.04879).

    A token stops training when its probability, not the ratio of probabilities, has moved too far from the policy that
    sampled it. That policy is the sampler's where its log-probs are known: a mismatch is part of the ratio, and has no
    correction of its own. Without the standard deviation and with a constant length, as in the authors' experiments.

    Args:
        delta_low: Fall of a token's probability that ends training on it, where the advantage is negative.
        delta_high: Rise of a token's probability that ends training on it, where the advantage is positive.
        maximum_ratio: The importance ratio, a fixed weight, is at most this.
    """

    elsewhere = None

    def __init__(
        self,
        *,
        delta_low: Annotated[float, Gt(0), Lt(1)] = 0.15,
        delta_high: Annotated[float, Gt(0), Lt(1)] = 0.15,
        maximum_ratio: Annotated[float, Gt(1)] = 20.0,
        scale: Scale = "none",
        aggregation: Aggregation = "constant_length",
        **kwargs: Any,
    ) -> None:
        super().__init__(mismatch=None, scale=scale, aggregation=aggregation, **kwargs)
        values = {"delta_low": delta_low, "delta_high": delta_high, "maximum_ratio": maximum_ratio}
        check_bounds("model.algorithm", DPPO.__init__, values)
        self.delta_low = delta_low
        self.delta_high = delta_high
        self.maximum_ratio = maximum_ratio

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        sampling_T = tokens.old_logprobs_T if tokens.sampling_logprobs_T is None else tokens.sampling_logprobs_T
        return dppo_loss(
            tokens.logprobs_T,
            sampling_T,
            self.advantages_per_token(tokens),
            delta_low=self.delta_low,
            delta_high=self.delta_high,
            maximum=self.maximum_ratio,
        )


class ClipCov(Algorithm):
    """Clip-Cov (arXiv:2505.22617).

    Of the tokens whose log-prob and advantage vary together, those that drive the entropy down, a few are drawn that do
    not train.

    Args:
        share: Tokens drawn, of all tokens of the optimizer step; one at least, if any is within the bounds.
        omega_low: Only tokens whose covariance is above this are drawn.
        omega_high: Only tokens whose covariance is below this are drawn.
    """

    def __init__(
        self,
        *,
        share: Annotated[float, Gt(0), Lt(1)] = 2e-4,
        omega_low: float = 1.0,
        omega_high: float = 5.0,
        aggregation: Aggregation = "token_mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(top_entropy=None, aggregation=aggregation, **kwargs)
        check_bounds("model.algorithm", ClipCov.__init__, {"share": share})
        if not omega_low < omega_high:
            raise ConfigError(f"model.algorithm.omega_low={omega_low} must be below omega_high={omega_high}")
        self.share = share
        self.omega_low = omega_low
        self.omega_high = omega_high

    @property
    def selects_tokens(self) -> bool:
        return True

    def select(self, tokens: TokenBatch, seed: int) -> Tensor:
        covariances_T = covariances(tokens)
        within_T = (covariances_T > self.omega_low) & (covariances_T < self.omega_high)
        return ~draw(within_T, max(int(self.share * within_T.numel()), 1), seed)

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        loss_T, metrics = importance_loss(tokens.logprobs_T, tokens.old_logprobs_T, self.advantages_per_token(tokens))
        return torch.where(needed(tokens.select_T, "share", "select_T"), loss_T, 0.0), metrics


class KLCov(Algorithm):
    """KL-Cov (arXiv:2505.22617).

    The tokens whose log-prob and advantage vary together the most are held near the policy that sampled them.

    Args:
        share: Tokens held, of all tokens of the optimizer step; one at least. The paper's for 7B models; 2e-4 for 32B.
        coefficient: Weight of the absolute log ratio that holds them.
    """

    def __init__(
        self,
        *,
        share: Annotated[float, Gt(0), Lt(1)] = 2e-3,
        coefficient: Annotated[float, Ge(0)] = 1.0,
        aggregation: Aggregation = "token_mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(top_entropy=None, aggregation=aggregation, **kwargs)
        check_bounds("model.algorithm", KLCov.__init__, {"share": share, "coefficient": coefficient})
        self.share = share
        self.coefficient = coefficient

    @property
    def selects_tokens(self) -> bool:
        return True

    @property
    def trains_on_zero_advantage(self) -> bool:
        return True  # the penalty does not depend on the advantage

    def select(self, tokens: TokenBatch, seed: int) -> Tensor:
        covariances_T = covariances(tokens)
        return ~largest(covariances_T, max(int(self.share * covariances_T.numel()), 1))

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        penalised_T = ~needed(tokens.select_T, "share", "select_T")
        advantages_T = self.advantages_per_token(tokens)
        return covariance_penalised_loss(
            tokens.logprobs_T, tokens.old_logprobs_T, advantages_T, penalised_T, self.coefficient
        )
