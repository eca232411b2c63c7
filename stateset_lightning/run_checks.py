"""What must hold between data, model and the Trainer's options, checked before the first step; and how long the run is."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from stateset_lightning.errors import ConfigError, NonFiniteError

MAX_BAD_STEPS = 10
"""Optimizer steps in a row that may be skipped because their gradient is not finite."""


def check_run(trainer: Trainer, metrics: Iterable[str], context_length: int | None, max_new_tokens: int) -> None:
    """All that can be known to go wrong before the first step.

    Args:
        trainer: With its datamodule set up.
        metrics: Names that a validation logs.
        context_length: Positions of the model, if it has a limit.
        max_new_tokens: Tokens of a completion at most.
    """
    check_strategy(trainer)
    check_episode_fits_trainer(trainer)
    check_saves_fit_accumulation(trainer)
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
    prompts = getattr(data, "batch_size", steps_per_episode) * trainer.world_size
    if steps_per_episode // accumulate > prompts:
        raise ConfigError(
            f"data.steps_per_episode={steps_per_episode} makes {steps_per_episode // accumulate} optimizer steps of {prompts} prompts, "
            f"some of them empty: set it to at most {prompts * accumulate}, or raise data.batch_size"
        )
    micro_steps = steps_per_episode * num_iterations
    batches = _batches_per_epoch(trainer, getattr(data, "micro_steps_per_epoch", 0))
    if batches % micro_steps:
        raise ConfigError(
            f"trainer.limit_train_batches={trainer.limit_train_batches} ends an epoch inside an episode of {micro_steps} micro-steps "
            f"(data.num_iterations x data.steps_per_episode): set it to {max(1, batches // micro_steps) * micro_steps}"
        )


def check_saves_fit_accumulation(trainer: Trainer) -> None:
    """No checkpoint falls between two micro-steps of an optimizer step, where the accumulated gradient would be lost.

    Raises:
        ConfigError: If validation or a timed checkpoint could fall there.
    """
    accumulate, interval = trainer.accumulate_grad_batches, trainer.val_check_interval
    if accumulate == 1:
        return
    if isinstance(interval, int) and interval % accumulate:
        raise ConfigError(
            f"trainer.val_check_interval={interval} (in micro-steps) must be a multiple of trainer.accumulate_grad_batches={accumulate}"
        )
    if any(getattr(callback, "_train_time_interval", None) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError(
            f"ModelCheckpoint.train_time_interval could save inside an optimizer step of trainer.accumulate_grad_batches={accumulate} "
            "micro-steps: use every_n_train_steps"
        )


def check_strategy(trainer: Trainer) -> None:
    """Sharded parameters need an agreed number of forwards on every rank, which sampling does not make.

    Raises:
        ConfigError: For any strategy but a single device and DDP.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise ConfigError(f"trainer.strategy={type(trainer.strategy).__name__} is not supported: use auto, or ddp for several devices")


def check_reward_names(trainer: Trainer, known: Sequence[str]) -> None:
    """Rewards that rows or sources name exist; the scorer would find out when it meets the row.

    Raises:
        ConfigError: With the first scenarios that name others.
    """
    data: Any = getattr(trainer, "datamodule", None)
    named = data.named_rewards() if hasattr(data, "named_rewards") else {}
    unknown = {place: sorted(set(names) - set(known)) for place, names in named.items() if set(names) - set(known)}
    if unknown:
        examples = "; ".join(f"{place}: {', '.join(names)}" for place, names in list(unknown.items())[:5])
        raise ConfigError(f"{len(unknown)} scenarios name rewards that model.reward does not have ({', '.join(known)}): {examples}")


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


def check_resumable(state: Mapping[str, Any], seed: int, accumulate: int, world: int) -> None:
    """A run goes on exactly where its checkpoint left it, or not at all.

    Raises:
        ConfigError: If the seed differs, or, inside an episode, the accumulation or the number of ranks.
    """
    if state["seed"] != seed:
        raise ConfigError(f"seed_everything={seed} differs from the checkpoint's {state['seed']}: give the checkpoint's to resume its run")
    if state["episode"] is None:
        return
    if state["accumulate"] != accumulate:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={accumulate} differs from that of the checkpoint, {state['accumulate']}, which was made "
            "inside an episode: resume with that, or from a checkpoint at an episode's end"
        )
    if len(state["episode"]) != world:
        raise ConfigError(f"the checkpoint was made inside an episode of {len(state['episode'])} ranks and cannot be resumed by {world}")


def check_bad_steps(in_a_row: int, step: int) -> None:
    """Skipped optimizer steps are an exception, not the rule: loss scaling overflows now and then, a diverged policy always.

    Raises:
        NonFiniteError: After more than `MAX_BAD_STEPS` in a row.
    """
    if in_a_row > MAX_BAD_STEPS:
        raise NonFiniteError(
            f"the gradient was not finite in {in_a_row} optimizer steps in a row, the last of them step {step}: lower the learning rate, "
            "set trainer.gradient_clip_val, or use bf16-mixed instead of 16-mixed"
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
        bounds.append(trainer.max_epochs * (_batches_per_epoch(trainer, size) // trainer.accumulate_grad_batches))
    return min(bounds) if bounds else None


def _batches_per_epoch(trainer: Trainer, size: int) -> int:
    """How many of the loader's `size` batches an epoch takes."""
    limit = trainer.limit_train_batches
    # An integer is a number of batches, a float a share: 1 is one batch, 1.0 is all.
    return min(limit, size) if isinstance(limit, int) else math.floor(limit * size)
