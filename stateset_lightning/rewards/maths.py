"""A reward for answers that are formulas, by the `math-verify` library."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import logging
import re
from typing import Annotated, Any

from annotated_types import Gt

from stateset_lightning.errors import ConfigError, require
from stateset_lightning.rewards.base import Context, RewardFunction, RewardResult, Turns, completion, options, target_of
from stateset_lightning.types import text_of

_LATEX = re.compile(r"\$|\\boxed|\\\(|\\\[")


@options
class MathEquivalence(RewardFunction):
    r"""1 if the answer in the completion equals the scenario's `target` mathematically, else 0 (extra `math`).

    It reads fractions, roots, intervals, sets, matrices, equations and units in LaTeX; `50%` equals both 0.5 and 50.
    The answer is what stands in `\boxed{}`, else behind words such as `the final answer is`, else the last formula or
    number. Outside of `\boxed{}` and `$...$` only numbers, fractions and percentages are read. A completion without an
    answer scores 0.

    Sympy never finishes on some formulas, and a policy learns to write them: each completion is compared in a worker
    process, which is killed at the time-out; the completion then fails.

    Args:
        target_marker: What stands before the answer in a target that is a longer text, as in GSM8K (`... #### 72`). A
            target of MATH's kind, with `\boxed{}` or `$`, is read like a completion; any other is LaTeX as a whole.
        timeout: Seconds per completion.
        **common: `weight` and `name` of every reward.

    Raises:
        ConfigError: If `math-verify` is not installed, or there is no time-out.
    """

    needs = ("target",)

    target_marker: str = "####"
    timeout: Annotated[float, Gt(0)] = 10.0

    def _set_up(self) -> None:
        if self.timeout is None:
            raise ConfigError(f"timeout=None of reward '{self.name}': give seconds; sympy hangs on some formulas")
        if not self.target_marker:
            raise ConfigError("target_marker='': a marker must not be empty")
        require("math_verify", "math", f"reward '{self.name}'")

    def compute_reward(self, turns: Turns, context: Context = None) -> RewardResult:
        from math_verify import verify

        golds = target_of(context, self.name, self._golds, "holds no formula")
        answer = _parsed(completion(turns))
        equal = any(verify(gold, answer, timeout_seconds=None) for gold in golds)
        return RewardResult(float(equal), {"answer": str(answer[-1]) if answer else None, "target": str(golds[0][-1])})

    def _golds(self, target: Any) -> list[list[Any]]:
        golds = [self._gold(item) for item in (target if isinstance(target, list) else [target])]
        return golds if all(golds) else []

    def _gold(self, target: Any) -> list[Any]:
        text = text_of(target)  # in full: LaTeX reads 1e-05 as 1 times e minus 5
        if isinstance(target, bool) or not text.strip():
            return []
        text = text.rpartition(self.target_marker)[2].strip().replace("\\$", "")
        return _parsed(text if _LATEX.search(text) else rf"\boxed{{{text}}}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a worker process. Imported now, before the first completion's time-out begins: sympy takes a second or two.
        self.__dict__.update(state)
        import math_verify  # noqa: F401


def _parsed(text: str) -> list[Any]:
    """The last formula of a text, as a sympy object and as text; empty if there is none."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time-out; the process has one
    # Not with its own time-out: the process has one.
    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return list(parse(text.replace("\\$", ""), config, parsing_timeout=None))
