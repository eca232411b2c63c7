"""What training remembers from one micro-step to the next; a checkpoint holds what a resumed run needs of it."""

from copy import deepcopy
from typing import Any

from stateset_lightning.training.collect import Collection
from stateset_lightning.training.episode import Episode
from stateset_lightning.training.metrics import RunMetrics
from stateset_lightning.training.resample import Sample


class TrainingState:
    """Of this rank. `started` is None between two optimizer steps: a checkpoint made at any other time loses a
    gradient.
    """

    def __init__(self) -> None:
        self.metrics = RunMetrics()
        self.episode: Episode | None = None
        self.episode_of_ranks: list[dict[str, Any]] | None = None  # of every rank, while a checkpoint would need it
        self.collection: Collection | None = None  # what the episode was made of; None in a run resumed inside it
        self.step_of_pass = 0  # the optimizer step under way, of those of a pass over the episode
        self.samples_are_fresh = False  # whether the weights are still those that sampled
        self.episode_ends = False  # with this micro-step
        self.bad_steps = 0  # in a row: skipped, since their gradient was not finite
        self.started: float | None = None  # the optimizer step under way, by `time.perf_counter`
        self.collect_seconds = 0.0  # of it
        self.keep()

    def keep(self) -> None:
        """Remembers the end of an optimizer step, for `turn_back`."""
        self._kept = deepcopy(self.metrics.state_dict()), self.episode_of_ranks

    def turn_back(self) -> None:
        """As a checkpoint at the last optimizer step's end would have found it: the one under way is given up."""
        self.started, (metrics, self.episode_of_ranks) = None, self._kept
        self.metrics.load_state_dict(metrics)

    @property
    def sample_and_advantages(self) -> tuple[Sample, list[float] | None] | None:
        """What the episode was made of, and its advantages; None in a run that was resumed inside the episode."""
        if self.collection is None or self.episode is None:
            return None
        return self.collection.sample, self.episode.advantages_N.tolist()
