"""A conversation as rewards see it."""

from stateset_lightning.types import Scenario, Turn


def conversation(scenario: Scenario, completion: str) -> list[Turn]:
    """The scenario's turns, then the completion as the assistant's."""
    return [*scenario.turns(), Turn("assistant", completion)]
