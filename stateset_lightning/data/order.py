"""Which scenario stands where in an epoch: a pure function of (seed, epoch), so that nothing needs to be stored."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from stateset_lightning.errors import ConfigError
from stateset_lightning.seeding import permutation


class EpochOrder:
    """The order of the scenarios in each epoch.

    Without weights an epoch holds every scenario once. With weights it is as long, and each source has its share of the
    positions; a source goes through all its scenarios before it repeats one, across epochs.

    Args:
        rows_by_source: Indices of each source's scenarios.
        weights: Weight of each source; None holds every scenario once.
        seed: The run's seed.
        shuffle: False keeps the sources' own order, spread evenly over the epoch.
        names: The sources' names, for messages.

    Raises:
        ConfigError: If a weighted source has no scenarios, or so little weight that it has no position in an epoch.
    """

    def __init__(
        self,
        rows_by_source: Sequence[Sequence[int]],
        weights: Sequence[float] | None,
        seed: int,
        shuffle: bool,
        names: Sequence[str] = (),
    ) -> None:
        self.size = sum(len(rows) for rows in rows_by_source)
        self.seed = seed
        self._shuffle = shuffle
        if weights is None:  # one pool
            self._rows = [np.array(sorted(row for rows in rows_by_source for row in rows), dtype=np.int64)]
            self._counts = [self.size]
            self.row_weights = np.ones(self.size)
            return
        self._rows = [np.array(rows, dtype=np.int64) for rows in rows_by_source]
        self._counts = largest_remainder(weights, self.size)
        for index, (count, rows) in enumerate(zip(self._counts, rows_by_source, strict=True)):
            name = names[index] if names else f"number {index + 1}"
            if not rows:
                raise ConfigError(
                    f"data.train: no scenario of the source {name} is left; check data.max_prompt_tokens and"
                    " data.validation_fraction"
                )
            if count == 0:
                raise ConfigError(
                    f"data.train: the source {name} with weight {weights[index]} gets none of the {self.size} positions"
                    " of an epoch; raise its weight or leave it out"
                )
        self.row_weights = np.zeros(self.size)
        """Chance of each scenario in a free draw, relative to the others, float64 [size]."""
        for share, members in zip(weights, self._rows, strict=True):
            self.row_weights[members] = share / len(members)

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of the scenarios in order, int64 [size]."""
        streams = [self._stream(source, epoch * count, count) for source, count in enumerate(self._counts)]
        positions: np.ndarray = np.concatenate(streams)
        if len(streams) == 1:
            return positions
        if self._shuffle:
            return positions[permutation(self.seed, "interleave", epoch, size=self.size)]
        even = np.concatenate([(np.arange(count) + 0.5) / count for count in self._counts])
        return positions[np.argsort(even, kind="stable")]

    def _stream(self, source: int, start: int, count: int) -> np.ndarray:
        """`count` indices from position `start` of a source's endless stream: one permutation of its scenarios after
        another.
        """
        rows = self._rows[source]
        rounds = range(start // len(rows), (start + count - 1) // len(rows) + 1)
        stream = np.concatenate([rows[self._round(source, number)] for number in rounds])
        return stream[start - rounds[0] * len(rows) :][:count]

    def _round(self, source: int, number: int) -> np.ndarray:
        size = len(self._rows[source])
        if not self._shuffle:
            return np.arange(size)
        # One pool has the name that other code may rely on: permutation(seed, "order", epoch).
        counters = (number,) if len(self._rows) == 1 else (number, source)
        return permutation(self.seed, "order", *counters, size=size)


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total` (Hamilton's method; ties go to the first)."""
    exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 and 0.2 are one to two
    shares = [weight * total / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
