"""What must hold between data, model and the Trainer's options, checked before the first step; and how long the run is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from stateset_lightning.checkpoint_io import read_checkpoint
from stateset_lightning.errors import ConfigError, NonFiniteError, SamplingError
from stateset_lightning.evaluation import Evaluation
from stateset_lightning.policy import context_length
from stateset_lightning.policy.precision import has_bfloat16_products, logprob_tolerance, sampling_dtype
from stateset_lightning.sharding import FSDP2Strategy, total_norm


def checks_of_run(trainer: Trainer, module: Any) -> list[Callable[[], None]]:
    """All that can be known to go wrong before the first step; each raises ConfigError, the last one only warns.

    Args:
        trainer: With its datamodule set up, and its optimizers.
        module: A GRPOLightningModule with its policy loaded.
    """
    rewards = [reward.name for reward in module.rewards]
    metrics = [f"val/{name}" for name in Evaluation(rewards, module.evaluation).logged_names()]
    return [
        partial(check_reward_names, trainer, rewards),
        partial(check_strategy, trainer),
        partial(check_episode_fits_trainer, trainer),
        partial(check_saves, trainer),
        partial(check_monitors, trainer, metrics),
        partial(check_context, trainer, context_length(module.policy.model), module.rollout.max_new_tokens),
        partial(check_dynamic_sampling, trainer, module.rollout.dynamic_sampling, module.algorithm.needs_greedy_baseline),
        *(partial(check_clipping, trainer, optimizer) for optimizer in trainer.optimizers),
        partial(check_speed, trainer, module.policy.model.dtype),
    ]


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


def check_saves(trainer: Trainer) -> None:
    """Checkpoints are made where a run can go on exactly; after an exception it cannot.

    Raises:
        ConfigError: If a callback saves on every exception.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
            raise ConfigError(
                f"{type(callback).__name__} saves on any exception, in the middle of whatever failed: remove it, or save_on_exception. "
                "SIGTERM and Ctrl-C end a run with a checkpoint anyway; after an error it goes on from the one before"
            )


def check_strategy(trainer: Trainer) -> None:
    """Sampling and reductions are right for these; others would hang, or reduce by another rule, without a word.

    Raises:
        ConfigError: For any strategy but a single device, DDP and our FSDP2.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
        raise ConfigError(
            f"trainer.strategy={type(trainer.strategy).__name__} is not supported: use auto, ddp for several devices, or fsdp2 where a "
            "model does not fit on each of them"
        )


def check_clipping(trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Gradients can be clipped. Lightning would say so at the first optimizer step, when an episode has been sampled.

    Raises:
        ConfigError: If the optimizer undoes loss scaling by itself, as a fused one does: its gradients are scaled when they are clipped.
    """
    is_mixed = isinstance(trainer.precision_plugin, MixedPrecision)
    if trainer.gradient_clip_val and is_mixed and getattr(optimizer, "_step_supports_amp_scaling", False):  # as Lightning asks
        raise ConfigError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} with trainer.precision={trainer.precision}: Lightning clips no "
            f"gradients of a fused {type(optimizer).__name__} under mixed precision; leave out its option fused: true, or the clipping"
        )


def check_dynamic_sampling(trainer: Trainer, rounds: int, needs_greedy_baseline: bool) -> None:
    """Dynamic sampling has a data module to take other prompts from, and an algorithm to which a constant group says nothing.

    Raises:
        ConfigError: If not.
    """
    if rounds and needs_greedy_baseline:
        raise ConfigError(
            f"model.rollout.dynamic_sampling={rounds} replaces groups of equal rewards, from which this algorithm learns all the same, "
            "since it compares with a greedy completion: set it to 0, or choose another algorithm"
        )
    if rounds and not hasattr(getattr(trainer, "datamodule", None), "replacements"):
        raise ConfigError(
            f"model.rollout.dynamic_sampling={rounds} replaces prompts by others of data.train, and fit() got no data module to ask: "
            "use a ScenarioDataModule, or set it to 0"
        )


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
        if monitor not in known and re.sub(r"^val/topic/.+/", "val/topic/<topic>/", monitor) not in known:
            raise ConfigError(f"{place}: validation logs no such metric; it logs {', '.join(known)}")


def check_speed(trainer: Trainer, dtype: torch.dtype) -> None:
    """Warns of half precision, by the weights' dtype or the Trainer, where it only costs time: most CPUs have no arithmetic for it."""
    is_half = dtype.itemsize == 2 or sampling_dtype(str(trainer.precision)) is not None
    if is_half and trainer.strategy.root_device.type == "cpu" and not has_bfloat16_products():
        rank_zero_warn(
            f"trainer.precision={trainer.precision} with {str(dtype).removeprefix('torch.')} weights: this CPU has no arithmetic for half "
            "precision, so a step takes many times as long as in float32 (trainer.precision: 32-true, model.policy.dtype: float32)"
        )


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
    """A checkpoint file can be read and is one of ours. Lightning's own `hpc`, remote and sharded ones are left to it.

    Raises:
        CheckpointError: If there is no such file, or it is no whole checkpoint of this package.
    """
    if path != "hpc" and not path.startswith("registry") and "://" not in path and not Path(path).is_dir():
        read_checkpoint(Path(path), map_location="cpu", mmap=True)


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


def check_sampling_difference(metrics: Mapping[str, float], dtype: torch.dtype, temperature: float) -> None:
    """Before the first update of an episode, sampler and trainer are the same policy: their log-probs differ by float error alone.

    Args:
        metrics: Of the optimizer step; nothing is checked where nothing trained.
        dtype: That the sampler computes in.
        temperature: Divides the logits, and so multiplies their error.

    Raises:
        SamplingError: If they differ by more than `logprob_tolerance` on average.
    """
    difference = metrics.get("policy/sampling_difference", 0.0)
    limit = logprob_tolerance(dtype, temperature=temperature)
    if difference > limit:
        raise SamplingError(
            f"the log-probs of sampling and of training differ by {difference:.2g} nats per token, where float error ({dtype}) is below "
            f"{limit:.2g}: sampler and trainer do not compute the same policy, and gradients would be wrong. Set model.policy.scoring to "
            "padded; if that helps, the model does not support packed scoring; if not, its cached decoding differs from its forward pass"
        )


def check_bad_steps(in_a_row: int, limit: int, step: int) -> None:
    """Skipped optimizer steps are an exception, not the rule: loss scaling overflows now and then, a diverged policy always.

    Raises:
        NonFiniteError: After more than `limit` in a row.
    """
    if in_a_row > limit:
        raise NonFiniteError(
            f"the gradient was not finite in {in_a_row} optimizer steps in a row (model.max_bad_steps={limit}), the last of them step "
            f"{step}: lower the learning rate, set trainer.gradient_clip_val, or use bf16-mixed instead of 16-mixed"
        )


def check_weights(parameters: Iterable[Tensor], step: int) -> None:
    """A finite gradient can still make infinite weights; the run ends before a checkpoint could hold them.

    Raises:
        NonFiniteError: If it did.
    """
    weights = [p.detach() for p in parameters if p.requires_grad]
    # The Euclidean norm is four times as fast as the largest weight, but infinite of some finite weights too.
    if not math.isfinite(total_norm(weights)) and not math.isfinite(total_norm(weights, norm_type=math.inf)):
        raise NonFiniteError(
            f"weights are not finite after optimizer step {step}: lower the learning rate and set trainer.gradient_clip_val, then go on "
            "from the last checkpoint, which was made before"
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
