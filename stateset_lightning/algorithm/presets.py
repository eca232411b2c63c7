"""Algorithms by name, each as its paper defines it, with the paper's defaults. Any field can be changed by itself."""

from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from stateset_lightning.algorithm.advantages import Scale, beta_normalised_advantages, total_scores
from stateset_lightning.algorithm.aggregation import Aggregation
from stateset_lightning.algorithm.base import Algorithm


class GRPO(Algorithm):
    """Group relative policy optimisation (DeepSeekMath, arXiv:2402.03300, equation 3).

    Group-standardised rewards, symmetric clipping, each completion's tokens averaged, then the completions. The KL coefficient `beta`
    is the paper's (section 4.2); set it to 0, as most later work does, to spare the reference model.
    """

    def __init__(self, *, beta: Annotated[float, Ge(0)] = 0.04, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)


class DrGRPO(Algorithm):
    """GRPO done right (arXiv:2503.20783, section 3.2).

    No division by the group's standard deviation (it favours easy and hard questions) and none by a completion's own length (it
    favours long wrong answers): the loss is divided by a constant length instead.
    """

    def __init__(self, *, scale: Scale = "none", aggregation: Aggregation = "constant_length", **kwargs: Any) -> None:
        super().__init__(scale=scale, aggregation=aggregation, **kwargs)


class DAPO(Algorithm):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv:2503.14476, equation 8).

    A higher upper clip bound keeps exploration alive, and every token of the batch weighs the same. The paper's overlong reward
    shaping is a reward of its own, `stateset_lightning.rewards.OverlongPenalty`; its dynamic sampling is not part of this preset.
    """

    def __init__(
        self, *, epsilon_high: Annotated[float, Gt(0)] | None = 0.28, aggregation: Aggregation = "token_mean", **kwargs: Any
    ) -> None:
        super().__init__(epsilon_high=epsilon_high, aggregation=aggregation, **kwargs)


class BNPO(Algorithm):
    """Beta normalisation policy optimisation (arXiv:2506.02864), for rewards in [0, 1].

    Rewards are centred by their group's mean p and divided by a Beta density at p that follows the batch as it improves. TRL's
    `loss_type="bnpo"` is something else: GRPO's advantages and a mean over the tokens of one micro-batch. That mean, over the
    whole optimizer step, is the aggregation here.
    """

    def __init__(
        self,
        *,
        epsilon_low: Annotated[float, Gt(0), Lt(1)] = 0.2,
        epsilon_high: Annotated[float, Gt(0)] | None = None,
        beta: Annotated[float, Ge(0)] = 0.0,
        aggregation: Aggregation = "token_mean",
        constant_length: Annotated[int, Ge(1)] | None = None,
        mask_truncated: bool = False,
    ) -> None:
        super().__init__(
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            beta=beta,
            scale="none",
            aggregation=aggregation,
            constant_length=constant_length,
            mask_truncated=mask_truncated,
        )

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        return beta_normalised_advantages(total_scores(scores_PGF, weights_F))
