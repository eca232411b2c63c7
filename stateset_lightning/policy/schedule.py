"""Learning-rate schedules in optimizer steps, with a horizon that follows from the run."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stateset_lightning.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a decay to `final_factor` times the learning rate at the run's last optimizer step."""

    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after the warm-up."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps over which the learning rate rises linearly from zero."""
    final_factor: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the learning rate that remains at the end of a decay."""
    total_steps: Annotated[int, Ge(1)] | None = None
    """Horizon in optimizer steps. None: that of the run (`trainer.max_steps`, or `max_epochs` times an epoch's steps)."""

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
            raise ConfigError(
                f"model.lr_scheduler.decay={self.decay!r} needs to know when the run ends: set trainer.max_steps, trainer.max_epochs or "
                "model.lr_scheduler.total_steps"
            )
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))
