"""Large splits: scenarios that are made when they are served, of rows that are known by their place alone.

The first `SAMPLE` rows are read, checked and encoded at the start, as all are of smaller splits; the others when their
turn comes. A row that cannot be used is an error then.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from stateset_lightning.data.rows import Problem, RawRow, Rows, raise_problems
from stateset_lightning.data.scenarios import to_scenarios
from stateset_lightning.data.shapes import Shape
from stateset_lightning.data.stream import Stream
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.redaction import spare
from stateset_lightning.types import Scenario


@dataclass(frozen=True)
class Part:
    """The rows of one file or list, and how scenarios are made of them; see `to_scenarios`."""

    rows: Rows
    shape: Shape
    label: str
    rewards: Sequence[str] | None

    def scenarios(self, readings: Iterable[RawRow | Problem]) -> tuple[list[tuple[Scenario, str]], list[Problem]]:
        """The scenarios of some of the rows, each with its place, and the problems of those that cannot be used."""
        return to_scenarios(readings, self.shape, self.label, self.rewards)


class ServedScenarios(Sequence[Scenario]):
    """Scenarios of the rows of several parts, each made when it is asked for.

    Args:
        parts: Of which each row makes one scenario.
        key: Of the split, for messages.
        chosen: The rows that are meant, of all parts one after the other, int64; None: all.

    Raises:
        ConfigError: If a stream is one of several parts.
    """

    def __init__(self, parts: Sequence[Part], key: str, chosen: np.ndarray | None = None) -> None:
        self._parts, self._key, self._chosen = parts, key, chosen
        self._starts = np.array([0, *accumulate(len(part.rows) for part in parts)])
        items = [getattr(part.rows, "items", None) for part in parts]
        self.stream = next((each for each in items if isinstance(each, Stream)), None)
        if self.stream is not None and len(parts) > 1:
            raise ConfigError(f"{key} holds a stream, which cannot be mixed with other sources; leave them out")

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = index if self._chosen is None else int(self._chosen[index])
        # A stream is the only part, and goes on.
        number = min(int(np.searchsorted(self._starts, row, side="right")), len(self._parts)) - 1
        part = self._parts[number]
        reading = part.rows[row - int(self._starts[number])]
        found, problems = part.scenarios([reading])
        raise_problems(self._key, problems)
        if len(found) != 1:
            raise DataError(f"{self._key}: {reading.place} makes {len(found)} scenarios; give a row for each")
        return found[0][0]

    def __iter__(self) -> Iterator[Scenario]:
        return map(self.__getitem__, range(len(self)))

    def select(self, indices: Sequence[int] | np.ndarray) -> "ServedScenarios":
        rows = np.asarray(indices, dtype=np.int64)
        return ServedScenarios(self._parts, self._key, rows if self._chosen is None else self._chosen[rows])

    @cached_property
    def digest(self) -> str:
        """A hash: the same for the same rows, another for others."""
        chosen = b"" if self._chosen is None else self._chosen.tobytes()
        return hashlib.sha256(" ".join(part.rows.digest() for part in self._parts).encode() + chosen).hexdigest()[:16]


def spare_texts(scenarios: Iterable[Scenario]) -> None:
    """What scenarios say is no secret; see `spare`."""
    spare(
        text
        for scenario in scenarios
        for text in (*(turn.content for turn in scenario.turns()), *scenario.columns().values())
        if isinstance(text, str)
    )
