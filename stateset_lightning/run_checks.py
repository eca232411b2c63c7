"""What must hold between episodes and the Trainer's options, checked before the first step; and how long the run is."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer

from stateset_lightning.errors import ConfigError


def check_episode_fits_trainer(trainer: Trainer) -> None:
    """An optimizer step never straddles two passes over an episode, and a run never ends an epoch inside an episode.

    Raises:
        ConfigError: If `accumulate_grad_batches` does not divide `steps_per_episode`, or `limit_train_batches` cuts an episode.
    """
    data: Any = getattr(trainer, "datamodule", None)
    steps_per_episode = getattr(data, "steps_per_episode", 1)
    num_iterations = getattr(data, "num_iterations", 1)
    accumulate = trainer.accumulate_grad_batches
    if steps_per_episode % accumulate:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={accumulate} must divide data.steps_per_episode={steps_per_episode}, so that an optimizer "
            f"step stays inside a pass over an episode: set data.steps_per_episode to {accumulate * math.ceil(steps_per_episode / accumulate)}"
        )
    micro_steps = steps_per_episode * num_iterations
    limit, size = trainer.limit_train_batches, getattr(data, "micro_steps_per_epoch", 0)
    batches = limit if isinstance(limit, int) else math.floor(limit * size)
    if limit != 1.0 and batches % micro_steps:
        raise ConfigError(
            f"trainer.limit_train_batches={limit} ends an epoch inside an episode of {micro_steps} micro-steps "
            f"(data.num_iterations x data.steps_per_episode): set it to {max(1, batches // micro_steps) * micro_steps}"
        )


def optimizer_steps_of_run(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; None where it has no end in steps (`max_time` alone).

    `trainer.estimated_stepping_batches` would do, but touching it with `max_epochs` set makes Lightning forget the loader's position
    on resume (github.com/Lightning-AI/pytorch-lightning/issues/20550).
    """
    bounds = []
    if trainer.max_steps >= 0:
        bounds.append(trainer.max_steps)
    size = getattr(getattr(trainer, "datamodule", None), "micro_steps_per_epoch", None)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and size is not None:
        limit = trainer.limit_train_batches
        batches = min(limit, size) if isinstance(limit, int) else math.floor(limit * size)
        bounds.append(trainer.max_epochs * (batches // trainer.accumulate_grad_batches))
    return min(bounds) if bounds else None
