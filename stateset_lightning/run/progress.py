"""Progress as plain lines, for logs and pipes, where a progress bar that redraws itself shows nothing."""

import time
from typing import Annotated, Any

from annotated_types import Ge
from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.training.schedule import optimizer_steps_of_run


class ConsoleProgress(Callback):
    """Prints a line every few optimizer steps: reward, groups solved, completion length, tokens per second, time left.

    Args:
        every_n_steps: Optimizer steps between lines.
    """

    def __init__(self, every_n_steps: Annotated[int, Ge(1)] = 20) -> None:
        self.every_n_steps = every_n_steps
        self._started = 0.0
        self._first_step = 0
        self._printed_step = -1
        self.prints = True  # a `LiveView` may have taken over

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._first_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (
            self.prints
            and trainer.is_global_zero
            and step != self._printed_step
            and (step % self.every_n_steps == 0 or step == 1)
        ):
            self._printed_step = step
            print(self._line(trainer, step), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tells = self.prints and trainer.is_global_zero and not trainer.sanity_checking
        if tells and "val/reward" in trainer.callback_metrics:
            print(
                f"validation after step {trainer.global_step}: reward {trainer.callback_metrics['val/reward']:.3f}",
                flush=True,
            )

    def _line(self, trainer: Trainer, step: int) -> str:
        total = optimizer_steps_of_run(trainer)
        metrics = trainer.callback_metrics
        fields = [f"step {step}" + (f"/{total}" if total else "")]
        for label, name, form in (
            ("reward", "train/reward", ".3f"),
            ("mixed groups", "groups/mixed", ".2f"),
            ("tokens", "completion/mean_tokens", ".1f"),
            ("tokens/s", "work/tokens_per_s", ".0f"),
        ):
            if name in metrics:
                fields.append(f"{label} {format(float(metrics[name]), form)}")
        if total and (left := time_left(self._started, step - self._first_step, total - step)):
            fields.append(f"{left} left")
        return "  ".join(fields)


def time_left(started: float, done: int, to_do: int | None) -> str:
    """Minutes and seconds, by the pace since `started` (of `time.monotonic`); empty where there is no telling."""
    if not done or to_do is None:
        return ""
    seconds = int((time.monotonic() - started) / done * to_do)
    return f"{seconds // 60}:{seconds % 60:02d}"
