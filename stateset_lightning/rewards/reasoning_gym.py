"""The score that `reasoning-gym` gives an answer to one of its tasks."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import json
from functools import cache
from typing import Annotated, Any

from annotated_types import Gt

from stateset_lightning.errors import ConfigError, require
from stateset_lightning.rewards.base import Context, RewardFunction, RewardResult, Turns, completion, options
from stateset_lightning.rewards.match import compiled, last_match

# Tasks whose scoring evaluates the answer as code, in version 0.1.25.
RUNS_ANSWERS = {"binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"}
RUNS_ANSWERS |= {"puzzle24", "simple_integration", "spiral_matrix", "string_insertion"}


@options
class ReasoningGymReward(RewardFunction):
    """0 to 1, by the task's own scoring, for scenarios of a source `{reasoning_gym: TASK}` (extra `gym`).

    It does not apply to other scenarios.

    Some tasks give a wrong answer of the right form a little more than 0. A few (`RUNS_ANSWERS`) hand the answer to
    `eval`, or to sympy's parser, which evaluates as well: whatever the policy writes runs as Python, with your rights.
    They are scored only if you allow it.

    Args:
        allow_code: Score tasks whose scoring runs the answer as code, too.
        answer_pattern: Where the answer stands: the pattern's last match, its first group if it has one
            (`<answer>(.*?)</answer>`). By default the whole completion. A completion without a match scores 0.
        timeout: Seconds per completion.
        **common: `weight` and `name` of every reward.

    Raises:
        ConfigError: If `reasoning-gym` is not installed, the pattern is none, or there is no time-out.
    """

    allow_code: bool = False
    answer_pattern: str | None = None
    timeout: Annotated[float, Gt(0)] = 10.0

    def _set_up(self) -> None:
        if self.timeout is None:
            raise ConfigError(f"timeout=None of reward '{self.name}': give seconds; sympy hangs on some answers")
        require("reasoning_gym", "gym", f"reward '{self.name}'")
        self._pattern = None if self.answer_pattern is None else compiled(self.answer_pattern, key="answer_pattern")

    def compute_reward(self, turns: Turns, context: Context = None) -> RewardResult | None:
        row = dict(context or {})
        if (needed := row.get("reasoning_gym")) is None:
            return None
        if needed["task"] in RUNS_ANSWERS and not self.allow_code:
            runs = f"reasoning_gym={needed['task']} scores an answer by running it as Python"
            allow = f"set allow_code=true of reward '{self.name}' where you let a model run code"
            raise ConfigError(f"{runs}: leave the task out, or {allow}")
        text = completion(turns)
        answer = text.strip() if self._pattern is None else last_match(self._pattern, text)
        entry = {"question": row.get("prompt"), "answer": row.get("target"), "metadata": needed["metadata"]}
        score_answer = _scoring(needed["task"], json.dumps(needed["options"], sort_keys=True))
        return RewardResult(0.0 if answer is None else score_answer(answer, entry), {"answer": answer})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a worker process. Imported now, before the first completion's time-out begins: it takes seconds.
        self.__dict__.update(state)
        import reasoning_gym  # noqa: F401


@cache
def _scoring(task: str, options: str) -> Any:
    """The scoring of a task, by its options as JSON."""
    from reasoning_gym import create_dataset

    return create_dataset(task, **json.loads(options)).score_answer
