"""Resumable loader of training episodes, and the loader for evaluation.

Both are plain iterables with a length, not torch `DataLoader`s: the batches are lists that lie in memory, so there is
nothing for worker processes to do, and Lightning would rebuild a `DataLoader` with a sampler of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stateset_lightning.data.order import EpochOrder, SolveRates
from stateset_lightning.errors import ConfigError
from stateset_lightning.seeding import derive_seed, uniforms
from stateset_lightning.types import PromptBatch, Scenario

Split = Literal["train", "validation", "test", "predict"]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a split that are served, on every rank.

    Args:
        scenarios: The scenarios.
        tokens: Prompt tokens of each scenario.
        system_prompt: Stands before each scenario's own context in the system turn.
    """

    scenarios: Sequence[Scenario]
    tokens: Sequence[list[int]]
    system_prompt: str | None = None

    def batch(
        self, rows: list[int], positions: list[int], split: Split, episode_index: int = 0, **steps: int
    ) -> PromptBatch:
        """The prompts at `rows`; `steps` are the arguments of `PromptBatch` that count micro-steps."""
        scenarios = [self.scenarios[row] for row in rows]
        return PromptBatch(
            prompt_tokens=[self.tokens[row] for row in rows],
            conversations=[scenario.turns(self.system_prompt) for scenario in scenarios],
            scenarios=scenarios,
            positions=positions,
            episode_index=episode_index,
            split=split,
            rows=rows,
            **steps,
        )


_DESCRIPTIONS = {
    "scenarios": "the number of scenarios in data.train",
    "prompts": "what the prompts of data.train are (a digest)",
    "sources": "the sizes and weights of the sources in data.train",
    "world_size": "the number of processes (trainer.devices * trainer.num_nodes)",
}
"""What entries of the state are called that are no option of the data module."""


class EpisodeLoader:
    """Serves each episode's prompts `num_iterations * steps_per_episode` times, as micro-steps 0, 1, ...

    An epoch has ceil(scenarios / (batch_size * world_size)) episodes; the last one is filled up from the epoch's start,
    so that every scenario comes at least once (of each source, if weighted: its share). Rank r gets every
    `world_size`-th prompt of an episode's global batch, from r on.

    The loader counts micro-steps over the whole run, and iterating goes on where it stands. It has no `set_epoch`:
    Lightning's own epoch number skips one when a run with `max_steps` is resumed from a checkpoint made at an epoch's
    end (2.6.6). It has a length because Lightning fetches one batch ahead from loaders without, and would lose that
    batch on resume.

    Args:
        prompts: All training prompts, on every rank.
        order: Where each one stands in an epoch.
        batch_size: Prompts per episode and rank.
        num_iterations: Passes over an episode.
        steps_per_episode: Micro-steps of a pass.
        rank: Of this process.
        world_size: Number of processes.
        limit: Micro-steps that the trainer takes per epoch of its own (`limit_train_batches`); its next epoch goes on
            behind them, so that a limit does not keep scenarios out. None: all.
        repeat: Serve the first `limit` micro-steps again and again (`overfit_batches`).
        solve_rates: Draws the prompts instead of `order` (a curriculum), which then says only how long an epoch is. Not
            with `repeat`.
        fingerprint: What else decides the order, by option; a checkpoint in which it differs is refused.
    """

    def __init__(
        self,
        prompts: Prompts,
        order: EpochOrder,
        *,
        batch_size: int,
        num_iterations: int = 1,
        steps_per_episode: int = 1,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        repeat: bool = False,
        solve_rates: SolveRates | None = None,
        fingerprint: Mapping[str, int | bool | str] | None = None,
    ) -> None:
        assert len(prompts.scenarios) == len(prompts.tokens) == order.size > 0
        self._prompts = prompts
        self._order = order
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self.num_micro_steps = num_iterations * steps_per_episode
        self.steps_per_episode = steps_per_episode
        self.episodes_per_epoch = -(-order.size // (batch_size * world_size))
        self._pass_length = min(limit, len(self)) if limit is not None else len(self)
        self._repeat = repeat
        self.solve_rates = solve_rates
        self._fingerprint: dict[str, int | bool | str] = {
            "scenarios": order.size,
            "batch_size": batch_size,
            "num_iterations": num_iterations,
            "steps_per_episode": steps_per_episode,
            "world_size": world_size,
            **(fingerprint or {}),
        }
        self._completed = 0  # micro-steps since the run's start
        # epoch (of a curriculum: episode) and its rows, filled up to whole episodes
        self._cached: tuple[int, np.ndarray] | None = None

    @property
    def num_filled(self) -> int:
        """Positions at an epoch's end that repeat prompts of its start."""
        return self.episodes_per_epoch * self._batch_size * self._world_size - self._order.size

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
        """Epoch, micro-steps completed in it, and what they depend on; equal on all ranks.

        Lightning asks for it when the batch that it got last has been trained on.
        """
        epoch, completed = divmod(self._completed, len(self))
        return {"epoch": epoch, "completed": completed, **self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            ConfigError: If an option that decides the order differs: the position would mean other prompts.
        """
        for key, value in self._fingerprint.items():
            if state.get(key) != value:
                name = _DESCRIPTIONS.get(key, f"data.{key}")
                raise ConfigError(
                    f"{name} is {value!r}, but {state.get(key)!r} in the checkpoint, whose position in the data would"
                    f" mean other prompts; resume with {state.get(key)!r}, or start a new run from the checkpoint's"
                    " weights"
                )
        self._completed = int(state["epoch"]) * len(self) + int(state["completed"])

    def next_episode(self) -> PromptBatch:
        """The first batch of the episode behind the one that is being served, which is served all the same when its
        turn comes.
        """
        return self._batch_at(-(-self._completed // self.num_micro_steps) * self.num_micro_steps)

    def _batch_at(self, completed: int) -> PromptBatch:
        """The batch of the micro-step before which `completed` were completed."""
        if self._repeat:
            round_number, micro_step = divmod(completed, self._pass_length)
            episode, micro_step = divmod(micro_step, self.num_micro_steps)
            episode_index = round_number * -(-self._pass_length // self.num_micro_steps) + episode
        else:
            episode_index, micro_step = divmod(completed, self.num_micro_steps)
            episode = episode_index
        rows = self._global_batch(episode)[self._rank :: self._world_size].tolist()
        return self._make_batch(rows, list(range(self._rank, self._size, self._world_size)), episode_index, micro_step)

    def _make_batch(
        self, rows: list[int], positions: list[int], episode_index: int, micro_step: int = 0
    ) -> PromptBatch:
        return self._prompts.batch(
            rows,
            positions,
            "train",
            episode_index,
            micro_step=micro_step,
            num_micro_steps=self.num_micro_steps,
            steps_per_episode=self.steps_per_episode,
        )

    def replacements(self, batch: PromptBatch, slots: Sequence[int], round_number: int) -> PromptBatch:
        """Other prompts in place of those in some slots of a batch, for dynamic sampling.

        A draw follows from (seed, episode, position, round) alone, by the weights of the sources and of the curriculum,
        and is another prompt than the slot holds, if there is another. Positions, from which noise is derived, continue
        behind the episode's own: position + round * (prompts of all ranks).

        Args:
            batch: One of this loader's, perhaps with prompts replaced in earlier rounds.
            slots: Which of its prompts are to be replaced.
            round_number: 1 or above.
        """
        assert batch.rows is not None
        pool, weights = self._pool(batch.episode_index)
        ends = np.cumsum(weights)
        positions = [batch.positions[slot] for slot in slots]
        rows = []
        for slot, position in zip(slots, positions, strict=True):
            seed = derive_seed(self._order.seed, "dynamic", batch.episode_index, position, round_number)
            rows.append(
                int(pool[_draw_other(ends, int(np.searchsorted(pool, batch.rows[slot])), uniforms([seed], 1)[0, 0])])
            )
        return self._make_batch(
            rows, [position + round_number * self._size for position in positions], batch.episode_index
        )

    def _pool(self, episode_index: int) -> tuple[np.ndarray, np.ndarray]:
        """What an episode's replacements are drawn from: rows in ascending order, and their weights."""
        if self.solve_rates is not None:
            weights = self.solve_rates.weights(episode_index)
            return np.arange(len(weights)), weights
        if not self._repeat:
            return np.arange(self._order.size), self._order.row_weights
        served = [self._global_batch(episode) for episode in range(-(-self._pass_length // self.num_micro_steps))]
        pool = np.unique(np.concatenate(served))
        return pool, self._order.row_weights[pool]

    @property
    def _size(self) -> int:
        """Prompts of an episode on all ranks."""
        return self._batch_size * self._world_size

    def _global_batch(self, episode: int) -> np.ndarray:
        """Scenarios of an episode on all ranks, int64 [batch_size * world_size]."""
        if self.solve_rates is not None:
            if self._cached is None or self._cached[0] != episode:
                self._cached = (episode, self.solve_rates.draw(episode, self._size))
            return self._cached[1]
        epoch, number = divmod(episode, self.episodes_per_epoch)
        size = self._size
        if self._cached is None or self._cached[0] != epoch:
            # `resize` repeats from the start, as often as it takes.
            self._cached = (epoch, np.resize(self._order.epoch(epoch), self.episodes_per_epoch * size))
        return self._cached[1][number * size :][:size]


def _draw_other(ends: np.ndarray, excluded: int, u: float) -> int:
    """An index drawn by weights whose running sums are `ends`, but not `excluded`, unless there is no other; u in (0,
    1).
    """
    if len(ends) == 1:
        return 0
    start = ends[excluded - 1] if excluded else 0.0
    width = ends[excluded] - start
    x = u * (ends[-1] - width)
    index = int(np.searchsorted(ends, x if x < start else x + width, side="right"))
    if index == excluded:  # by rounding, at its edge
        index += 1
    return index if index < len(ends) else excluded - 1


class EvaluationLoader:
    """Serves every scenario of a split once, without filling up: rank r gets every `world_size`-th, from r on.

    Args:
        prompts: All prompts of the split, on every rank.
        split: Which split they are.
        batch_size: Prompts per batch and rank.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        prompts: Prompts,
        split: Split,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._prompts = prompts
        self._split = split
        self._batch_size = batch_size
        self._rows = range(rank, len(prompts.scenarios), world_size)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        for start in range(0, len(self._rows), self._batch_size):
            rows = list(self._rows[start : start + self._batch_size])
            yield self._prompts.batch(rows, rows, self._split)
