"""Stop strings: a completion ends where one of them appears, also in the middle of a token or across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Looks for any of some strings at the end of a growing completion."""

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings = list(strings)
        self.tokenizer = tokenizer
        # Every token is at least one byte, so a string lies within as many tokens as it has bytes. The extra ones
        # complete a character that is cut at the window's start.
        self.window = max((len(text.encode()) for text in strings), default=0) + 4

    def found(self, tokens: list[int]) -> bool:
        """Whether a stop string appears among the last tokens."""
        if not self.strings:
            return False
        tail = self.tokenizer.decode(tokens[-self.window :], skip_special_tokens=True)
        return any(text in tail for text in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        ends = [position for stop in self.strings if (position := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text
