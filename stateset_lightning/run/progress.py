"""Progress as plain lines, for logs and pipes, where a progress bar that redraws itself shows nothing."""

import time
from collections import deque
from statistics import median
from typing import Annotated, Any

from annotated_types import Ge
from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.errors import bounded
from stateset_lightning.threads import heartbeat
from stateset_lightning.training.schedule import optimizer_steps_of_run

# Of a line: label, metric, format.
FIELDS = (
    ("reward", "train/reward", ".3f"),
    ("mixed groups", "groups/mixed", ".2f"),
    ("tokens", "completion/mean_tokens", ".1f"),
    ("tokens/s", "work/tokens_per_s", ".0f"),
)


@bounded("ConsoleProgress")
class ConsoleProgress(Callback):
    """Prints a line every few optimizer steps: reward, mixed groups, completion length, tokens per second, time left.

    Where steps are slow, after every one that ends 10 s or more after the last line; and at least every 30 s
    a line that says what the run is doing. The time left follows from the newest steps.

    Args:
        every_n_steps: Optimizer steps between lines.
    """

    def __init__(self, every_n_steps: Annotated[int, Ge(1)] = 20) -> None:
        self.every_n_steps = every_n_steps
        self._step = 0  # the newest one that has ended
        self._ended = 0.0  # when, of `time.monotonic`
        self._seconds: deque[float] = deque(maxlen=10)  # of the newest optimizer steps, with what lies between them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            heartbeat.start("loading the model")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: Any) -> None:
        heartbeat.stop()

    on_exception = teardown  # type: ignore[assignment]  # Lightning leaves `teardown` out then

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        heartbeat.doing("saving a checkpoint")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._ended = trainer.global_step, time.monotonic()
        self._seconds.clear()

    def on_train_batch_start(self, *args: Any) -> None:
        heartbeat.doing("training")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step, now = trainer.global_step, time.monotonic()
        if step == self._step:  # it may have further micro-steps
            return
        self._seconds.append(now - self._ended)
        self._step, self._ended = step, now
        is_due = step % self.every_n_steps == 0 or step == 1 or now - heartbeat.spoke >= 10
        if is_due and trainer.is_global_zero:
            heartbeat.say(self._line(trainer, step))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reward = trainer.callback_metrics.get("val/reward")
        if reward is not None and trainer.is_global_zero and not trainer.sanity_checking:
            heartbeat.say(f"validation after step {trainer.global_step}: reward {reward:.3f}")

    def _line(self, trainer: Trainer, step: int) -> str:
        total, metrics = optimizer_steps_of_run(trainer), trainer.callback_metrics
        fields = [f"step {step}" + (f"/{total}" if total else "")]
        fields += [f"{label} {format(float(metrics[name]), form)}" for label, name, form in FIELDS if name in metrics]
        if total:
            seconds = int(median(self._seconds) * (total - step))
            fields.append(f"{seconds // 60}:{seconds % 60:02d} left")
        return "  ".join(fields)
