"""A user whose answers are written down."""

from collections.abc import Mapping
from typing import Any

from stateset_lightning.data.rows import BadRow
from stateset_lightning.data.scenarios import checked_texts
from stateset_lightning.environments.base import EnvironmentFailure, turns_of
from stateset_lightning.errors import ConfigError, told_as


class ScriptedUser:
    """Answers with one text after another, whatever the model says. When none is left, the conversation ends.

    Where the scenario has no turn of the user, the first text opens the conversation. Of the guide's `user_responses`
    the first is the scenario's prompt already.

    Args:
        responses: The texts, for all scenarios; None takes each scenario's own.
        column: The scenario's column that holds them, a list of texts.

    Raises:
        ConfigError: If `responses` is no list of texts, or empty.
    """

    is_quick = True  # needs no thread

    def __init__(self, responses: list[str] | None = None, column: str = "replies") -> None:
        self._responses, self._column = responses, column
        if responses is not None:
            with told_as(ConfigError, f"scripted_user.responses={responses!r:.80}: ", BadRow):
                checked_texts("responses", responses)

    def reset(self, scenario: Mapping[str, Any], seed: int) -> str | None:
        self._left = iter(self._of(scenario) if self._responses is None else self._responses)
        return None if any(turn["role"] == "user" for turn in turns_of(scenario)) else next(self._left)

    def step(self, text: str) -> tuple[str | None, None, bool]:
        answer = next(self._left, None)
        return answer, None, answer is None

    def _of(self, scenario: Mapping[str, Any]) -> list[str]:
        if (said := scenario.get("user_responses")) is not None:  # read and checked as a script
            return list(said[1:])
        with told_as(EnvironmentFailure, f"scenario {scenario.get('id')!r}: ", BadRow):
            return checked_texts(self._column, scenario.get(self._column))
