"""What must hold between data, model and the Trainer's options, checked before the first step; and how long the run is."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from stateset_lightning.errors import ConfigError


def check_run(trainer: Trainer, metrics: Iterable[str], context_length: int | None, max_new_tokens: int) -> None:
    """All that can be known to go wrong before the first step.

    Args:
        trainer: With its datamodule set up.
        metrics: Names that a validation logs.
        context_length: Positions of the model, if it has a limit.
        max_new_tokens: Tokens of a completion at most.
    """
    check_episode_fits_trainer(trainer)
    check_monitors(trainer, metrics)
    check_context(trainer, context_length, max_new_tokens)


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
        multiple = accumulate * math.ceil(steps_per_episode / accumulate)
        raise ConfigError(
            f"trainer.accumulate_grad_batches={accumulate} must divide data.steps_per_episode={steps_per_episode}, so that "
            f"an optimizer step stays inside a pass over an episode: set data.steps_per_episode to {multiple}"
        )
    micro_steps = steps_per_episode * num_iterations
    limit, size = trainer.limit_train_batches, getattr(data, "micro_steps_per_epoch", 0)
    # An integer is a number of batches, a float a share: 1 is one batch, 1.0 is all.
    batches = min(limit, size) if isinstance(limit, int) else math.floor(limit * size)
    if batches % micro_steps:
        raise ConfigError(
            f"trainer.limit_train_batches={limit} ends an epoch inside an episode of {micro_steps} micro-steps "
            f"(data.num_iterations x data.steps_per_episode): set it to {max(1, batches // micro_steps) * micro_steps}"
        )


def check_monitors(trainer: Trainer, metrics: Iterable[str]) -> None:
    """A callback that monitors validation gets its metric. Lightning would say so after the first validation, or never.

    Raises:
        ConfigError: If there is no validation data, or validation logs no such metric.
    """
    known = list(metrics)
    data: Any = getattr(trainer, "datamodule", None)
    validates = data is None or getattr(data, "has_validation", True)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or not monitor.startswith("val"):
            continue
        place = f"{type(callback).__name__}.monitor={monitor}"
        if not validates:
            raise ConfigError(f"{place}: nothing to validate on; set data.validation or data.validation_fraction, or another monitor")
        if monitor not in known:
            raise ConfigError(f"{place}: validation logs no such metric; it logs {', '.join(known)}")


def check_context(trainer: Trainer, context_length: int | None, max_new_tokens: int) -> None:
    """The longest prompt and its completion fit into the model; the engine would find out when it meets the prompt.

    Raises:
        ConfigError: If they do not.
    """
    longest = getattr(getattr(trainer, "datamodule", None), "longest_prompt", 0)
    if context_length is not None and longest + max_new_tokens > context_length:
        room = context_length - max_new_tokens
        remedy = f"set data.max_prompt_tokens={room} (and data.overlong_prompts), or lower it" if room > 0 else "lower it"
        raise ConfigError(
            f"model.rollout.max_new_tokens={max_new_tokens} and the longest prompt of {longest} tokens exceed the model's {context_length} "
            f"positions: {remedy}"
        )


def check_checkpoint(path: str) -> None:
    """A checkpoint file can be read and is one of ours. Lightning's own names (`last`, `best`, ...) and sharded folders are left to it.

    Raises:
        ConfigError: If there is no such file, or it is no whole checkpoint of this package.
    """
    file = Path(path)
    if path in ("last", "best", "hpc") or path.startswith("registry") or "://" in path or file.is_dir():
        return
    if not file.is_file():
        raise ConfigError(f"ckpt_path={path}: there is no such file; give a .ckpt file, or `last` or `best`")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ConfigError(f"ckpt_path={path}: the file is damaged or no checkpoint; give a file that a run wrote") from error
    if not isinstance(content, dict) or not {"state_dict", "stateset"} <= set(content):
        raise ConfigError(f"ckpt_path={path}: no checkpoint of stateset-lightning; for other weights set model.policy.model_name")


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
