"""The loader of training episodes, which resumes exactly, and the loader for evaluation.

Both are plain iterables with a length, not torch `DataLoader`s: the batches are lists in memory, so worker processes
would have nothing to do, and Lightning would rebuild a `DataLoader` with a sampler of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import numpy as np

from stateset_lightning.data.order import EpochOrder, SolveRates
from stateset_lightning.data.prompts import EncodedPrompts, asked
from stateset_lightning.data.ragged import RaggedTokens
from stateset_lightning.data.scenario_set import spare_texts
from stateset_lightning.errors import ConfigError
from stateset_lightning.ranks import Ranks
from stateset_lightning.seeding import derive_seed, uniforms
from stateset_lightning.types import PromptBatch, Scenario

Split = Literal["train", "validation", "test", "predict", "generate"]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a split, all of them on every rank.

    Args:
        scenarios: The scenarios that are served.
        tokens: Prompt tokens of each scenario.
        system_prompt: Comes before each scenario's own context in the system turn.
        opened: What each prompt has of its answer; none has anything where this is empty.
        encode: Makes prompts of scenarios when they are served, those of a large split; None: all are in `tokens`.
    """

    scenarios: Sequence[Scenario]
    tokens: RaggedTokens
    system_prompt: str | None = None
    opened: Sequence[str] = ()
    encode: Callable[[Sequence[Scenario]], EncodedPrompts] | None = None

    def batch(self, rows: list[int], positions: list[int], split: Split, **counts: int) -> PromptBatch:
        """The prompts at `rows`; `counts` are those arguments of `PromptBatch` that count episodes and micro-steps."""
        scenarios = [self.scenarios[row] for row in rows]
        if self.encode is None:
            tokens = [self.tokens[row] for row in rows]
            opened: Sequence[str] = [self.opened[row] for row in rows] if self.opened else [""] * len(rows)
        else:
            spare_texts(scenarios)
            made = self.encode(scenarios)
            tokens, opened = list(made.tokens), made.opened
        conversations = [asked(*each, self.system_prompt) for each in zip(scenarios, opened, strict=True)]
        return PromptBatch(tokens, conversations, scenarios, positions, split=split, rows=rows, **counts)


# What entries of a loader's state are called that are not options of the data module.
_DESCRIPTIONS = {
    "scenarios": "the number of scenarios in data.train",
    "prompts": "what the prompts of data.train are (a digest)",
    "sources": "the sizes and weights of the sources in data.train",
    "world_size": "the number of processes (trainer.devices * trainer.num_nodes)",
}

# Entries that say which rows are served: a state without them may serve others.
ROWS = "scenarios", "prompts", "sources"


@dataclass(eq=False)
class EpisodeLoader:
    """Serves the prompts of each episode `num_iterations * steps_per_episode` times, as micro-steps 0, 1, ...

    An epoch has ceil(scenarios / (batch_size * world_size)) episodes. The last one is filled up from the epoch's start,
    so every scenario comes at least once (with weighted sources: each source has its share). Rank r gets the prompts
    r, r + world_size, ... of an episode's batch of all ranks.

    The loader counts micro-steps over the whole run, and each iteration continues where the last one ended. It has no
    `set_epoch`: Lightning's own epoch number skips one when a run with `max_steps` resumes from a checkpoint made at an
    epoch's end (2.6.6). It has a length because Lightning fetches one batch ahead from loaders without one, and would
    lose that batch on resume.

    Args:
        prompts: The training prompts.
        order: Their order in each epoch.
        batch_size: Prompts per episode and rank.
        num_iterations: Passes over an episode.
        steps_per_episode: Micro-steps per pass.
        ranks: This process among all that serve an episode.
        limit: Micro-steps that the trainer takes per epoch (`limit_train_batches`); its next epoch continues after
            them, so a limit does not exclude scenarios. None: all.
        repeat: Serve the first `limit` micro-steps again and again (`overfit_batches`).
        solve_rates: Draws the prompts in place of `order` (a curriculum); `order` then only says how long an epoch is.
            Not together with `repeat`.
        fingerprint: Further options that decide the order; a checkpoint with other values is refused.
    """

    prompts: Prompts
    order: EpochOrder
    _: KW_ONLY
    batch_size: int
    num_iterations: int = 1
    steps_per_episode: int = 1
    ranks: Ranks = field(default_factory=Ranks)
    limit: int | None = None
    repeat: bool = False
    solve_rates: SolveRates | None = None
    fingerprint: Mapping[str, int | bool | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.prompts.scenarios) == self.order.size > 0
        self.episode_size = self.batch_size * self.ranks.world  # prompts of an episode on all ranks
        self._positions = list(range(self.ranks.rank, self.episode_size, self.ranks.world))
        self.num_micro_steps = self.num_iterations * self.steps_per_episode
        self._steps = {"num_micro_steps": self.num_micro_steps, "steps_per_episode": self.steps_per_episode}
        self.episodes_per_epoch = -(-self.order.size // self.episode_size)
        self._pass_length = len(self) if self.limit is None else min(self.limit, len(self))
        self._repeated_episodes = -(-self._pass_length // self.num_micro_steps) if self.repeat else 0
        sizes = {name: getattr(self, name) for name in ("batch_size", "num_iterations", "steps_per_episode")}
        self._fingerprint = {"scenarios": self.order.size, **sizes, "world_size": self.ranks.world, **self.fingerprint}
        self._completed = 0  # micro-steps since the start of the run
        # Epoch and its rows; with a curriculum: episode and its rows.
        self._cached: tuple[int, np.ndarray] | None = None

    @property
    def num_filled(self) -> int:
        """Positions at the end of an epoch that repeat prompts of its start."""
        return self.episodes_per_epoch * self.episode_size - self.order.size

    def __len__(self) -> int:
        return self.episodes_per_epoch * self.num_micro_steps

    def __iter__(self) -> Iterator[PromptBatch]:
        # Lightning makes iterators that it never uses: nothing may change before the first batch is asked for.
        while True:
            batch = self._batch_at(self._completed)
            self._completed += 1
            yield batch
            if self._completed % self._pass_length == 0:
                return

    def state_dict(self) -> dict[str, int | bool | str]:
        """Epoch, micro-steps completed in it, and the options that decide the order; equal on all ranks.

        Lightning asks for it when the last batch that it got has been trained on.
        """
        epoch, completed = divmod(self._completed, len(self))
        return {"epoch": epoch, "completed": completed, **self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where the state was taken.

        Raises:
            ConfigError: If an option that decides the order differs: the position would mean other prompts.
        """
        for key, value in self._fingerprint.items():
            if state.get(key, value if key in ROWS else None) != value:
                name = _DESCRIPTIONS.get(key, f"data.{key}")
                told = f"{name} is {value!r}, but {state.get(key)!r} in the checkpoint"
                raise ConfigError(f"{told}: resume with that, or start a new run from the checkpoint's weights")
        # Where Lightning counts itself to be; an epoch may be shorter now, with fewer rows.
        self._completed = int(state["epoch"]) * len(self) + min(int(state["completed"]), len(self))

    def next_episode(self) -> PromptBatch:
        """The first batch of the episode after the current one. It is served again when its turn comes."""
        return self._batch_at(-(-self._completed // self.num_micro_steps) * self.num_micro_steps)

    def replacements(self, batch: PromptBatch, slots: Sequence[int], round_number: int) -> PromptBatch:
        """Other prompts for some slots of a batch, for dynamic sampling.

        A draw depends on (seed, episode, position, round) alone. It follows the weights of the sources and of the
        curriculum, and is another prompt than the slot's present one, if there is another. Positions, from which
        sampling seeds are derived, continue after the episode's own: position + round * (prompts of all ranks).

        Args:
            batch: One of this loader's, perhaps with prompts replaced in earlier rounds.
            slots: Indices of the prompts to replace.
            round_number: 1 or above.
        """
        assert batch.rows is not None
        weights = self._replacement_weights(batch.episode_index)
        rows, positions = [], []
        for slot in slots:
            position = batch.positions[slot]
            seed = derive_seed(self.order.seed, "dynamic", batch.episode_index, position, round_number)
            first = batch.rows[slot] // self.order.size * self.order.size  # of the epoch: a stream goes on
            rows.append(first + _draw_other(weights, batch.rows[slot] - first, uniforms([seed], 1)[0, 0]))
            positions.append(position + round_number * self.episode_size)
        return self.prompts.batch(rows, positions, "train", episode_index=batch.episode_index, **self._steps)

    def _batch_at(self, completed: int) -> PromptBatch:
        """The batch of the micro-step after `completed` micro-steps."""
        times, step = divmod(completed, self._pass_length) if self._repeated_episodes else (0, completed)
        episode, micro_step = divmod(step, self.num_micro_steps)
        rows = self._global_batch(episode)[self._positions].tolist()
        counts = {"episode_index": times * self._repeated_episodes + episode, "micro_step": micro_step}
        return self.prompts.batch(rows, [*self._positions], "train", **counts, **self._steps)

    def _global_batch(self, episode: int) -> np.ndarray:
        """Rows of an episode on all ranks, int64 [batch_size * world_size]."""
        epoch, number = divmod(episode, self.episodes_per_epoch)
        key, rates = epoch if self.solve_rates is None else episode, self.solve_rates
        if self._cached is None or self._cached[0] != key:
            self._cached = key, self.order.epoch(epoch) if rates is None else rates.draw(episode, self.episode_size)
        # From the start again, as often as needed; of a curriculum, it is the whole draw.
        return self._cached[1].take(np.arange(self.episode_size) + number * self.episode_size, mode="wrap")

    def _replacement_weights(self, episode_index: int) -> np.ndarray:
        """Weight of each row as a replacement, float64 [scenarios]; 0 for what `repeat` never serves."""
        if self.solve_rates is not None:
            return self.solve_rates.weights(episode_index)
        if not self._repeated_episodes:
            return self.order.row_weights
        served = np.concatenate([self._global_batch(episode) for episode in range(self._repeated_episodes)])
        return np.where(np.isin(np.arange(self.order.size), served), self.order.row_weights, 0.0)


def _draw_other(weights: np.ndarray, excluded: int, u: float) -> int:
    """An index drawn in proportion to the weights, but not `excluded`, unless no other has any; u in (0, 1)."""
    ends = np.cumsum(np.where(np.arange(len(weights)) == excluded, 0.0, weights))
    return int(np.searchsorted(ends, u * ends[-1], side="right")) if ends[-1] else excluded


class EvaluationLoader:
    """Serves every scenario of a split once, without filling up: rank r gets rows r, r + world_size, ...

    Args:
        prompts: The prompts of the split.
        split: Which split they are.
        batch_size: Prompts per batch and rank.
        ranks: This process among all that evaluate.
    """

    def __init__(self, prompts: Prompts, split: Split, *, batch_size: int, ranks: Ranks) -> None:
        self._prompts = prompts
        self._split = split
        self._batch_size = batch_size
        self._rows = range(ranks.rank, len(prompts.scenarios), ranks.world)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        for start in range(0, len(self._rows), self._batch_size):
            rows = list(self._rows[start : start + self._batch_size])
            yield self._prompts.batch(rows, rows, self._split, episode_index=0)
