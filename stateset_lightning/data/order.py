"""Which prompts an episode holds: the order of an epoch, or a curriculum that draws by how often they are solved.

Both follow from the run's seed and a counter, so that resuming needs no generator's state.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from stateset_lightning.errors import ConfigError, bounded
from stateset_lightning.seeding import derive_seed, permutation


@dataclass(eq=False)
class EpochOrder:
    """The order of the scenarios in each epoch.

    Without weights an epoch holds every scenario once. With weights it has as many positions, and each source gets its
    share of them; a source goes through all its scenarios before it repeats one, across epochs.

    Args:
        rows_by_source: Row numbers of each source's scenarios.
        weights: Weight of each source; None: every scenario once.
        seed: The run's seed.
        shuffle: False keeps the sources' own order; several weighted sources are then spread evenly over the epoch.
        names: The sources' names, for messages.
        goes_on: Whether the rows of the next epoch are others, behind those of this one: they are a stream's.

    Raises:
        ConfigError: If a weighted source has no scenarios, or so little weight that it gets no position in an epoch.
    """

    rows_by_source: Sequence[Sequence[int] | np.ndarray]
    weights: Sequence[float] | None
    seed: int
    shuffle: bool
    names: Sequence[str] = ()
    goes_on: bool = False

    def __post_init__(self) -> None:
        self._rows = [np.asarray(rows, dtype=np.int64) for rows in self.rows_by_source]
        self.size = sum(map(len, self._rows))
        # Chance of each scenario in a draw by weight, relative to the others, float64 [size].
        self.row_weights = np.ones(self.size)
        if self.weights is None:  # all sources are one
            self._rows, self._counts = [np.sort(np.concatenate(self._rows))], [self.size]
            return
        self._counts = largest_remainder(self.weights, self.size)
        for index, (count, rows, weight) in enumerate(zip(self._counts, self._rows, self.weights, strict=True)):
            source = f"data.train: the source {self.names[index] if self.names else f'number {index + 1}'}"
            if not len(rows):
                raise ConfigError(f"{source} has no scenario left: data.max_prompt_tokens, data.validation_fraction")
            if count == 0:
                raise ConfigError(f"{source} with weight {weight} gets no position of an epoch; raise or drop it")
            self.row_weights[rows] = weight / len(rows)

    def epoch(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in order, int64 [size]."""
        streams = [self._stream(source, epoch * count, count) for source, count in enumerate(self._counts)]
        positions: np.ndarray = np.concatenate(streams)
        if len(streams) == 1:
            return positions + epoch * self.size * self.goes_on
        if self.shuffle:
            return positions[permutation(self.seed, "interleave", epoch, size=self.size)]
        even = np.concatenate([(np.arange(count) + 0.5) / count for count in self._counts])
        return positions[np.argsort(even, kind="stable")]

    def _stream(self, source: int, start: int, count: int) -> np.ndarray:
        """`count` rows from position `start` of a source's endless stream of permutations of its rows."""
        rows = self._rows[source]
        rounds = range(start // len(rows), (start + count - 1) // len(rows) + 1)
        stream = np.concatenate([rows[self._round(source, number)] for number in rounds])
        return stream[start - rounds[0] * len(rows) :][:count]

    def _round(self, source: int, number: int) -> np.ndarray:
        size = len(self._rows[source])
        if not self.shuffle:
            return np.arange(size)
        # With one source the seed's name is one that other code may rely on: permutation(seed, "order", epoch).
        counters = (number,) if len(self._rows) == 1 else (number, source)
        return permutation(self.seed, "order", *counters, size=size)


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total` (Hamilton's method; ties go to the first)."""
    exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 and 0.2 are one to two
    shares = [weight * total / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    for i in sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))[: total - sum(counts)]:
        counts[i] += 1
    return counts


# Curriculum -----------------------------------------------------------------------------------------------------------

# The prompts of an episode depend on the rewards of the episodes that came at least this many earlier.
REPORT_DELAY = 2

# A sum of reward weights, such as ten times 0.1, may fall short of `solved_at` by a rounding error.
SOLVED_TOLERANCE = 1e-9


@bounded("data.curriculum")
@dataclass(frozen=True)
class Curriculum:
    """Draws prompts in proportion to floor + (1 - floor) * 4 p (1 - p), where p is a prompt's solve rate.

    p is the running share of the prompt's completions that are solved, and p (1 - p) the learnability of
    arXiv:2502.12272; the floor keeps every prompt in the run. A prompt that has no score yet counts as p = 1/2. Within
    an episode no prompt comes twice (unless there are fewer than an episode holds). An epoch has as many episodes as
    without a curriculum, but which prompts it holds is open.

    Args:
        floor: Weight of a prompt that is always or never solved, relative to one that is solved half of the time.
        decay: Share of the old solve rate in the new one, each time that the prompt is scored.
        solved_at: Total reward from which on a completion counts as solved.
    """

    floor: Annotated[float, Gt(0), Le(1)] = 0.1
    decay: Annotated[float, Ge(0), Lt(1)] = 0.5
    solved_at: Annotated[float, Gt(-math.inf), Lt(math.inf)] = 1.0

    @property
    def fingerprint(self) -> str:
        """The options as one text, such as `floor=0.1 decay=0.5 solved_at=1.0`; they decide the order."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


class SolveRates:
    """How often each prompt is solved, and the draws that follow from it; equal on all ranks, given equal reports.

    Lightning may ask for an episode's first batch before the previous episode has ended, or after. For the same draw in
    both cases, episode e depends on the reports of episodes up to e - 2 alone; later ones wait, and are in the state.

    Args:
        options: How solve rates become weights.
        base_weights: Weight of each prompt apart from its solve rate (its source's share, say), float64 [prompts].
        seed: The run's seed.
    """

    def __init__(self, options: Curriculum, base_weights: np.ndarray, seed: int) -> None:
        self._options = options
        self._base_weights = base_weights
        self._seed = seed
        self._rates = np.full(len(base_weights), np.nan)  # NaN: no score yet
        self._waiting: list[tuple[int, int, int, int]] = []  # episode, prompt, completions solved, completions scored

    def report(self, episode: int, rows: Sequence[int], totals_PG: Tensor) -> None:
        """Takes in the rewards of an episode's groups: those of all ranks, in the same order on every rank.

        Args:
            episode: The episode's index.
            rows: Row of each group's prompt.
            totals_PG: Total rewards, NaN where a reward failed.
        """
        solved_P = (totals_PG >= self._options.solved_at - SOLVED_TOLERANCE).sum(-1).tolist()
        scored_P = totals_PG.isfinite().sum(-1).tolist()
        self._waiting += [(episode, *group) for group in zip(rows, solved_P, scored_P, strict=True) if group[-1]]

    def weights(self, episode: int) -> np.ndarray:
        """Weight of each prompt in an episode's draw, float64 [prompts]."""
        self._apply_until(episode - REPORT_DELAY)
        rates = np.where(np.isnan(self._rates), 0.5, self._rates)
        floor = self._options.floor
        return self._base_weights * (floor + (1 - floor) * 4 * rates * (1 - rates))

    def draw(self, episode: int, size: int) -> np.ndarray:
        """The rows of an episode, int64 [size]: drawn without replacement, and repeated where there are too few.

        The prompts with the largest log(u) / weight are such a draw (Efraimidis and Spirakis, 2006).
        """
        generator = np.random.default_rng(derive_seed(self._seed, "curriculum", episode))
        keys = np.log1p(-generator.random(len(self._rates))) / self.weights(episode)
        return np.resize(np.argsort(-keys, kind="stable")[:size], size)

    def state_dict(self) -> dict[str, Tensor]:
        """Solve rates, float64 [prompts], and the reports that wait, int64 [reports, 4]."""
        waiting = torch.tensor(self._waiting, dtype=torch.int64).reshape(-1, 4)
        return {"rates": torch.from_numpy(self._rates.copy()), "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["rates"]) != len(self._rates):
            return  # of other rows, whose change was accepted: nothing is known of the new ones
        self._rates = state["rates"].numpy().copy()
        self._waiting = [(episode, row, solved, scored) for episode, row, solved, scored in state["waiting"].tolist()]

    def _apply_until(self, last: int) -> None:
        due = [report for report in self._waiting if report[0] <= last]
        self._waiting = [report for report in self._waiting if report[0] > last]
        decay = self._options.decay
        for _, row, solved, scored in due:
            rate = solved / scored
            self._rates[row] = rate if np.isnan(self._rates[row]) else decay * self._rates[row] + (1 - decay) * rate
