"""Per-token policy losses and KL estimates. Pure functions of log-probs, packed [T]; no normalisation in here.

Losses are to be minimised. `ratio_T` is exp(log-prob now - log-prob when the episode was sampled).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateset_lightning.types import Metrics


def per_token(values_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Repeats a value per completion for each of its tokens: [N] -> [T]."""
    return values_N.repeat_interleave(lengths_N.to(values_N.device), dim=0)


def clipped_loss(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, *, epsilon_low: float, epsilon_high: float
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate, [T]: -min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A).

    arXiv:1707.06347, equation 7; separate bounds ("clip-higher"): arXiv:2503.14476, equation 10. The clip metrics count tokens
    whose gradient the bound removes: below for negative advantages, above for positive ones.
    """
    ratio_T = (logprobs_T - old_logprobs_T).exp()
    bounded_T = ratio_T.clamp(1 - epsilon_low, 1 + epsilon_high)
    loss_T = -torch.minimum(ratio_T * advantages_T, bounded_T * advantages_T)
    with torch.no_grad():
        low = ((ratio_T < 1 - epsilon_low) & (advantages_T < 0)).sum()
        high = ((ratio_T > 1 + epsilon_high) & (advantages_T > 0)).sum()
        metrics: Metrics = {
            "policy/ratio_mean": (ratio_T.sum(), ratio_T.numel()),
            "policy/clip_low": (low, ratio_T.numel()),
            "policy/clip_high": (high, ratio_T.numel()),
        }
    return loss_T, metrics


def k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """KL(policy || reference) by the k3 estimate, [T]: exp(d) - d - 1 with d = reference - policy.

    Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); GRPO, arXiv:2402.03300, equation 4. Never negative;
    its value is unbiased, its gradient is not that of the KL.
    """
    difference_T = ref_logprobs_T - logprobs_T
    return torch.expm1(difference_T) - difference_T
