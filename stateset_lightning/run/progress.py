"""Progress as plain lines, for logs and pipes, where a progress bar that redraws itself shows nothing."""

import time
from typing import Annotated, Any

from annotated_types import Ge
from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.errors import bounded
from stateset_lightning.training.schedule import optimizer_steps_of_run

FIELDS = (
    ("reward", "train/reward", ".3f"),
    ("mixed groups", "groups/mixed", ".2f"),
    ("tokens", "completion/mean_tokens", ".1f"),
    ("tokens/s", "work/tokens_per_s", ".0f"),
)
"""Of a line: label, metric, format."""


@bounded("ConsoleProgress")
class ConsoleProgress(Callback):
    """Prints a line every few optimizer steps: reward, mixed groups, completion length, tokens per second, time left.

    Args:
        every_n_steps: Optimizer steps between lines.
    """

    def __init__(self, every_n_steps: Annotated[int, Ge(1)] = 20) -> None:
        self.every_n_steps = every_n_steps
        self._started = 0.0  # of `time.monotonic`, at `_first_step`
        self._first_step = self._printed_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        self._first_step = self._printed_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if (step % self.every_n_steps == 0 or step == 1) and step != self._printed_step and trainer.is_global_zero:
            self._printed_step = step  # a step may have further micro-steps
            print(self._line(trainer, step), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reward = trainer.callback_metrics.get("val/reward")
        if reward is not None and trainer.is_global_zero and not trainer.sanity_checking:
            print(f"validation after step {trainer.global_step}: reward {reward:.3f}", flush=True)

    def _line(self, trainer: Trainer, step: int) -> str:
        total, metrics = optimizer_steps_of_run(trainer), trainer.callback_metrics
        fields = [f"step {step}" + (f"/{total}" if total else "")]
        fields += [f"{label} {format(float(metrics[name]), form)}" for label, name, form in FIELDS if name in metrics]
        if total and step > self._first_step:
            seconds = int((time.monotonic() - self._started) / (step - self._first_step) * (total - step))
            fields.append(f"{seconds // 60}:{seconds % 60:02d} left")
        return "  ".join(fields)
