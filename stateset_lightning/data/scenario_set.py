"""The scenarios of a split, which source each one comes from, and validation held out of them.

Those of a large split are made when they are served, of rows that are known by their place alone. The first `SAMPLE`
rows are read, checked and encoded at the start, as all are of smaller splits; the others when their turn comes. A row
that cannot be used is an error then.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from hashlib import blake2b, sha256
from itertools import accumulate
from typing import Any

import numpy as np

from stateset_lightning.data import content
from stateset_lightning.data.ragged import RaggedTokens
from stateset_lightning.data.rows import raise_problems
from stateset_lightning.data.scenarios import Part
from stateset_lightning.data.stream import Stream
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.redaction import spare
from stateset_lightning.seeding import permutation
from stateset_lightning.types import Scenario

NO_ROW_LEFT_OUT = "data.row cannot leave out rows of a split this large: write those that stay to a file"


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
            do = "give a row for each" if found else NO_ROW_LEFT_OUT
            raise DataError(f"{self._key}: {reading.place} makes {len(found)} scenarios; {do}")
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
        return sha256(" ".join(part.rows.digest() for part in self._parts).encode() + chosen).hexdigest()[:16]


def spare_texts(scenarios: Iterable[Scenario]) -> None:
    """What scenarios say is no secret; see `spare`."""
    said = ([*(turn.content for turn in scenario.turns()), *scenario.columns().values()] for scenario in scenarios)
    spare(text for texts in said for text in texts if isinstance(text, str))


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
            return iter([self.scenarios.digest])
        return ({**scenario.columns(), "id": ""} for scenario in self.scenarios)

    def select(self, indices: Sequence[int] | np.ndarray) -> "ScenarioSet":
        """The same sources with the scenarios at `indices` alone."""
        if len(indices) == len(self):
            return self
        own = self.scenarios
        chosen = own.select(indices) if isinstance(own, ServedScenarios) else [own[i] for i in indices]
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
    turns = ([turn for turn in scenario.turns() if turn.role != "system"] for scenario in scenarios.scenarios)
    hashes = (int.from_bytes(blake2b(repr(asked).encode(), digest_size=8).digest()) for asked in turns)
    _, first, group_of = np.unique(np.fromiter(hashes, np.uint64), return_index=True, return_inverse=True)
    if len(first) < 2:
        raise DataError(f"data.validation_fraction={fraction}: all rows ask one question; give data.validation instead")
    # Exact: 0.1 * 30 in floating point is just above 3.
    wanted = max(1, round(Fraction(str(fraction)) * len(scenarios)))
    drawn = np.argsort(first)[permutation(seed, "validation", size=len(first))[:-1]]  # in order of first scenarios
    sizes = np.bincount(group_of)[drawn]
    held = np.isin(group_of, drawn[np.cumsum(sizes) - sizes < wanted])
    return scenarios.select(np.flatnonzero(~held)), scenarios.select(np.flatnonzero(held))
