"""Presets whose importance ratio is of whole completions: each as its paper defines it, with the paper's defaults.

Options that act on single tokens (`top_entropy`, a mismatch correction by token) contradict such a ratio, and are not
there.
"""

from typing import Annotated, Any

from annotated_types import Gt, Lt
from torch import Tensor

from stateset_lightning.algorithm.advantages import Scale
from stateset_lightning.algorithm.aggregation import Aggregation
from stateset_lightning.algorithm.algorithm import Algorithm
from stateset_lightning.algorithm.clipped_presets import Clipped
from stateset_lightning.algorithm.losses import (
    geometric_mean_loss,
    quadratic_loss,
    sequence_clipped_loss,
    sequence_token_clipped_loss,
)
from stateset_lightning.algorithm.terms import Mismatch
from stateset_lightning.errors import ConfigError, check_bounds
from stateset_lightning.types import Metrics, TokenBatch


class GSPO(Clipped):
    """Group sequence policy optimisation (arXiv:2507.18071; bounds of section 5.1).

    The ratio is the geometric mean of a completion's token ratios, and is clipped as one: far tighter than a token's.
    """

    elsewhere = Mismatch("sequence_tis")

    def __init__(
        self,
        *,
        epsilon_low: Annotated[float, Gt(0), Lt(1)] = 3e-4,
        epsilon_high: Annotated[float, Gt(0)] | None = 4e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(epsilon_low=epsilon_low, epsilon_high=epsilon_high, top_entropy=None, **kwargs)
        refuse_token_mismatch(self)

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        return sequence_clipped_loss(
            tokens, epsilon_low=self.epsilon_low, epsilon_high=self.epsilon_high, delta=self.delta
        )


class LUSPO(GSPO):
    """Length-unbiased sequence policy optimisation (arXiv:2602.05261; bounds of section 5.1).

    GSPO with each completion's loss multiplied by its length, which is what adding up its tokens does.
    """

    def __init__(
        self,
        *,
        epsilon_low: Annotated[float, Gt(0), Lt(1)] = 2e-3,
        epsilon_high: Annotated[float, Gt(0)] | None = 2.5e-3,
        aggregation: Aggregation = "sequence_sum",
        **kwargs: Any,
    ) -> None:
        super().__init__(epsilon_low=epsilon_low, epsilon_high=epsilon_high, aggregation=aggregation, **kwargs)


class GSPOToken(Clipped):
    """GSPO-token (arXiv:2507.18071, section 4.3).

    Value and gradient of GSPO, but each token carries its own gradient: `top_entropy` and corrections by token apply.
    """

    def __init__(
        self,
        *,
        epsilon_low: Annotated[float, Gt(0), Lt(1)] = 3e-4,
        epsilon_high: Annotated[float, Gt(0)] | None = 4e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(epsilon_low=epsilon_low, epsilon_high=epsilon_high, **kwargs)

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        return sequence_token_clipped_loss(
            tokens, epsilon_low=self.epsilon_low, epsilon_high=self.epsilon_high, delta=self.delta
        )


class GMPO(Algorithm):
    """Geometric-mean policy optimisation (arXiv:2507.20673).

    The geometric mean of a completion's token ratios, each clipped before: an outlier among the tokens moves it less
    than an arithmetic mean.

    Args:
        log_epsilon_low: A token's log ratio is clipped below at -log_epsilon_low where the advantage is negative: a
            ratio of exp(-0.4).
        log_epsilon_high: A token's log ratio is clipped above at log_epsilon_high where the advantage is positive: a
            ratio of exp(0.4).
    """

    elsewhere = Mismatch("sequence_tis")

    def __init__(
        self,
        *,
        log_epsilon_low: Annotated[float, Gt(0)] = 0.4,
        log_epsilon_high: Annotated[float, Gt(0)] = 0.4,
        **kwargs: Any,
    ) -> None:
        super().__init__(top_entropy=None, **kwargs)
        check_bounds(
            "model.algorithm", GMPO.__init__, {"log_epsilon_low": log_epsilon_low, "log_epsilon_high": log_epsilon_high}
        )
        refuse_token_mismatch(self)
        self.log_epsilon_low = log_epsilon_low
        self.log_epsilon_high = log_epsilon_high

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        return geometric_mean_loss(tokens, log_epsilon_low=self.log_epsilon_low, log_epsilon_high=self.log_epsilon_high)


class DRO(Algorithm):
    """Direct reward optimisation (arXiv:2405.19107) with the group's mean for its value, as in Kimi k1.5
    (arXiv:2501.12599).

    A policy gradient held back by the squared log ratio of each completion to the policy that sampled it, in place of a
    clip; no ratio weighs it, so it also learns from old samples. Some implementations square each token's log ratio
    instead.

    Args:
        tau: Strength of the square. The papers name no number for language models.
    """

    elsewhere = Mismatch("sequence_tis")

    def __init__(
        self,
        *,
        tau: Annotated[float, Gt(0)] = 0.05,
        scale: Scale = "none",
        aggregation: Aggregation = "sequence_sum",
        **kwargs: Any,
    ) -> None:
        super().__init__(top_entropy=None, scale=scale, aggregation=aggregation, **kwargs)
        check_bounds("model.algorithm", DRO.__init__, {"tau": tau})
        refuse_token_mismatch(self)
        self.tau = tau

    @property
    def trains_on_zero_advantage(self) -> bool:
        return True  # the square pulls on every completion

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        return quadratic_loss(tokens, tau=self.tau)


def refuse_token_mismatch(algorithm: Algorithm) -> None:
    """An error if a mismatch correction acts on single tokens."""
    if algorithm.mismatch is not None and algorithm.mismatch.kind in ("token_tis", "icepop"):
        raise ConfigError(
            f"model.algorithm.mismatch.kind={algorithm.mismatch.kind!r} weighs single tokens, and"
            f" {type(algorithm).__name__}'s ratio is of whole completions: choose sequence_tis or sequence_mask"
        )
