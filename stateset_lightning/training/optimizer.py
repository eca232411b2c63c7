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
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"model.optimizer: {name} evaluates the loss several times a step, and each time would sample anew: use one"
            " that needs no closure, such as AdamW"
        )
    if isinstance(optimizer, SparseAdam):
        raise ConfigError(f"model.optimizer: {name} takes sparse gradients alone, and these are dense: use AdamW")
    for group in optimizer.param_groups:
        eps = group.get("eps")
        is_half = any(parameter.dtype == torch.float16 for parameter in group["params"])
        if is_half and isinstance(eps, float) and torch.tensor(eps, dtype=torch.float16) == 0:
            raise ConfigError(
                f"model.optimizer: eps={eps} of {name} is 0 in float16, the dtype of the weights, and a step would"
                " divide by it: train float32 weights (model.policy.dtype: float32, trainer.precision: 16-mixed)"
            )
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
    config = {"scheduler": scheduler, "interval": "step"}
    end = getattr(scheduler, "total_steps", None)
    if end is not None and steps is not None and end < steps:
        raise ConfigError(
            f"model.lr_scheduler: total_steps={end} of {type(scheduler).__name__} is less than the run's {steps}"
            f" optimizer steps: set it to {steps}"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        config |= _plateau(scheduler, trainer)
    return {"optimizer": optimizer, "lr_scheduler": config}


def _plateau(scheduler: ReduceLROnPlateau, trainer: Trainer) -> dict[str, Any]:
    """Lightning's options of a scheduler that follows a metric."""
    monitor = getattr(scheduler, "monitor", None)
    if monitor is None:
        raise ConfigError(
            "model.lr_scheduler: torch's ReduceLROnPlateau names no metric: use lightning.pytorch.cli.ReduceLROnPlateau"
            " with monitor: train/reward and mode: max"
        )
    if scheduler.mode == "min" and re.search(r"/(reward|solved|pass@\d+)$", monitor):
        raise ConfigError(
            f"model.lr_scheduler: mode=min would lower the rate while {monitor} rises: set its mode to max"
        )
    if not monitor.startswith("val/"):
        return {"monitor": monitor}
    every = trainer.check_val_every_n_epoch
    return {"monitor": monitor, "interval": "epoch", "frequency": every or 1, "strict": every is not None}


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
