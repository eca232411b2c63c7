"""Correction for a sampler whose log-probs differ from the trainer's: weights exp(old - sampling), without gradient.

A serving engine with other kernels, or another precision, samples from a slightly different policy than the one
trained. With an engine in this process there is nothing to correct. No `from __future__ import annotations`: the
command line reads `Mismatch`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from stateset_lightning.algorithm.segments import per_token, sequence_means, sequence_sums
from stateset_lightning.bounds import check_bounds
from stateset_lightning.errors import ConfigError
from stateset_lightning.types import Metrics

# (low, high) of each kind; truncation has an upper bound alone.
_BOUNDS = {
    "none": (0.0, math.inf),
    "token_tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "sequence_mask": (0.999, 1.002),
}


@dataclass(frozen=True)
class Mismatch:
    """Which correction, and its bounds.

    With w_t = exp(old - sampling) of a token:
        token_tis       min(w_t, high), high 2: truncated importance sampling (Yao et al., "Your efficient RL framework
        secretly
                        brings you off-policy RL training", 2025)
        sequence_tis    min(product of the completion's w_t, high), high 2, for all its tokens
        icepop          w_t where low <= w_t <= high, 0 elsewhere, 0.5 and 5 (arXiv:2510.18855)
        sequence_mask   w_t where low <= geometric mean of the completion's w_t <= high, 0 elsewhere, 0.999 and 1.002
        none            1, also where a correction is the default
    """

    kind: Literal["none", "token_tis", "sequence_tis", "icepop", "sequence_mask"] = "token_tis"
    """Truncate or mask, by token or by completion."""
    low: Annotated[float, Ge(0)] | None = None
    """Lower bound of a mask; None for the kind's own."""
    high: Annotated[float, Gt(0)] | None = None
    """Upper bound; None for the kind's own."""

    def __post_init__(self) -> None:
        check_bounds("model.algorithm.mismatch", type(self), vars(self))
        if self.low is not None and _BOUNDS[self.kind][0] == 0:
            raise ConfigError(
                f"model.algorithm.mismatch.low={self.low} has no effect on kind={self.kind!r}, which truncates from"
                " above only: remove it, or choose icepop or sequence_mask"
            )
        if self.high is not None and self.kind == "none":
            raise ConfigError(f"model.algorithm.mismatch.high={self.high} has no effect on kind='none': remove it")
        low, high = self.bounds
        if low >= high:
            raise ConfigError(f"model.algorithm.mismatch.low={low} must be below high={high}")

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high), with the kind's own where none was given."""
        low, high = _BOUNDS[self.kind]
        return (low if self.low is None else self.low, high if self.high is None else self.high)


@torch.no_grad()
def mismatch_weights(
    old_logprobs_T: Tensor, sampling_logprobs_T: Tensor, lengths_N: Tensor, mismatch: Mismatch
) -> Tensor:
    """Factor of each token's policy loss, [T]."""
    low, high = mismatch.bounds
    log_weights_T = old_logprobs_T - sampling_logprobs_T
    weights_T = log_weights_T.exp()
    if mismatch.kind == "token_tis":
        return weights_T.clamp(max=high)
    if mismatch.kind == "sequence_tis":
        return per_token(sequence_sums(log_weights_T, lengths_N).exp().clamp(max=high), lengths_N)
    judged_T = weights_T
    if mismatch.kind == "sequence_mask":
        judged_T = per_token(sequence_means(log_weights_T, lengths_N).exp(), lengths_N)
    return torch.where((judged_T >= low) & (judged_T <= high), weights_T, 0.0)


@torch.no_grad()
def mismatch_metrics(old_logprobs_T: Tensor, sampling_logprobs_T: Tensor) -> Metrics:
    """How far the sampler is from the trainer, before any correction.

    `mismatch/kl` is KL(sampler || trainer) per token, by k3. `mismatch/ess` is the effective sample size as a share, 1
    / mean(w^2): the mean of w is 1 in expectation, so this is 1 / (1 + chi-square divergence), and its sum and count
    add up over parts.
    """
    log_weights_T = old_logprobs_T - sampling_logprobs_T
    count = log_weights_T.numel()
    return {
        "mismatch/kl": ((torch.expm1(log_weights_T) - log_weights_T).sum(), count),
        "mismatch/ess": (float(count), (2 * log_weights_T).exp().sum()),
    }
