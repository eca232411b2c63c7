"""What an evaluation samples, and what it counts as solved."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from stateset_lightning.errors import ConfigError, bounded
from stateset_lightning.rewards.match import compiled, last_match
from stateset_lightning.rollout import RolloutConfig


@bounded("model.evaluation")
@dataclass(frozen=True)
class EvaluationConfig:
    """How `validate`, `test` and the validations of `fit` evaluate: one greedy completion per prompt, and samples.

    Args:
        samples: Completions sampled per prompt beside the greedy one, for pass@k, pass^k, avg@k and majority@k. 0: the
            greedy one alone.
        temperature: Of these samples. None: that of training.
        top_p: Of these samples. None: that of training.
        solved_at: Score from which on a completion counts as solved.
        solved_by: Name of the reward whose score that is. None: the total.
        answer_pattern: Regular expression for majority@k: the first group (or all) of its last match is a completion's
            answer. None: the whole text.
    """

    samples: Annotated[int, Ge(0)] = 0
    temperature: Annotated[float, Gt(0)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    solved_at: Annotated[float, Gt(-math.inf), Lt(math.inf)] = 1.0
    solved_by: str | None = None
    answer_pattern: str | None = None

    def __post_init__(self) -> None:
        compiled(self.answer_pattern or "", key="model.evaluation.answer_pattern")

    def check_rewards(self, names: Sequence[str]) -> None:
        """Raises ConfigError if `solved_by` is none of the rewards."""
        if self.solved_by is not None and self.solved_by not in names:
            raise ConfigError(f"model.evaluation.solved_by={self.solved_by!r} must be one of {', '.join(names)}")

    def sampling(self, rollout: RolloutConfig) -> RolloutConfig:
        """Training's sampling with the temperature and top-p of evaluation."""
        temperature, top_p = self.temperature or rollout.temperature, self.top_p or rollout.top_p
        return replace(rollout, temperature=temperature, top_p=top_p, keep_sampling_mask=False)

    @property
    def ks(self) -> list[int]:
        """The k of pass@k: powers of two below `samples`, and `samples`."""
        return sorted({2**i for i in range(self.samples.bit_length())} | {self.samples}) if self.samples else []

    def answer(self, text: str) -> str | None:
        """What a completion votes for, with runs of white space as one space; None, no vote, without a match."""
        found = text if self.answer_pattern is None else last_match(re.compile(self.answer_pattern), text)
        return None if found is None else " ".join(found.split())
