"""The length of a run in optimizer steps, its optimizer, and learning-rate schedules.

What torch refuses, and what could not train, is an error of one line before anything is sampled.
"""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from stateset_lightning.errors import ConfigError, bounded, one_line
from stateset_lightning.training.data import data_of

Options = Sequence[dict[str, Any]]  # of an optimizer, by parameter group


@bounded("model.lr_scheduler")
@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a decay to `final_factor` times the learning rate after the run's last optimizer step.

    Args:
        decay: Shape of the decay after the warm-up.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from zero.
        final_factor: Share of the learning rate that remains at the end of a decay.
        total_steps: Horizon in optimizer steps. None: that of the run (`trainer.max_steps`, or `max_epochs` times an
            epoch's steps).
    """

    decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Ge(0)] = 0
    final_factor: Annotated[float, Ge(0), Le(1)] = 0.0
    total_steps: Annotated[int, Ge(1)] | None = None

    def factor(self, step: int, total_steps: int | None) -> float:
        """What the learning rate is multiplied by before optimizer step `step` (from 0)."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant" or total_steps is None:
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        shape = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_factor + (1 - self.final_factor) * shape

    def build(self, optimizer: Optimizer, run_steps: int | None) -> LambdaLR:
        """The torch scheduler, to be stepped once per optimizer step.

        Raises:
            ConfigError: If a decay has no horizon, neither its own nor the run's.
        """
        total_steps = self.total_steps or run_steps
        if self.decay != "constant" and total_steps is None:
            raise ConfigError(f"model.lr_scheduler.decay={self.decay!r} needs trainer.max_steps, or total_steps")
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))


def given_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Learning rate, weight decay, ... of each parameter group, as the optimizer was made with them.

    A rate that is a tensor (torchao's) is a number here: a schedule changes the tensor in place.
    """
    groups = ({**group, "lr": float(group["lr"])} for group in optimizer.param_groups)
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(float(rate))
    else:
        group["lr"] = rate


def keep_given_options(optimizer: Optimizer, scheduler: Any | None, given: Options, saved: Options) -> None:
    """After a resume: options that differ from those the checkpoint's run was given win over the restored state.

    Args:
        optimizer: With its restored state.
        scheduler: With its restored state; its base learning rates follow.
        given: `given_options` of this run.
        saved: Those of the run that wrote the checkpoint.
    """
    for group, now, before in zip(optimizer.param_groups, given, saved, strict=True):
        group.update({name: value for name, value in now.items() if name != "lr" and value != before.get(name)})
        if now["lr"] != before["lr"]:
            share = group["lr"] / before["lr"] if before["lr"] else 1.0  # a schedule has moved it in the meantime
            _set_rate(group, now["lr"] * share)
            if "initial_lr" in group:
                group["initial_lr"] = now["lr"]
    if scheduler is not None and hasattr(scheduler, "base_lrs"):
        bases = zip(scheduler.base_lrs, given, saved, strict=True)
        scheduler.base_lrs = [now["lr"] if now["lr"] != before["lr"] else base for base, now, before in bases]
    if isinstance(scheduler, LambdaLR):  # its shape may have changed as well: a longer run, another decay
        for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            _set_rate(group, base * factor(scheduler.last_epoch))


def start_at(step: int, optimizer: Optimizer, scheduler: Any | None, given: Options) -> None:
    """After a resume with an optimizer or a scheduler of another class: the options given, and the rate of the step.

    Args:
        step: Optimizer steps of the run so far.
        optimizer: With its restored state, or none.
        scheduler: Without any.
        given: `given_options` of this run.
    """
    rates = [now["lr"] for now in given] if scheduler is None else scheduler.get_last_lr()
    for group, now, rate in zip(optimizer.param_groups, given, rates, strict=True):
        group.update(now | {"initial_lr": now["lr"], "lr": group["lr"]})
        _set_rate(group, rate)
    if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
        with warnings.catch_warnings(action="ignore"):  # "lr_scheduler.step() before optimizer.step()"
            for _ in range(step):
                scheduler.step()


# Made from what the user gave -----------------------------------------------------------------------------------------


def make_optimizer(make: Callable[..., Any], parameters: Iterable[torch.Tensor]) -> Optimizer:
    """The optimizer of the trainable parameters.

    Raises:
        ConfigError: If it cannot be made, or could not train.
    """
    optimizer = _made("model.optimizer", make, [parameter for parameter in parameters if parameter.requires_grad])
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"model.optimizer makes a {name}: a run has one torch optimizer, with parameter groups")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    problems = {
        "evaluates the loss several times a step, and each time would sample anew: use one that needs no closure, such"
        " as AdamW": closure is not None and closure.default is inspect.Parameter.empty,
        "takes sparse gradients alone, and these are dense: use AdamW": isinstance(optimizer, SparseAdam),
        "divides by its eps, which is 0 in float16, the dtype of the weights: train float32 weights"
        " (model.policy.dtype: float32, trainer.precision: 16-mixed)": any(map(_eps_is_zero, optimizer.param_groups)),
    }
    for problem in (problem for problem, is_there in problems.items() if is_there):
        raise ConfigError(f"model.optimizer: {name} {problem}")
    # A fused one would undo loss scaling inside its step, when gradients have been judged and clipped. Without this
    # attribute, which torch's GradScaler (2.13) and Lightning (2.6.6) ask, they are unscaled before.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _eps_is_zero(group: dict[str, Any]) -> bool:
    """Whether a parameter group has float16 weights, in which its option `eps` rounds to zero."""
    eps, is_half = group.get("eps"), any(parameter.dtype == torch.float16 for parameter in group["params"])
    return is_half and isinstance(eps, float) and float(torch.tensor(eps, dtype=torch.float16)) == 0


def with_scheduler(optimizer: Optimizer, given: Any, trainer: Trainer) -> Any:
    """What `configure_optimizers` returns: the optimizer, with a scheduler if one was given.

    A ReduceLROnPlateau looks at a metric of `val/` when an epoch with a validation ends, at any other after each step.

    Args:
        optimizer: Of the run.
        given: A `Schedule`, or what makes a torch scheduler of the optimizer.
        trainer: Says how long the run is.

    Raises:
        ConfigError: If it cannot be made, or the run is longer than the scheduler.
    """
    if given is None:
        return optimizer
    steps = optimizer_steps_of_run(trainer)
    is_ours = isinstance(given, Schedule)
    scheduler = given.build(optimizer, steps) if is_ours else _made("model.lr_scheduler", given, optimizer)
    name, monitor = type(scheduler).__name__, str(getattr(scheduler, "monitor", ""))
    rises, end = re.search(r"/(reward|solved|pass@\d+)$", monitor), getattr(scheduler, "total_steps", None)
    config, problem = {"scheduler": scheduler, "interval": "step", "monitor": monitor}, ""
    if end is not None and steps is not None and end < steps:
        problem = f"total_steps={end} of {name} is less than the run's {steps} optimizer steps: set it to {steps}"
    elif isinstance(scheduler, ReduceLROnPlateau):
        if not monitor:
            problem = f"torch's {name} names no metric: use lightning.pytorch.cli.{name}, with monitor: train/reward"
        elif scheduler.mode == "min" and rises:
            problem = f"mode=min would lower the rate while {monitor} rises: set its mode to max"
        elif monitor.startswith("val/"):
            every = trainer.check_val_every_n_epoch
            config |= {"interval": "epoch", "frequency": every or 1, "strict": every is not None}
    if problem:
        raise ConfigError(f"model.lr_scheduler: {problem}")
    return {"optimizer": optimizer, "lr_scheduler": config}


def _made(key: str, make: Callable[..., Any], argument: Any) -> Any:
    """What `make` makes; what torch or a user's function refuses becomes an error that names the key."""
    try:
        return make(argument)
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        remedy = ": use model.policy.lora, whose weights are, or AdamW" if "2D parameters" in str(error) else ""
        raise ConfigError(f"{key}: {type(error).__name__}: {one_line(error)}{remedy}") from error


# The run's length -----------------------------------------------------------------------------------------------------


def optimizer_steps_of_run(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; None where it has no end in steps (`max_time` alone).

    `trainer.estimated_stepping_batches` would do, but touching it with `max_epochs` set makes Lightning forget the
    loader's position on resume (github.com/Lightning-AI/pytorch-lightning/issues/20550).
    """
    bounds = [trainer.max_steps] if trainer.max_steps >= 0 else []
    data = data_of(trainer)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and data is not None:
        batches = batches_per_epoch(trainer, data.micro_steps_per_epoch)
        bounds.append(sum(batches // accumulation(trainer, epoch) for epoch in range(trainer.max_epochs)))
    return min(bounds, default=None)


def accumulations(trainer: Trainer) -> dict[int, int]:
    """Micro-steps of an optimizer step, by the epoch from which on it has so many."""
    schedules = [c.scheduling for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    return schedules[0] if schedules else {0: trainer.accumulate_grad_batches}


def accumulation(trainer: Trainer, epoch: int) -> int:
    """Micro-steps of an optimizer step in an epoch."""
    return max(item for item in accumulations(trainer).items() if item[0] <= epoch)[1]


def batches_per_epoch(trainer: Trainer, size: int) -> int:
    """How many of the loader's `size` batches an epoch takes."""
    limit = trainer.limit_train_batches
    # An integer is a number of batches, a float a share: 1 is one batch, 1.0 is all.
    return min(limit, size) if isinstance(limit, int) else math.floor(limit * size)
