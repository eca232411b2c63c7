"""Rewards that compare the completion's text: equal to the target, containing it, or matching a pattern. All score 0 or
1.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.rewards.base import RewardFunction, RewardResult
from stateset_lightning.rewards.text import completion, target_texts
from stateset_lightning.types import Turn


class ExactMatch(RewardFunction):
    """1 if the completion equals the scenario's `target` (or one of them, if it is a list), else 0.

    A scenario without a target is a failure, not a zero.

    Args:
        ignore_case: Whether upper and lower case are the same.
        ignore_whitespace: Whether space around the text is ignored and any run of white space counts as one space.
        ignore_punctuation: Whether punctuation is removed from both texts (`Paris.` equals `Paris`, `don't` equals
            `dont`).
        **common: `weight`, `name` and `timeout` of every reward.
    """

    def __init__(
        self,
        *,
        ignore_case: bool = False,
        ignore_whitespace: bool = True,
        ignore_punctuation: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.ignore_case = ignore_case
        self.ignore_whitespace = ignore_whitespace
        self.ignore_punctuation = ignore_punctuation

    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> RewardResult:
        accepted = [self._normalized(text) for text in target_texts(context, self.name)]
        if not all(accepted):
            target = (context or {}).get("target")
            raise DataError(
                f"target={target!r} of scenario {(context or {}).get('id')!r} is empty for reward '{self.name}'"
            )
        return RewardResult(float(self._normalized(completion(turns)) in accepted))

    def _normalized(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(character for character in text if not unicodedata.category(character).startswith("P"))
        return " ".join(text.split()) if self.ignore_whitespace else text


class Contains(RewardFunction):
    """1 if the completion contains the given strings, else 0.

    A completion that lists every possible answer contains the right one as well: give short limits or a `LengthPenalty`
    with it.

    Args:
        strings: What to look for; by default the scenario's `target`, or its items if it is a list.
        require: Whether `all` strings must be there or `any` one of them is enough.
        ignore_case: Whether upper and lower case are the same.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If `strings` is empty or contains an empty string.
    """

    def __init__(
        self,
        strings: list[str] | None = None,
        *,
        require: Literal["all", "any"] = "all",
        ignore_case: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if strings is not None and (isinstance(strings, str) or not strings or not all(strings)):
            raise ConfigError(
                f"strings={strings!r} must be a list of non-empty strings; leave it out to look for the target"
            )
        if require not in ("all", "any"):
            raise ConfigError(f"require={require!r} must be 'all' or 'any'")
        self.strings = strings
        self.require = require
        self.ignore_case = ignore_case

    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> RewardResult:
        strings = self.strings if self.strings is not None else target_texts(context, self.name)
        if not all(strings):
            raise DataError(
                f"target={strings!r} of scenario {(context or {}).get('id')!r} is empty: every text contains it"
            )
        text = completion(turns)
        if self.ignore_case:
            text, strings = text.casefold(), [string.casefold() for string in strings]
        found = sum(string in text for string in strings)
        score = found == len(strings) if self.require == "all" else found > 0
        return RewardResult(float(score), {"found": found, "of": len(strings)})


class RegexMatch(RewardFunction):
    """1 if the completion matches a regular expression, else 0.

    Python's expressions can take exponential time on a text that just fails to match (`(a+)+b`). They hold the
    interpreter meanwhile, so give a `timeout` if the pattern has nested repetitions.

    Args:
        pattern: The expression (Python's `re`); flags may be written inline: `(?i)` ignores case, `(?s)` lets `.` match
            line ends.
        match: `search` finds it anywhere, `fullmatch` wants the whole completion to match.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If the pattern is no regular expression.
    """

    def __init__(self, pattern: str, *, match: Literal["search", "fullmatch"] = "search", **common: Any) -> None:
        super().__init__(**common)
        if match not in ("search", "fullmatch"):
            raise ConfigError(f"match={match!r} must be 'search' or 'fullmatch'")
        self.pattern = compiled(pattern)
        self.match = match

    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> float:
        find = self.pattern.search if self.match == "search" else self.pattern.fullmatch
        return float(find(completion(turns)) is not None)


def compiled(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """Compile a user's pattern.

    Raises:
        ConfigError: If it is no regular expression.
    """
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ConfigError(f"pattern={pattern!r} is no regular expression: {error}") from error
