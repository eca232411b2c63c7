"""The optimizer and the scheduler of a run, from what the user gave.

What torch refuses, and what could not train, is an error of one line before anything is sampled.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from stateset_lightning.errors import ConfigError
from stateset_lightning.training.schedule import Schedule, optimizer_steps_of_run


def make_optimizer(make: Callable[..., Any], parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of the trainable parameters.

    Raises:
        ConfigError: If it cannot be made, or could not train.
    """
    with _errors_of("model.optimizer"):
        optimizer = make([parameter for parameter in parameters if parameter.requires_grad])
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
    return optimizer


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
    with _errors_of("model.lr_scheduler"):
        scheduler = given.build(optimizer, steps) if isinstance(given, Schedule) else given(optimizer)
    name, monitor = type(scheduler).__name__, str(getattr(scheduler, "monitor", ""))
    rises, end = re.search(r"/(reward|solved|pass@\d+)$", monitor), getattr(scheduler, "total_steps", None)
    config = {"scheduler": scheduler, "interval": "step", "monitor": monitor}
    problem = ""
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


def _eps_is_zero(group: dict[str, Any]) -> bool:
    """Whether a parameter group has float16 weights, in which the option `eps` rounds to zero."""
    eps = group.get("eps")
    is_half = any(parameter.dtype == torch.float16 for parameter in group["params"])
    return is_half and isinstance(eps, float) and float(torch.tensor(eps, dtype=torch.float16)) == 0


@contextmanager
def _errors_of(key: str) -> Iterator[None]:
    """What torch or a user's function refuses becomes an error that names the key."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        remedy = ": use model.policy.lora, whose weights are, or AdamW" if "2D parameters" in str(error) else ""
        told = " ".join(str(error).split())[:300]
        raise ConfigError(f"{key}: {type(error).__name__}: {told}{remedy}") from error
