"""What an algorithm adds to a policy loss, and which tokens it acts on: KL, entropy, sampler mismatch, selections.

No `from __future__ import annotations`: the command line reads the types of `KL`, `AdaptiveEntropy` and `Mismatch`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from stateset_lightning.algorithm.aggregation import per_token, sequence_means, sequence_sums, token_advantages
from stateset_lightning.errors import ConfigError, bounded
from stateset_lightning.seeding import uniforms
from stateset_lightning.types import Metrics, TokenBatch


def needed(tokens: TokenBatch, name: str, option: str) -> Tensor:
    """A field of the batch that an option needs; ValueError where it was not filled in."""
    if (values := getattr(tokens, name)) is None:
        raise ValueError(f"model.algorithm.{option} needs TokenBatch.{name}, and there is none")
    return values


def sampler_logprobs(tokens: TokenBatch) -> Tensor:
    """Log-probs under the policy that sampled, [T]: the sampler's where they are known, else the old ones.

    One that is no finite number is not known: what was sampled had a probability.
    """
    if tokens.sampling_logprobs_T is None:
        return tokens.old_logprobs_T
    return tokens.sampling_logprobs_T.where(tokens.sampling_logprobs_T.isfinite(), tokens.old_logprobs_T)


# Nats that the logarithm of a ratio is held within, wherever an exponential is taken of it, as in verl and SkyRL. No
# ratio of use is out there, but exp overflows float32 at 88.7, and zero times infinity is a gradient of NaN.
LARGEST_LOG_RATIO = 20.0


def log_ratio(logprobs: Tensor, others: Tensor | float = 0.0) -> Tensor:
    """Log of the ratio of two probabilities, within `LARGEST_LOG_RATIO` of 0 (and without gradient beyond)."""
    return (logprobs - others).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


# KL(policy || reference), in nats -------------------------------------------------------------------------------------

Estimator = Literal["k1", "k2", "k3", "k3_unbiased"]


@bounded("model.algorithm.kl")
@dataclass(frozen=True)
class KL:
    """How the divergence from the reference policy is estimated and used. Its coefficient is the algorithm's `beta`.

    Args:
        estimator: `k1`, `k2` and `k3` are Schulman's; `k3_unbiased` is k3 times the importance ratio, whose gradient is
            that of the KL.
        place: `loss`: a term of every token's loss. `reward`: summed over a completion and subtracted from its reward,
            without gradient.
        target: Nats per token that an adaptive coefficient steers towards, starting at `beta`; None keeps the
            coefficient fixed.
        horizon: Optimizer steps over which an adaptive coefficient corrects an error; 10 is the paper's K_beta = 0.1
            (arXiv:1909.08593).
    """

    estimator: Estimator = "k3"
    place: Literal["loss", "reward"] = "loss"
    target: Annotated[float, Gt(0)] | None = None
    horizon: Annotated[int, Ge(1)] = 10

    def __post_init__(self) -> None:
        contradictions = {
            ("k1", "loss"): "in the loss has a gradient of zero in expectation and pulls nowhere: choose k2 or"
            " k3_unbiased, or kl.place='reward'",
            ("k3_unbiased", "reward"): "differs from k3 in its gradient alone, and a reward has none: choose k1 (whose"
            " policy gradient is that of the KL) or k3, or kl.place='loss'",
        }
        if said := contradictions.get((self.estimator, self.place)):
            raise ConfigError(f"model.algorithm.kl.estimator={self.estimator!r} {said}")

    def adapted(self, coefficient: float, kl: float) -> float:
        """The next coefficient, given the KL per token of the step that just ended (arXiv:1909.08593, section 2.2).

        It moves by at most 20 % / horizon: up while the KL is above its target, down while it is below.
        """
        assert self.target is not None
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return coefficient * (1 + error / self.horizon)


def kl_estimate(estimator: Estimator, logprobs_T: Tensor, ref_T: Tensor, old_T: Tensor | None = None) -> Tensor:
    """One estimate per token, [T]; `old_T`, of the policy that sampled, are read by `k3_unbiased` alone.

    `k3_unbiased` (DeepSeek-V3.2, arXiv:2512.02556) is k3 times the importance ratio exp(policy - old), differentiated
    through both. The mean over the sampling policy of ratio x k3 is the mean of k3 over the policy itself, which is the
    KL, as a function of the policy's parameters; so value and gradient are unbiased, also after the first optimizer
    step of an episode. While the policy is the one that sampled, the ratio is 1, the value is k3's and the gradient is
    (policy - reference) x that of the log-prob, as k2's.
    """
    if estimator == "k1":
        return logprobs_T - ref_T
    if estimator == "k2":
        return 0.5 * (logprobs_T - ref_T).square()
    if estimator == "k3":
        return k3(logprobs_T, ref_T)
    assert old_T is not None
    return log_ratio(logprobs_T, old_T).exp() * k3(logprobs_T, ref_T)


def k3(logprobs_T: Tensor, ref_T: Tensor) -> Tensor:
    """KL(policy || reference) by the k3 estimate, [T]: exp(d) - d - 1 with d = reference - policy.

    Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); GRPO, arXiv:2402.03300, equation 4. Never
    negative; its value is unbiased, its gradient is that of KL(reference || policy).
    """
    difference_T = log_ratio(ref_T, logprobs_T)
    return torch.expm1(difference_T) - difference_T


# Entropy bonus --------------------------------------------------------------------------------------------------------


@bounded("model.algorithm.adaptive_entropy")
@dataclass(frozen=True)
class AdaptiveEntropy:
    """Keeps the entropy from falling below a target (Skywork-OR1, arXiv:2505.22312, whose numbers are the defaults).

    After each optimizer step the coefficient of the bonus rises by `delta` if the entropy was below the target, and
    falls by `delta`, to no less than 0, if not. The bonus is applied only while the newest entropy is at or below the
    target.

    Args:
        target: Mean entropy of a token, in nats. Sensible values are below the entropy at the start of the run
            (`policy/entropy`).
        delta: Change of the coefficient per optimizer step.
        maximum: The coefficient never exceeds this.
    """

    target: Annotated[float, Gt(0)] = 0.2
    delta: Annotated[float, Gt(0)] = 1e-4
    maximum: Annotated[float, Ge(0)] = 0.005

    def adapted(self, coefficient: float, entropy: float) -> float:
        """The next coefficient, given the entropy of the step that just ended."""
        step = self.delta if entropy < self.target else -self.delta
        return min(max(coefficient + step, 0.0), self.maximum)


# A sampler whose log-probs differ from the trainer's ------------------------------------------------------------------
#
# A serving engine with other kernels, or another precision, samples from a slightly different policy than the one that
# is trained. An engine in this process samples from the same one, so there is nothing to correct.

# (low, high) of each kind.
_BOUNDS = {"none": (0.0, math.inf), "token_tis": (0.0, 2.0), "sequence_tis": (0.0, 2.0), "icepop": (0.5, 5.0)}
_BOUNDS |= {"sequence_mask": (0.999, 1.002), "product_mask": (0.0, 3.0)}


@bounded("model.algorithm.mismatch")
@dataclass(frozen=True)
class Mismatch:
    """Which correction, and its bounds.

    With w = exp(old - sampling) of a token, its policy loss is multiplied by this factor, without gradient:

    - `token_tis`: w held within low and high, 0 and 2: truncated importance sampling (Yao et al., "Your efficient RL
      framework secretly brings you off-policy RL training", 2025);
    - `sequence_tis`: the product of the completion's w, held within low and high, 0 and 2, for all its tokens;
    - `icepop`: w where low <= w <= high, else 0; low 0.5, high 5 (arXiv:2510.18855);
    - `sequence_mask`: w where low <= geometric mean of the completion's w <= high, else 0; low 0.999, high 1.002;
    - `product_mask`: the product of the completion's w where low <= product <= high, else 0, for all its tokens; low 0,
      high 3. TRL's `sequence_mask`;
    - `none`: 1, also where another correction would be the default.

    Where the sampler's log-prob is no finite number, its w is not known and taken to be 1.

    Args:
        kind: Truncate or mask, by token or by completion.
        low: Lower bound; None for the kind's own.
        high: Upper bound; None for the kind's own.
    """

    kind: Literal["none", "token_tis", "sequence_tis", "icepop", "sequence_mask", "product_mask"] = "token_tis"
    low: Annotated[float, Ge(0)] | None = None
    high: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and self.kind == "none":
                raise ConfigError(f"model.algorithm.mismatch.{name}={bound} has no effect on kind='none': remove it")
        low, high = self.bounds
        if low >= high:
            raise ConfigError(f"model.algorithm.mismatch.low={low} must be below high={high}")

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high), with the kind's own where none was given."""
        low, high = _BOUNDS[self.kind]
        return (low if self.low is None else self.low, high if self.high is None else self.high)


@torch.no_grad()
def mismatch_weights(tokens: TokenBatch, mismatch: Mismatch) -> Tensor:
    """Factor of each token's policy loss, [T]."""
    low, high = mismatch.bounds
    log_weights_T = log_ratio(tokens.old_logprobs_T, sampler_logprobs(tokens))
    weights_T = log_weights_T.exp()

    def of_completions(reduced_N: Tensor) -> Tensor:
        return per_token(log_ratio(reduced_N).exp(), tokens.lengths_N, len(weights_T))

    if mismatch.kind in ("sequence_tis", "product_mask"):
        weights_T = of_completions(sequence_sums(log_weights_T, tokens.lengths_N))
    if mismatch.kind in ("token_tis", "sequence_tis"):
        return weights_T.clamp(low, high)
    judged_T = weights_T
    if mismatch.kind == "sequence_mask":
        judged_T = of_completions(sequence_means(log_weights_T, tokens.lengths_N))
    return torch.where((judged_T >= low) & (judged_T <= high), weights_T, 0.0)


@torch.no_grad()
def mismatch_metrics(tokens: TokenBatch) -> Metrics:
    """How far the sampler is from the trainer, before any correction; nothing where it is not known.

    `mismatch/kl` is KL(sampler || trainer) per token, by k3. `mismatch/weight` is the mean of w, 1 in expectation.
    `mismatch/ess` is sum(w) / sum(w^2): times the mean of w, once that is known of all micro-steps and ranks, it is the
    effective sample size as a share, 1 / mean((w / mean w)^2). `mismatch/unknown` counts log-probs that are no numbers;
    the others leave them out.
    """
    if tokens.sampling_logprobs_T is None:
        return {}
    known_T, sampling_T = tokens.sampling_logprobs_T.isfinite(), sampler_logprobs(tokens)
    weights_T, count = log_ratio(tokens.old_logprobs_T, sampling_T).exp() * known_T, known_T.sum()
    return {
        "mismatch/kl": (k3(sampling_T, tokens.old_logprobs_T).sum(), count),  # 0 where it is not known
        "mismatch/weight": (weights_T.sum(), count),
        "mismatch/ess": (weights_T.sum(), weights_T.square().sum()),
        "mismatch/unknown": ((~known_T).sum(), known_T.numel()),
    }


# Which completions and tokens the policy loss acts on -----------------------------------------------------------------
#
# A selection depends on the policy, so it never changes what a loss is divided by. Tokens are selected once per
# optimizer step, before its first backward, among the tokens of all ranks.


@torch.no_grad()
def on_policy(tokens: TokenBatch, threshold: float) -> Tensor:
    """Completions that the off-policy sequence mask keeps, bool [N] (DeepSeek-V3.2, arXiv:2512.02556, equation 9).

    Left out are those with a negative advantage whose mean of (sampling log-prob - log-prob) is above `threshold`; the
    log-probs are the sampler's where they are known, else the old ones.
    """
    drift_N = sequence_means(sampler_logprobs(tokens) - tokens.logprobs_T, tokens.lengths_N)
    return (tokens.advantages_N >= 0) | (drift_N <= threshold)


def top_entropy_tokens(entropies_T: Tensor, share: float) -> Tensor:
    """The tokens whose entropy is at or above the (1 - share) quantile, bool [T] (arXiv:2506.01939).

    Of several with the threshold's entropy the first are kept, so that the number is the same whatever the entropies.
    """
    return largest(entropies_T, math.floor(share * (entropies_T.numel() - 1) + 1e-9) + 1)


def largest(values_T: Tensor, count: int) -> Tensor:
    """The `count` largest values, bool [T]; of equal ones the first."""
    first_T = values_T.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(values_T, dtype=torch.bool).index_fill(0, first_T, True)


def covariances(tokens: TokenBatch) -> Tensor:
    """Each token's part of the covariance of log-prob and advantage, [T] (arXiv:2505.22617).

    (log-prob - mean) (advantage - mean), the means over the tokens given. Its mean is what drives the entropy down.
    """
    advantages_T, logprobs_T = token_advantages(tokens).double(), tokens.logprobs_T.double()
    return (logprobs_T - logprobs_T.mean()) * (advantages_T - advantages_T.mean())


def draw(candidates_T: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of the candidates, drawn at random from `seed`, bool [T]."""
    noise_T = torch.from_numpy(uniforms([seed], candidates_T.numel())[0]).to(candidates_T.device)
    return candidates_T & largest(noise_T.where(candidates_T, -1.0), count)
