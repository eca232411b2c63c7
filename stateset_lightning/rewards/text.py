"""What built-in rewards read from a conversation: the completion, the question, the target, words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stateset_lightning.errors import DataError
from stateset_lightning.types import Turn

_WORD = re.compile(r"\d+(?:[.,:]\d+)+|\w+(?:['’]\w+)*")


def completion(turns: Sequence[Turn]) -> str:
    """The text of the last turn."""
    return str(turns[-1].get("content", "")) if turns else ""


def question(turns: Sequence[Turn]) -> str:
    """The text of the last user turn before the completion; empty if there is none."""
    return next((str(turn.get("content", "")) for turn in reversed(turns[:-1]) if turn.get("role") == "user"), "")


def words(text: str) -> list[str]:
    """The words and numbers of a text, in lower case. Languages without spaces come out as few long words."""
    return _WORD.findall(text.casefold().replace("’", "'"))


def repeated_share(items: Sequence[str], n: int) -> float:
    """Share of the n-grams of `items` that have occurred before; 0 if there are fewer than `n` items."""
    ngrams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def target_of(context: Mapping[str, Any] | None, reward: str) -> Any:
    """The scenario's target.

    Raises:
        DataError: If it has none. A score of zero would be trained on as a wrong answer.
    """
    target = (context or {}).get("target")
    if target is None:
        scenario = (context or {}).get("id")
        raise DataError(
            f"scenario {scenario!r} has no 'target', which reward '{reward}' needs: add the column, or name the rewards"
            " that score this scenario in its 'rewards' column"
        )
    return target


def target_texts(context: Mapping[str, Any] | None, reward: str) -> list[str]:
    """The accepted answers of a scenario, as texts: its target, or each item if that is a list.

    Raises:
        DataError: If there is no target, or it is an empty list.
    """
    target = target_of(context, reward)
    texts = [str(item) for item in target] if isinstance(target, list | tuple | set | frozenset) else [str(target)]
    if not texts:
        raise DataError(
            f"target={target!r} of scenario {(context or {}).get('id')!r} is empty: reward '{reward}' needs an answer"
        )
    return texts
