"""Policy losses: pure functions of a `TokenBatch` and the options of a preset.

Each returns the loss of each token, [T], to be minimised and not yet weighted, and metrics as (sum, count). The
importance ratio is exp(log-prob now - log-prob when the episode was sampled). What a paper holds fixed (stop-gradient,
sg) is detached. A is the advantage.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from stateset_lightning.algorithm.aggregation import per_token, sequence_means, sequence_sums, token_advantages
from stateset_lightning.algorithm.terms import log_ratio, needed, sampler_logprobs
from stateset_lightning.types import Metrics, TokenBatch

Loss = tuple[Tensor, Metrics]  # of each token, and metrics


def advantages_of(tokens: TokenBatch) -> Tensor:
    """The advantage of each token, its own or its completion's, [T], in the precision of the log-probs."""
    return token_advantages(tokens).to(tokens.logprobs_T.dtype)


def log_ratios(tokens: TokenBatch) -> Tensor:
    """Log-prob now - log-prob when the episode was sampled, [T], within 20 nats (`LARGEST_LOG_RATIO`)."""
    return log_ratio(tokens.logprobs_T, tokens.old_logprobs_T)


def ratio_metrics(ratio: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Metrics:
    """Mean ratio, and the shares bounded below and above; of tokens or of completions, whatever is given."""
    averaged = {"policy/ratio_mean": ratio.detach(), "policy/clip_low": low, "policy/clip_high": high}
    return {name: (values.sum(), values.numel()) for name, values in averaged.items() if values is not None}


def beyond(values: Tensor, low: float, high: float, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """What has moved below `low` where the advantage is negative, and above `high` where it is positive: far enough."""
    return (values < low) & (advantages < 0), (values > high) & (advantages > 0)


# The ratio of a token -------------------------------------------------------------------------------------------------


def policy_gradient_loss(tokens: TokenBatch) -> Loss:
    """REINFORCE, [T]: -A log-prob.

    There is no importance ratio, so it is right for the policy that sampled: for one optimizer step per episode.
    """
    return -advantages_of(tokens) * tokens.logprobs_T, {}


def importance_loss(tokens: TokenBatch) -> Loss:
    """The surrogate without any bound, [T]: -ratio A."""
    ratio_T = log_ratios(tokens).exp()
    return -ratio_T * advantages_of(tokens), ratio_metrics(ratio_T)


def clipped_loss(tokens: TokenBatch, *, epsilon_low: float, epsilon_high: float, delta: float | None = None) -> Loss:
    """PPO's clipped surrogate, [T]: -min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A).

    arXiv:1707.06347, equation 7; separate bounds ("clip-higher"): arXiv:2503.14476, equation 10. With `delta` the first
    ratio is at most delta (two-sided bound, arXiv:2505.07291; above 1 + epsilon_high it is dual clip's c,
    arXiv:1912.09729). The clip metrics count tokens whose gradient the clip removes: below for negative advantages,
    above for positive ones.
    """
    return _clipped(log_ratios(tokens).exp(), advantages_of(tokens), epsilon_low, epsilon_high, delta)


def _clipped(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, delta: float | None) -> Loss:
    bounded = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    first = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.minimum(first * advantages, bounded * advantages)
    return loss, ratio_metrics(ratio, *beyond(ratio, 1 - epsilon_low, 1 + epsilon_high, advantages))


def cispo_loss(tokens: TokenBatch, *, epsilon_high: float) -> Loss:
    """CISPO, [T]: -sg(min(ratio, 1 + epsilon_high)) A log-prob (MiniMax-M1, arXiv:2506.13585).

    The weight is bounded, never the gradient: every token trains. The paper leaves the weight without a lower bound.
    """
    ratio_T = log_ratios(tokens).exp().detach()
    loss_T = -ratio_T.clamp(max=1 + epsilon_high) * advantages_of(tokens) * tokens.logprobs_T
    return loss_T, ratio_metrics(ratio_T, high=ratio_T > 1 + epsilon_high)


def sapo_loss(tokens: TokenBatch, *, tau_positive: float, tau_negative: float) -> Loss:
    """SAPO, [T]: -(4 / tau) sigmoid(tau (ratio - 1)) A, with one tau for A > 0 and one for the rest (arXiv:2511.20347).

    A smooth gate in place of a clip: on-policy its slope is that of -ratio A, and it falls off on both sides.
    """
    ratio_T, advantages_T = log_ratios(tokens).exp(), advantages_of(tokens)
    tau_T = torch.full_like(ratio_T, tau_negative).masked_fill(advantages_T > 0, tau_positive)
    return -4 / tau_T * torch.sigmoid(tau_T * (ratio_T - 1)) * advantages_T, ratio_metrics(ratio_T)


Divergence = Literal["tv", "kl"]


def dppo_loss(
    tokens: TokenBatch, *, divergence: Divergence, delta_low: float, delta_high: float, maximum_ratio: float
) -> Loss:
    """DPPO, [T]: -mask sg(min(ratio, maximum_ratio)) A log-prob (arXiv:2602.04879).

    Ratio and mask compare with the sampler's log-probs where they are known. A token is masked when its probability has
    risen too far and A > 0, or fallen too far and A < 0: a bound on probabilities, where PPO's is on their ratio. Too
    far is a divergence, of the token against all others, above `delta_high` and `delta_low`: the total variation, which
    is the difference of the probabilities p then and q now, or KL = p log(p / q) + (1 - p) log((1 - p) / (1 - q)).
    """
    logprobs_T, sampling_T, advantages_T = tokens.logprobs_T, sampler_logprobs(tokens), advantages_of(tokens)
    ratio_T = log_ratio(logprobs_T, sampling_T).exp().detach()
    was_T, is_T = sampling_T.exp(), logprobs_T.detach().exp()
    moved_T = is_T - was_T
    if divergence == "kl":
        rest_T = log_ratio((1 - was_T).clamp(min=1e-8).log(), (1 - is_T).clamp(min=1e-8).log())
        moved_T = moved_T.sign() * (was_T * log_ratio(sampling_T, logprobs_T.detach()) + (1 - was_T) * rest_T)
    low_T, high_T = beyond(moved_T, -delta_low, delta_high, advantages_T)
    loss_T = torch.where(high_T | low_T, 0.0, -ratio_T.clamp(max=maximum_ratio) * advantages_T * logprobs_T)
    return loss_T, ratio_metrics(ratio_T, low_T, high_T)


def clip_cov_loss(tokens: TokenBatch, *, epsilon_low: float | None, epsilon_high: float | None) -> Loss:
    """Clip-Cov, [T]: -ratio A on the selected tokens, 0 on the others (arXiv:2505.22617).

    An epsilon is a bound of PPO's surrogate, None for none.
    """
    low, high = (math.inf if epsilon is None else epsilon for epsilon in (epsilon_low, epsilon_high))
    loss_T, metrics = _clipped(log_ratios(tokens).exp(), advantages_of(tokens), low, high, None)
    return torch.where(needed(tokens, "select_T", "share"), loss_T, 0.0), metrics


def kl_cov_loss(tokens: TokenBatch, *, coefficient: float) -> Loss:
    """KL-Cov, [T]: -ratio A, plus coefficient x |log ratio| on the tokens not selected (arXiv:2505.22617)."""
    loss_T, metrics = importance_loss(tokens)
    drift_T = (tokens.logprobs_T - tokens.old_logprobs_T).abs()  # however far, it is pulled back
    return loss_T + coefficient * drift_T.where(~needed(tokens, "select_T", "share"), 0.0), metrics


# The ratio of a completion --------------------------------------------------------------------------------------------
#
# It is the geometric mean of its tokens' ratios, exp(mean log ratio): of the order of one token's ratio whatever the
# length. Clip metrics of GSPO count completions. The tokens of a completion are never split among micro-steps.


def sequence_clipped_loss(tokens: TokenBatch, *, epsilon_low: float, epsilon_high: float, delta: float | None) -> Loss:
    """GSPO, [T]: for every token its completion's -min(s A, clip(s, 1 - epsilon_low, 1 + epsilon_high) A).

    arXiv:2507.18071; s is the completion's ratio.
    """
    ratio_N = sequence_means(log_ratios(tokens), tokens.lengths_N).exp()
    loss_N, metrics = _clipped(ratio_N, _completion_advantages(tokens), epsilon_low, epsilon_high, delta)
    return per_token(loss_N, tokens.lengths_N, len(tokens.logprobs_T)), metrics


def sequence_token_clipped_loss(
    tokens: TokenBatch, *, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> Loss:
    """GSPO-token, [T]: GSPO's value, with s_t = sg(s) x ratio / sg(ratio) of the token (arXiv:2507.18071, section 4.3).

    Each token carries its own gradient, so single tokens can be left out or have an advantage of their own.
    """
    log_ratio_T = log_ratios(tokens)
    ratio_N = sequence_means(log_ratio_T, tokens.lengths_N).exp().detach()
    ratio_T = per_token(ratio_N, tokens.lengths_N, len(log_ratio_T)) * (log_ratio_T - log_ratio_T.detach()).exp()
    loss_T, _ = _clipped(ratio_T, advantages_of(tokens), epsilon_low, epsilon_high, delta)
    _, metrics = _clipped(ratio_N, tokens.advantages_N.to(ratio_N.dtype), epsilon_low, epsilon_high, delta)
    return loss_T, metrics


def geometric_mean_loss(tokens: TokenBatch, *, log_epsilon_low: float, log_epsilon_high: float) -> Loss:
    """GMPO, [T]: for every token its completion's -A exp(mean of the clipped log ratios) (arXiv:2507.20673).

    A token's log ratio is clipped above at `log_epsilon_high` if A > 0, and below at -`log_epsilon_low` if A < 0: PPO's
    pessimistic bound, before the geometric mean and not after. Clip metrics count tokens.
    """
    log_ratio_T, advantages_N = log_ratios(tokens), _completion_advantages(tokens)
    advantages_T = per_token(advantages_N, tokens.lengths_N, len(log_ratio_T))
    low, high = -log_epsilon_low, log_epsilon_high
    pessimistic_T = torch.where(advantages_T > 0, log_ratio_T.clamp(max=high), log_ratio_T.clamp(min=low))
    ratio_N = sequence_means(pessimistic_T, tokens.lengths_N).exp()
    clipped_T = beyond(log_ratio_T, low, high, advantages_T)
    return per_token(-advantages_N * ratio_N, tokens.lengths_N, len(log_ratio_T)), ratio_metrics(ratio_N, *clipped_T)


def gamma_weighted_loss(
    tokens: TokenBatch, *, k_positive: float, lambda_positive: float, k_negative: float, lambda_negative: float
) -> Loss:
    """VESPO, [T]: -sg(W^k exp(lambda (1 - W))) A log-prob (arXiv:2602.10693).

    W is the product of the ratios of a completion's tokens to the policy that sampled, the sampler's log-probs where
    they are known; k and lambda are the positive ones where A >= 0. The weight is 1 where W is.
    """
    advantages_T, log_ratio_T = advantages_of(tokens), log_ratio(tokens.logprobs_T.detach(), sampler_logprobs(tokens))
    log_ratio_N = log_ratio(sequence_sums(log_ratio_T, tokens.lengths_N))
    log_ratio_T = per_token(log_ratio_N, tokens.lengths_N, len(log_ratio_T))
    positive_T = k_positive * log_ratio_T - lambda_positive * torch.expm1(log_ratio_T)
    negative_T = k_negative * log_ratio_T - lambda_negative * torch.expm1(log_ratio_T)
    weights_T = torch.where(advantages_T >= 0, positive_T, negative_T).exp()
    return -weights_T * advantages_T * tokens.logprobs_T, ratio_metrics(log_ratio_N.exp())


def quadratic_loss(tokens: TokenBatch, *, tau: float) -> Loss:
    """DRO, [T]: adds up over a completion to -A log-prob + tau / 2 (log ratio)^2, both of the completion.

    Kimi k1.5's form (arXiv:2501.12599) of direct reward optimisation (arXiv:2405.19107). Every token of a completion
    bears the same share of the square.
    """
    mean_N = sequence_means(tokens.logprobs_T - tokens.old_logprobs_T, tokens.lengths_N)  # however far
    share_N = 0.5 * tau * mean_N.square() * tokens.lengths_N.to(mean_N)  # (sum of log ratios)^2 / length
    penalty_T = per_token(share_N, tokens.lengths_N, len(tokens.logprobs_T))
    return -advantages_of(tokens) * tokens.logprobs_T + penalty_T, ratio_metrics(log_ratio(mean_N).exp())


def _completion_advantages(tokens: TokenBatch) -> Tensor:
    """The advantages of the completions, [N]; ValueError where tokens have their own."""
    if tokens.advantages_T is not None:
        raise ValueError("a ratio of whole completions takes no advantages of single tokens: use GSPOToken instead")
    return tokens.advantages_N.to(tokens.logprobs_T.dtype)
