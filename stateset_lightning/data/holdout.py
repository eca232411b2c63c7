"""Hold out a fraction of the training scenarios for validation."""

from fractions import Fraction

from stateset_lightning.data.sources import ScenarioSet
from stateset_lightning.errors import DataError
from stateset_lightning.seeding import permutation
from stateset_lightning.types import Scenario


def hold_out(scenarios: ScenarioSet, fraction: float, seed: int) -> tuple[ScenarioSet, ScenarioSet]:
    """Split into (training, validation); equal for equal seeds.

    Scenarios that ask the same question stay on one side, so that validation never asks what was trained on.

    Args:
        scenarios: At least two different questions.
        fraction: Fraction of the scenarios to hold out; at least one is, and one question stays.
        seed: The run's seed.

    Raises:
        DataError: If there is only one question.
    """
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, scenario in enumerate(scenarios.scenarios):
        groups.setdefault(_question(scenario), []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"data.validation_fraction={fraction}: all of data.train asks one question; give data.validation instead"
        )
    # Exact: 0.1 * 30 in floating point is just above 3.
    wanted = max(1, round(Fraction(str(fraction)) * len(scenarios)))
    members = list(groups.values())
    held: set[int] = set()
    for group in permutation(seed, "validation", size=len(members))[:-1]:
        if len(held) >= wanted:
            break
        held.update(members[group])
    everything = range(len(scenarios))
    return scenarios.select([i for i in everything if i not in held]), scenarios.select(sorted(held))


def _question(scenario: Scenario) -> tuple[tuple[str, str], ...]:
    """What is asked, without instructions: the turns that are not the system's."""
    turns = scenario.messages or scenario.turns()
    return tuple((turn.role, turn.content) for turn in turns if turn.role != "system")
