"""A game of several turns: the model looks for a number from 1 to 9, and is told between which numbers it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class FindTheNumber:
    """Gives 1 when the number is found, else 0. Who halves what is left finds seven of the nine in three guesses."""

    def reset(self, scenario: Mapping[str, Any], seed: int) -> str:
        self.number = int(scenario["number"])
        self.lowest, self.highest = 1, 9
        return self.question()

    def question(self) -> str:
        return f"What is it, {self.lowest} to {self.highest}?"

    def step(self, text: str) -> tuple[str | None, float, bool]:
        guess = int(text) if text.isdecimal() else 0
        if guess == self.number:
            return None, 1.0, True
        if self.lowest <= guess < self.number:
            self.lowest = guess + 1
        elif self.number < guess <= self.highest:
            self.highest = guess - 1
        return self.question(), 0.0, False
