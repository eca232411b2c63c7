"""Policy losses by token. Pure functions of log-probs, packed [T]; no normalisation in here.

Losses are to be minimised. `ratio_T` is exp(log-prob now - log-prob when the episode was sampled). What a paper holds
fixed (stop-gradient) is detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateset_lightning.algorithm.aggregation import per_token, sequence_means, sequence_sums
from stateset_lightning.types import Metrics, TokenBatch


def policy_gradient_loss(logprobs_T: Tensor, advantages_T: Tensor) -> Tensor:
    """REINFORCE, [T]: -A log-prob. No importance ratio: right for the policy that sampled, so for one optimizer step
    per episode.
    """
    return -advantages_T * logprobs_T


def clipped_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate, [T]: -min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A).

    arXiv:1707.06347, equation 7; separate bounds ("clip-higher"): arXiv:2503.14476, equation 10. With `delta` the first
    ratio is at most delta (two-sided bound, arXiv:2505.07291; above 1 + epsilon_high it is dual clip's c,
    arXiv:1912.09729). The clip metrics count tokens whose gradient the clip removes: below for negative advantages,
    above for positive ones.
    """
    return clipped_surrogate((logprobs_T - old_logprobs_T).exp(), advantages_T, epsilon_low, epsilon_high, delta)


def clipped_surrogate(
    ratio_T: Tensor, advantages_T: Tensor, epsilon_low: float, epsilon_high: float, delta: float | None
) -> tuple[Tensor, Metrics]:
    bounded_T = ratio_T.clamp(1 - epsilon_low, 1 + epsilon_high)
    first_T = ratio_T if delta is None else ratio_T.clamp(max=delta)
    loss_T = -torch.minimum(first_T * advantages_T, bounded_T * advantages_T)
    low_T = (ratio_T < 1 - epsilon_low) & (advantages_T < 0)
    high_T = (ratio_T > 1 + epsilon_high) & (advantages_T > 0)
    return loss_T, ratio_metrics(ratio_T, low_T, high_T)


def ratio_metrics(ratio: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Metrics:
    """Mean ratio, and the shares that are bounded below and above; over whatever the ratios are of, tokens or
    completions.
    """
    count = ratio.numel()
    metrics: Metrics = {"policy/ratio_mean": (ratio.detach().sum(), count)}
    if low is not None:
        metrics["policy/clip_low"] = (low.sum(), count)
    if high is not None:
        metrics["policy/clip_high"] = (high.sum(), count)
    return metrics


def importance_loss(logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor) -> tuple[Tensor, Metrics]:
    """The surrogate without any bound, [T]: -ratio A."""
    ratio_T = (logprobs_T - old_logprobs_T).exp()
    return -ratio_T * advantages_T, ratio_metrics(ratio_T)


def cispo_loss(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, *, epsilon_high: float
) -> tuple[Tensor, Metrics]:
    """CISPO, [T]: -sg(min(ratio, 1 + epsilon_high)) A log-prob (MiniMax-M1, arXiv:2506.13585).

    The weight is bounded, never the gradient: every token trains. The paper leaves the weight without a lower bound.
    """
    ratio_T = (logprobs_T - old_logprobs_T).exp().detach()
    loss_T = -ratio_T.clamp(max=1 + epsilon_high) * advantages_T * logprobs_T
    return loss_T, ratio_metrics(ratio_T, high=ratio_T > 1 + epsilon_high)


def sapo_loss(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, *, tau_positive: float, tau_negative: float
) -> tuple[Tensor, Metrics]:
    """SAPO, [T]: -(4 / tau) sigmoid(tau (ratio - 1)) A, with a tau for A > 0 and one for the rest (arXiv:2511.20347).

    A smooth gate in place of a clip: on-policy its slope is that of -ratio A, and falls off on both sides.
    """
    ratio_T = (logprobs_T - old_logprobs_T).exp()
    tau_T = torch.where(advantages_T > 0, tau_positive, tau_negative).to(ratio_T.dtype)
    return -4 / tau_T * torch.sigmoid(tau_T * (ratio_T - 1)) * advantages_T, ratio_metrics(ratio_T)


def dppo_loss(
    logprobs_T: Tensor,
    sampling_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    delta_low: float,
    delta_high: float,
    maximum: float,
) -> tuple[Tensor, Metrics]:
    """DPPO with binary total variation, [T]: -mask sg(min(ratio, maximum)) A log-prob (arXiv:2602.04879).

    Ratio and mask compare with the policy that sampled. A token is masked when its probability has risen by more than
    `delta_high` and A > 0, or fallen by more than `delta_low` and A < 0: a bound on probabilities, where PPO's is on
    their ratio.
    """
    ratio_T = (logprobs_T - sampling_logprobs_T).exp().detach()
    change_T = logprobs_T.detach().exp() - sampling_logprobs_T.exp()
    high_T = (change_T > delta_high) & (advantages_T > 0)
    low_T = (change_T < -delta_low) & (advantages_T < 0)
    loss_T = torch.where(high_T | low_T, 0.0, -ratio_T.clamp(max=maximum) * advantages_T * logprobs_T)
    return loss_T, ratio_metrics(ratio_T, low_T, high_T)


def covariance_penalised_loss(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, penalised_T: Tensor, coefficient: float
) -> tuple[Tensor, Metrics]:
    """KL-Cov, [T]: -ratio A, plus coefficient x |log ratio| on the penalised tokens (arXiv:2505.22617)."""
    loss_T, metrics = importance_loss(logprobs_T, old_logprobs_T, advantages_T)
    drift_T = (logprobs_T - old_logprobs_T).abs()
    return loss_T + coefficient * drift_T.where(penalised_T, 0.0), metrics


# MERGED: Policy losses of whole completions, spread over their tokens, [T]. Parts always hold whole completions.
#
# A completion's importance ratio is the geometric mean of its tokens', s = exp(mean log ratio): of the order of one
# token's ratio whatever the length. Metrics count completions. All losses are to be minimised.
#


def sequence_clipped_loss(
    tokens: TokenBatch, *, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> tuple[Tensor, Metrics]:
    """GSPO, [T]: -min(s A, clip(s, 1 - epsilon_low, 1 + epsilon_high) A) for every token (arXiv:2507.18071)."""
    ratio_N = sequence_means(tokens.logprobs_T - tokens.old_logprobs_T, tokens.lengths_N).exp()
    loss_N, metrics = clipped_surrogate(
        ratio_N, tokens.advantages_N.to(ratio_N.dtype), epsilon_low, epsilon_high, delta
    )
    return per_token(loss_N, tokens.lengths_N), metrics


def sequence_token_clipped_loss(
    tokens: TokenBatch, *, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> tuple[Tensor, Metrics]:
    """GSPO-token, [T]: the same value, with s_t = sg(s) x ratio / sg(ratio) of the token (arXiv:2507.18071, section
    4.3).

    Each token carries its own gradient, so that single tokens can be left out.
    """
    log_ratio_T = tokens.logprobs_T - tokens.old_logprobs_T
    ratio_N = sequence_means(log_ratio_T, tokens.lengths_N).exp().detach()
    ratio_T = per_token(ratio_N, tokens.lengths_N) * (log_ratio_T - log_ratio_T.detach()).exp()
    advantages_N = tokens.advantages_N.to(ratio_T.dtype)
    loss_T, _ = clipped_surrogate(ratio_T, per_token(advantages_N, tokens.lengths_N), epsilon_low, epsilon_high, delta)
    _, metrics = clipped_surrogate(ratio_N, advantages_N, epsilon_low, epsilon_high, delta)
    return loss_T, metrics


def geometric_mean_loss(
    tokens: TokenBatch, *, log_epsilon_low: float, log_epsilon_high: float
) -> tuple[Tensor, Metrics]:
    """GMPO, [T]: -A exp(mean of the tokens' clipped log ratios) for every token (arXiv:2507.20673).

    A token's log ratio is clipped above at `log_epsilon_high` if A > 0, and below at -`log_epsilon_low` if A < 0: PPO's
    pessimistic bound, before the geometric mean and not after.
    """
    log_ratio_T = tokens.logprobs_T - tokens.old_logprobs_T
    advantages_N = tokens.advantages_N.to(log_ratio_T.dtype)
    advantages_T = per_token(advantages_N, tokens.lengths_N)
    pessimistic_T = torch.where(
        advantages_T > 0, log_ratio_T.clamp(max=log_epsilon_high), log_ratio_T.clamp(min=-log_epsilon_low)
    )
    ratio_N = sequence_means(pessimistic_T, tokens.lengths_N).exp()
    low_T = (log_ratio_T < -log_epsilon_low) & (advantages_T < 0)
    high_T = (log_ratio_T > log_epsilon_high) & (advantages_T > 0)
    metrics = ratio_metrics(ratio_N) | {
        "policy/clip_low": (low_T.sum(), low_T.numel()),
        "policy/clip_high": (high_T.sum(), high_T.numel()),
    }
    return per_token(-advantages_N * ratio_N, tokens.lengths_N), metrics


def quadratic_loss(tokens: TokenBatch, *, tau: float) -> tuple[Tensor, Metrics]:
    """DRO, [T]: adds up over a completion to -A log-prob + tau / 2 (log ratio)^2, both of the whole completion.

    Kimi k1.5's form (arXiv:2501.12599) of direct reward optimisation (arXiv:2405.19107). The square's share of each
    token is the same.
    """
    advantages_T = per_token(tokens.advantages_N, tokens.lengths_N).to(tokens.logprobs_T.dtype)
    log_ratio_N = sequence_sums(tokens.logprobs_T - tokens.old_logprobs_T, tokens.lengths_N)
    penalty_N = 0.5 * tau * log_ratio_N.square() / tokens.lengths_N.to(log_ratio_N.device).clamp(min=1)
    loss_T = -advantages_T * tokens.logprobs_T + per_token(penalty_N, tokens.lengths_N)
    return loss_T, ratio_metrics((log_ratio_N / tokens.lengths_N.to(log_ratio_N.device).clamp(min=1)).exp())
