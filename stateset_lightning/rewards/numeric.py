"""A reward for answers that are numbers, and how numbers are read from text.

Understood are thousands separators (1,000), signs, decimals, fractions (3/4, 2 1/2, LaTeX's frac), percent, currency
signs and scientific notation (1e5, 1.5 x 10^5). Decimal commas (3,14) and number words are not. For formulas use
`MathEquivalence`.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).

import math
import re
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any

from annotated_types import Ge, Lt

from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards.base import Context, RewardFunction, RewardResult, Turns, completion, options, target_of

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+"
_NUMBER = re.compile(
    rf"""(?x)
    (?<!\w) (?<![0-9]\.)                                    # not inside a word (H2O) or a version (1.2.3)
    (?: (?<![)\]%]) (?P<sign> [-+\u2212] ) )? [$€£¥₹]?       # 5-3 and (5)-3 are differences
    (?P<sign_2> (?<=[$€£¥₹]) [-\u2212] )?
    (?: (?P<whole> [0-9]+ ) [ ] (?= [0-9]+/[0-9]) )?        # 2 1/2
    (?P<number> {_DIGITS} )
    (?: (?: [eE] | [ ]?(?:×|x|\*|\\times)[ ]?10(?:\^|\*\*)\{{? ) (?P<exponent> [-+\u2212]?[0-9]+ ) \}}? )?
    (?: [ ]?/[ ]? (?P<denominator> [0-9]+(?:\.[0-9]+)? ) )?
    (?: [ ]? (?P<percent> % ) )?
    """
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_LATEX_MIXED = re.compile(r"(?<=[0-9])(?=\\[dt]?frac\{)")
_LATEX_MARKUP = re.compile(r"\{(,)\}|\\(?=[$%])|\\!")


@options
class NumericAnswer(RewardFunction):
    """1 if the number in the completion equals the scenario's `target` (or one of them, if it is a list), else 0.

    The number is the completion's last one, or the first one behind the last `marker`. A completion without a number
    scores 0. A scenario without a target, or whose target holds no number, is a failure. `50%` equals both 50 and 0.5.

    Two numbers are equal if they differ by at most `absolute_tolerance`, or by at most `relative_tolerance` times the
    target.

    Args:
        marker: What stands before the answer, such as `####` or `answer:` (in any case). A completion without it scores
            0.
        target_marker: What stands before the answer in a target that is a longer text, as in GSM8K (`... #### 72`). In
            a target without it, the last number counts.
        absolute_tolerance: Largest difference that still counts as equal.
        relative_tolerance: The same as a share of the target.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If a tolerance is negative or a marker empty.
    """

    needs = ("target",)

    marker: str | None = None
    target_marker: str = "####"
    absolute_tolerance: Annotated[float, Ge(0), Lt(math.inf)] = 0.0
    relative_tolerance: Annotated[float, Ge(0), Lt(math.inf)] = 1e-9

    def _set_up(self) -> None:
        if "" in (self.marker, self.target_marker):
            given = f"marker={self.marker!r}, target_marker={self.target_marker!r}"
            raise ConfigError(f"{given}: a marker must not be empty")

    def compute_reward(self, turns: Turns, context: Context = None) -> RewardResult:
        targets = target_of(context, self.name, self._targets, "holds no number")
        answers = _number(completion(turns), self.marker, required=True)
        equal = any(self._equal(answer, target) for answer in answers for target in targets)
        return RewardResult(float(equal), {"answer": answers[0] if answers else None, "target": targets[0]})

    def _equal(self, answer: float, target: float) -> bool:
        return abs(answer - target) <= max(self.absolute_tolerance, self.relative_tolerance * abs(target))

    def _targets(self, target: Any) -> list[float]:
        if isinstance(target, list):
            found = list(map(self._targets, target))
            return list(chain(*found)) if all(found) else []
        if isinstance(target, str):
            return _number(target, self.target_marker, required=False)
        return [float(target)] if isinstance(target, int | float) and not isinstance(target, bool) else []


def find_numbers(text: str) -> Iterator[list[float]]:
    """The numbers in a text, in order; each with all its values (`50%` is 50 and 0.5)."""
    text = _LATEX_MARKUP.sub(r"\1", _LATEX_FRACTION.sub(r"\1/\2", _LATEX_MIXED.sub(" ", text)))
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if math.isfinite(value):
            yield [value, value / 100] if match["percent"] else [value]


def _value(match: re.Match[str]) -> float:
    """The value of a match; NaN if it is none (1/0, 1e999)."""
    exponent = (match["exponent"] or "0").replace("\u2212", "-")
    value, denominator = float(f"{match['number'].replace(',', '')}e{exponent}"), float(match["denominator"] or 1)
    value = (value / denominator if denominator else math.nan) + float(match["whole"] or 0)
    return -value if (match["sign"] or match["sign_2"] or "+") != "+" else value


def _number(text: str, marker: str | None, *, required: bool) -> list[float]:
    """The values of the first number behind the last marker, or of the last number; empty if there is none."""
    if marker is not None:
        _, found, after = text.casefold().rpartition(marker.casefold())
        if found:
            return next(find_numbers(after), [])
        if required:
            return []
    return [[], *find_numbers(text)][-1]
