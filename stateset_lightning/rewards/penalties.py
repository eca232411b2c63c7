"""Penalties, never positive: too long, too long in tokens, repetitive."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge

from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.rewards.base import Context, RewardFunction, Turns, completion, options

_WORD = re.compile(r"\d+(?:[.,:]\d+)+|\w+(?:['’]\w+)*")


@options
class LengthPenalty(RewardFunction):
    """0 up to `max_length`, then falling by `per_unit` for each word or character beyond, down to `-max_penalty`.

    Args:
        max_length: Length, in units, that costs nothing.
        unit: `words` (separated by white space) or `characters`.
        per_unit: What each unit beyond `max_length` costs.
        max_penalty: The most that a completion can cost.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If a number is negative, or the unit unknown.
    """

    max_length: Annotated[int, Ge(0)]
    unit: Literal["words", "characters"] = "words"
    per_unit: Annotated[float, Ge(0)] = 0.01
    max_penalty: Annotated[float, Ge(0)] = 1.0

    def compute_reward(self, turns: Turns, context: Context = None) -> float:
        text = completion(turns)
        length = len(text.split()) if self.unit == "words" else len(text)
        return -min(self.max_penalty, self.per_unit * max(0, length - self.max_length))


@options
class OverlongPenalty(RewardFunction):
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).

    0 up to `max_tokens - buffer` tokens, then linear down to -1 at `max_tokens`, and -1 beyond. The end-of-sequence
    token counts.

    Args:
        max_tokens: Tokens from which on the punishment is full (the paper's L_max); at most the rollout's
            `max_new_tokens`, or no completion is ever punished in full.
        buffer: Tokens over which it grows (the paper's L_cache).
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: Unless 0 < buffer <= max_tokens.
    """

    max_tokens: int
    buffer: int

    def _set_up(self) -> None:
        if not 0 < self.buffer <= self.max_tokens:
            raise ConfigError(f"buffer={self.buffer} must be at least 1 and at most max_tokens={self.max_tokens}")

    def compute_reward(self, turns: Turns, context: Context = None) -> float:
        num_tokens = (context or {}).get("completion_tokens")
        if num_tokens is None:
            raise DataError(f"reward '{self.name}' needs context['completion_tokens'], the number of tokens")
        return -min(1.0, max(0.0, (num_tokens - (self.max_tokens - self.buffer)) / self.buffer))


@options
class RepetitionPenalty(RewardFunction):
    """Minus the share of the completion's n-grams of words that occurred before in it: 0 (none) to almost -1.

    Words are compared in lower case. A completion of fewer than `ngram` words scores 0.

    Args:
        ngram: Number of words that are compared at a time.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If `ngram` is less than 1.
    """

    ngram: Annotated[int, Ge(1)] = 3

    def compute_reward(self, turns: Turns, context: Context = None) -> float:
        return -repeated_share(words(completion(turns)), self.ngram)


def words(text: str) -> list[str]:
    """The words and numbers of a text, in lower case. Languages without spaces come out as few long words."""
    return _WORD.findall(text.casefold().replace("’", "'"))


def repeated_share(items: Sequence[str], n: int) -> float:
    """Share of the n-grams of `items` that have occurred before; 0 if there are fewer than `n` items."""
    ngrams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
