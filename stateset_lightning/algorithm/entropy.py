"""An entropy bonus whose coefficient follows the entropy.

No `from __future__ import annotations`: the command line reads `AdaptiveEntropy`.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from stateset_lightning.bounds import check_bounds


@dataclass(frozen=True)
class AdaptiveEntropy:
    """Keeps the entropy from falling below a target (Skywork-OR1, arXiv:2505.22312).

    After each optimizer step the coefficient rises by `delta` if the entropy was below the target, and falls by
    `delta`, to no less than 0, if not. The bonus is applied only while the newest entropy is at or below the target.
    """

    target: Annotated[float, Gt(0)] = 0.2
    """Mean entropy of a token, in nats. Sensible values are below the entropy at the start of the run
    (`policy/entropy`).
    """
    delta: Annotated[float, Gt(0)] = 0.005
    """Change of the coefficient per optimizer step."""
    maximum: Annotated[float, Ge(0)] = 1.0
    """The coefficient never exceeds this."""

    def __post_init__(self) -> None:
        check_bounds("model.algorithm.adaptive_entropy", type(self), vars(self))

    def adapted(self, coefficient: float, entropy: float) -> float:
        """The next coefficient, given the entropy of the step that just ended."""
        step = self.delta if entropy < self.target else -self.delta
        return min(max(coefficient + step, 0.0), self.maximum)
