"""Policy losses of whole completions, spread over their tokens, [T]. Parts always hold whole completions.

A completion's importance ratio is the geometric mean of its tokens', s = exp(mean log ratio): of the order of one
token's ratio whatever the length. Metrics count completions. All losses are to be minimised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateset_lightning.algorithm.losses import clipped_surrogate, ratio_metrics
from stateset_lightning.algorithm.segments import per_token, sequence_means, sequence_sums
from stateset_lightning.types import Metrics, TokenBatch


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
