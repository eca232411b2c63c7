"""The scenarios of a split, which source each one comes from, and validation held out of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import blake2b, sha256
from typing import Any

import numpy as np

from stateset_lightning.data import content
from stateset_lightning.data.ragged import RaggedTokens
from stateset_lightning.data.served import ServedScenarios
from stateset_lightning.data.stream import Stream
from stateset_lightning.errors import DataError
from stateset_lightning.seeding import permutation
from stateset_lightning.types import Scenario


@dataclass(frozen=True, slots=True)
class ScenarioSet:
    """The scenarios of a split. `source_of[i]` is the index, in `names` and `weights`, of the source of scenario i.

    `notes` say how they were read where that is not obvious.
    """

    scenarios: Sequence[Scenario]
    source_of: np.ndarray
    names: list[str]
    weights: list[float] | None
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.scenarios)

    @property
    def stream(self) -> Stream | None:
        """The stream that the rows are of, if so."""
        return self.scenarios.stream if isinstance(self.scenarios, ServedScenarios) else None

    @property
    def known(self) -> Sequence[Scenario]:
        """Those that are read at the start: all, or the first of a large split."""
        return self.scenarios[: content.SAMPLE] if isinstance(self.scenarios, ServedScenarios) else self.scenarios

    def digest(self, tokens: RaggedTokens) -> str:
        """A hash of the prompts: the same for the same; of a large split, for the same rows and first prompts."""
        if not isinstance(self.scenarios, ServedScenarios):
            return tokens.digest()
        return sha256((self.scenarios.digest + tokens.digest()).encode()).hexdigest()[:16]

    def contents(self) -> Iterator[Any]:
        """What tells them from others, without their ids, which may come from the name of a file."""
        if isinstance(self.scenarios, ServedScenarios):
            yield self.scenarios.digest
        else:
            yield from ({**scenario.columns(), "id": ""} for scenario in self.scenarios)

    def select(self, indices: Sequence[int] | np.ndarray) -> ScenarioSet:
        """The same sources with the scenarios at `indices` alone."""
        if len(indices) == len(self):
            return self
        if isinstance(self.scenarios, ServedScenarios):
            chosen: Sequence[Scenario] = self.scenarios.select(indices)
        else:
            chosen = [self.scenarios[i] for i in indices]
        return replace(self, scenarios=chosen, source_of=self.source_of[np.asarray(indices, dtype=np.int64)])

    @property
    def mixture(self) -> str:
        """Sizes and weights of weighted sources, such as `100*2.0 50*1.0`; they decide the order of an epoch."""
        sizes = [len(rows) for rows in self.rows_by_source()]
        return " ".join(f"{size}*{weight}" for size, weight in zip(sizes, self.weights or [], strict=False))

    def rows_by_source(self) -> list[np.ndarray]:
        """Indices of each source's scenarios, int64."""
        return [np.flatnonzero(self.source_of == source) for source in range(len(self.names))]


def hold_out(scenarios: ScenarioSet, fraction: float, seed: int) -> tuple[ScenarioSet, ScenarioSet]:
    """Splits into (training, validation); the same for the same seed.

    Scenarios with the same question stay on one side, so that validation never asks what was trained on.

    Args:
        scenarios: With at least two different questions.
        fraction: Fraction of the scenarios to hold out; at least one is, and one question stays.
        seed: The run's seed.

    Raises:
        DataError: If there is only one question.
    """
    # What is asked, without instructions; a hash of it, as there may be many.
    asked = (
        repr([(turn.role, turn.content) for turn in scenario.turns() if turn.role != "system"])
        for scenario in scenarios.scenarios
    )
    hashes = (int.from_bytes(blake2b(each.encode(), digest_size=8).digest()) for each in asked)
    _, first, group_of = np.unique(np.fromiter(hashes, np.uint64), return_index=True, return_inverse=True)
    if len(first) < 2:
        raise DataError(
            f"data.validation_fraction={fraction}: all of data.train asks one question; give data.validation instead"
        )
    # Exact: 0.1 * 30 in floating point is just above 3.
    wanted = max(1, round(Fraction(str(fraction)) * len(scenarios)))
    in_order = np.argsort(first)  # of their first scenarios
    sizes, count = np.bincount(group_of), 0
    is_held = np.zeros(len(first), dtype=bool)
    for group in in_order[permutation(seed, "validation", size=len(first))[:-1]]:
        if count >= wanted:
            break
        is_held[group] = True
        count += sizes[group]
    held = is_held[group_of]
    return scenarios.select(np.flatnonzero(~held)), scenarios.select(np.flatnonzero(held))
