"""Presets whose loss weighs whole completions: each as its paper defines it, with the paper's defaults.

Options that act on single tokens (`top_entropy`, a mismatch correction by token) contradict that. GSPOToken, which has
them, is here beside GSPO.

No `from __future__ import annotations`: the command line reads the types of the options.
"""

from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from stateset_lightning.algorithm import losses
from stateset_lightning.algorithm.algorithm import Algorithm, fixed
from stateset_lightning.algorithm.presets import Clipped
from stateset_lightning.algorithm.terms import Mismatch


class GSPO(Clipped, loss=losses.sequence_clipped_loss):
    """Group sequence policy optimisation (arXiv:2507.18071; bounds of section 5.1).

    The ratio is the geometric mean of a completion's token ratios, and is clipped as one: far tighter than a token's.
    """

    epsilon_low = 3e-4
    epsilon_high = 4e-4
    top_entropy = fixed(None)
    weighs_completions = True


class LUSPO(GSPO):
    """Length-unbiased sequence policy optimisation (arXiv:2602.05261; bounds of section 5.1).

    GSPO with each completion's loss multiplied by its length, which is what adding up its tokens does.
    """

    epsilon_low = 2e-3
    epsilon_high = 2.5e-3
    aggregation = "sequence_sum"


class GSPOToken(Clipped, loss=losses.sequence_token_clipped_loss):
    """GSPO-token (arXiv:2507.18071, section 4.3).

    Value and gradient of GSPO, but each token carries its own gradient: `top_entropy` and corrections by token apply.
    """

    epsilon_low = 3e-4
    epsilon_high = 4e-4


class GMPO(Algorithm, loss=losses.geometric_mean_loss):
    """Geometric-mean policy optimisation (arXiv:2507.20673).

    The geometric mean of a completion's token ratios, each clipped before: an outlier among the tokens moves it less
    than an arithmetic mean.

    Args:
        log_epsilon_low: A token's log ratio is clipped below at -log_epsilon_low where the advantage is negative: a
            ratio of exp(-0.4).
        log_epsilon_high: A token's log ratio is clipped above at log_epsilon_high where the advantage is positive: a
            ratio of exp(0.4).
    """

    log_epsilon_low: Annotated[float, Gt(0)] = 0.4
    log_epsilon_high: Annotated[float, Gt(0)] = 0.4
    top_entropy = fixed(None)
    weighs_completions = True


class VESPO(Algorithm, loss=losses.gamma_weighted_loss):
    """Variational sequence-level soft policy optimisation (arXiv:2602.10693).

    The product W of a completion's token ratios, whatever its length, is turned into a weight W^k exp(lambda (1 - W)):
    1 on-policy, and falling off smoothly on both sides in place of a clip. The ratios are to the policy that sampled,
    the sampler's where its log-probs are known: a mismatch is part of them, and has no correction of its own.

    Args:
        k_positive: Exponent where the advantage is not negative.
        lambda_positive: Decay where the advantage is not negative.
        k_negative: Exponent where the advantage is negative.
        lambda_negative: Decay where the advantage is negative.
    """

    k_positive: Annotated[float, Ge(0)] = 2.0
    lambda_positive: Annotated[float, Gt(0)] = 3.0
    k_negative: Annotated[float, Ge(0)] = 3.0
    lambda_negative: Annotated[float, Gt(0)] = 2.0
    mismatch = fixed(Mismatch("none"))
    aggregation = "token_mean"


class DRO(Algorithm, loss=losses.quadratic_loss):
    """Direct reward optimisation (arXiv:2405.19107) in the form of Kimi k1.5 (arXiv:2501.12599).

    A policy gradient held back by the squared log ratio of each completion to the policy that sampled it, in place of a
    clip. No ratio weighs it, so it also learns from old samples. The group's mean takes the place of a learned value.
    Some implementations square each token's log ratio instead.

    Args:
        tau: Strength of the square. The papers name no number for language models.
    """

    tau: Annotated[float, Gt(0)] = 0.05
    top_entropy = fixed(None)
    scale = "none"
    aggregation = "sequence_sum"
    weighs_completions = True
    trains_on_zero_advantage: ClassVar[bool] = True  # the square pulls on every completion
