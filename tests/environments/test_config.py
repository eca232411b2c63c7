"""`model.environment`: what may be given, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from stateset_lightning.environments import EnvironmentConfig, ScriptedUser, Tools

PATH = "stateset_lightning.environments.ScriptedUser"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (ScriptedUser, EnvironmentConfig(ScriptedUser)),
        (PATH, EnvironmentConfig(PATH)),
        ({"max_turns": 3}, EnvironmentConfig(max_turns=3)),
        ({}, EnvironmentConfig()),
        ({"factory": PATH, "max_turns": 1}, EnvironmentConfig(PATH, max_turns=1)),
        ({"user": ScriptedUser, "tools": Tools}, EnvironmentConfig({"user": ScriptedUser, "tools": Tools})),
        ({"max_turns": 1}, None),
        (EnvironmentConfig(max_turns=1), None),
    ],
)
def test_a_config_of_what_is_given_and_none_of_a_single_turn_that_nobody_answers(
    given: Any, expected: EnvironmentConfig | None
) -> None:
    assert EnvironmentConfig.of(given) == expected


@pytest.mark.parametrize(
    ("options", "are_scripts"),
    [
        ({"max_turns": 2}, True),
        ({"factory": PATH, "max_turns": 2}, True),
        ({"factory": ScriptedUser}, True),
        ({"factory": PATH, "max_turns": 1}, False),
        ({"max_turns": 2, "options": {"responses": ["Sure?"]}}, False),
        ({"factory": Tools}, False),
        ({"factory": {"a": ScriptedUser}}, False),
    ],
)
def test_scenarios_are_scripts_where_their_own_texts_answer(options: Mapping[str, Any], are_scripts: bool) -> None:
    assert EnvironmentConfig(**options).are_scripts is are_scripts


def test_without_a_factory_the_user_is_scripted() -> None:
    assert EnvironmentConfig().factories() == {"": ScriptedUser}
