"""KL(policy || reference): its estimates, where it enters, and its coefficient. Estimates are in nats, [T].

No `from __future__ import annotations`: the command line reads `KL`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from stateset_lightning.bounds import check_bounds
from stateset_lightning.errors import ConfigError

Estimator = Literal["k1", "k2", "k3", "k3_unbiased"]


@dataclass(frozen=True)
class KL:
    """How the divergence from the reference is estimated and used. Its coefficient is the algorithm's `beta`."""

    estimator: Estimator = "k3"
    """`k1`, `k2` and `k3` are Schulman's; `k3_unbiased` is k3 times the importance ratio, whose gradient is that of the
    KL.
    """
    place: Literal["loss", "reward"] = "loss"
    """`loss`: a term of every token's loss. `reward`: summed over a completion and subtracted from its reward, without
    gradient.
    """
    target: Annotated[float, Gt(0)] | None = None
    """Nats per token that an adaptive coefficient steers towards, starting at `beta`; None keeps the coefficient
    fixed.
    """
    horizon: Annotated[int, Ge(1)] = 10
    """Optimizer steps over which an adaptive coefficient corrects an error; 10 is the paper's K_beta = 0.1
    (arXiv:1909.08593).
    """

    def __post_init__(self) -> None:
        check_bounds("model.algorithm.kl", type(self), vars(self))
        if (self.estimator, self.place) == ("k1", "loss"):
            raise ConfigError(
                "model.algorithm.kl.estimator='k1' in the loss has a gradient of zero in expectation and pulls nowhere:"
                " choose k2 or k3_unbiased, or kl.place='reward'"
            )
        if (self.estimator, self.place) == ("k3_unbiased", "reward"):
            raise ConfigError(
                "model.algorithm.kl.estimator='k3_unbiased' differs from k3 in its gradient alone, and a reward has"
                " none: choose k1 (whose policy gradient is that of the KL) or k3, or kl.place='loss'"
            )


def kl_estimate(
    estimator: Estimator, logprobs_T: Tensor, ref_logprobs_T: Tensor, old_logprobs_T: Tensor | None = None
) -> Tensor:
    """One estimate per token, [T]. `old_logprobs_T` are those of the policy that sampled; only k3_unbiased reads
    them.
    """
    if estimator == "k1":
        return logprobs_T - ref_logprobs_T
    if estimator == "k2":
        return 0.5 * (logprobs_T - ref_logprobs_T).square()
    if estimator == "k3":
        return k3(logprobs_T, ref_logprobs_T)
    assert old_logprobs_T is not None
    return k3_unbiased(logprobs_T, ref_logprobs_T, old_logprobs_T)


def k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """KL(policy || reference) by the k3 estimate, [T]: exp(d) - d - 1 with d = reference - policy.

    Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); GRPO, arXiv:2402.03300, equation 4. Never
    negative; its value is unbiased, its gradient is that of KL(reference || policy).
    """
    difference_T = ref_logprobs_T - logprobs_T
    return torch.expm1(difference_T) - difference_T


def k3_unbiased(logprobs_T: Tensor, ref_logprobs_T: Tensor, old_logprobs_T: Tensor) -> Tensor:
    """k3 times the importance ratio exp(policy - old), differentiated through both, [T] (DeepSeek-V3.2,
    arXiv:2512.02556).

    The mean over the sampling policy of ratio x k3 is the mean of k3 over the policy itself, hence the KL, as a
    function of the policy's parameters; so value and gradient are both unbiased, also after the first optimizer step of
    an episode. While the policy is the one that sampled, the ratio is 1, the value is k3's and the gradient is (policy
    - reference) x that of the log-prob, as k2's.
    """
    return (logprobs_T - old_logprobs_T).exp() * k3(logprobs_T, ref_logprobs_T)


def adapted_coefficient(coefficient: float, kl: float, config: KL) -> float:
    """The next KL coefficient, arXiv:1909.08593, section 2.2: it grows by at most 20 % / horizon while the KL is above
    its target.
    """
    assert config.target is not None
    error = min(max(kl / config.target - 1, -0.2), 0.2)
    return coefficient * (1 + error / config.horizon)
