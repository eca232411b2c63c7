"""What `save_last` promises: after every opportunity to save, and at the run's end, `last` is the newest state.

ModelCheckpoint writes `last` only together with a file that is among the best, and nothing at all before the monitored metric is there.
"""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint


class LastCheckpoint(Checkpoint):
    """Saves where a ModelCheckpoint with `save_last` had the opportunity and left its `last` as it was, at most once per optimizer step.

    The module adds it to runs that have such a ModelCheckpoint. It is a `Checkpoint`, because Lightning calls those after all other
    callbacks, in their order: it comes after every ModelCheckpoint.
    """

    def __init__(self) -> None:
        self._saved_step: dict[ModelCheckpoint, int] = {}
        self._clock: dict[ModelCheckpoint, float | None] = {}  # when a ModelCheckpoint's `train_time_interval` began
        self._waiting: set[ModelCheckpoint] = set()  # for the validation that follows

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._saved_step.clear()
        self._waiting.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = {callback: callback._last_time_checked for callback in keeping_last(trainer)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        ends = _is_last_step(trainer)
        for callback in keeping_last(trainer):
            steps = callback._every_n_train_steps
            timed = callback._last_time_checked != self._clock[callback]
            self._clock[callback] = callback._last_time_checked
            if not (ends or timed or callback in self._waiting or (steps and trainer.global_step % steps == 0)):
                continue
            if self._is_newest(trainer, callback):
                continue
            # The state after the validation is worth more, and ModelCheckpoint may be about to save it.
            if _validation_follows(trainer):
                self._waiting.add(callback)
            else:
                self._save(trainer, callback)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ends = _is_last_step(trainer)
        for callback in keeping_last(trainer):
            if ends or callback in self._waiting or (_is_due(trainer, callback) and not callback._should_save_on_train_epoch_end(trainer)):
                self._save(trainer, callback)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ends = _is_stopped(trainer)
        for callback in keeping_last(trainer):
            if ends or (_is_due(trainer, callback) and callback._should_save_on_train_epoch_end(trainer)):
                self._save(trainer, callback)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in keeping_last(trainer):
            self._save(trainer, callback)  # if the run was stopped from a hook that is called after these

    def _is_newest(self, trainer: Trainer, callback: ModelCheckpoint) -> bool:
        return self._saved_step.get(callback) == trainer.global_step or callback._should_skip_saving_checkpoint(trainer)

    def _save(self, trainer: Trainer, callback: ModelCheckpoint) -> None:
        """As `callback` would, unless its `last` is of this step."""
        self._waiting.discard(callback)
        if self._is_newest(trainer, callback):
            return
        self._saved_step[callback] = trainer.global_step
        last, step = callback.last_model_path, callback._last_global_step_saved
        if trainer.is_global_zero and os.path.islink(last):
            os.remove(last)  # or a writer that opens it would write over the file that it names
        callback._last_checkpoint_saved = ""  # what `save_last: link` would link to, and an older state
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
        callback._last_global_step_saved = step  # or it would not save the best of this step's validation


def keeping_last(trainer: Trainer) -> list[ModelCheckpoint]:
    """The callbacks that promise a `last`."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ModelCheckpoint) and callback.save_last]


def _is_due(trainer: Trainer, callback: ModelCheckpoint) -> bool:
    """Whether a ModelCheckpoint that counts epochs saves in this one."""
    epochs = callback._every_n_epochs
    return epochs > 0 and (trainer.current_epoch + 1) % epochs == 0


def _is_stopped(trainer: Trainer) -> bool:
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


def _is_last_step(trainer: Trainer) -> bool:
    """Whether the run ends with this step. Asked before Lightning ends the epoch, whose progress a checkpoint of later would hold."""
    loop = trainer.fit_loop
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (last_epoch and loop.epoch_loop._num_ready_batches_reached()) or _is_stopped(trainer)


def _validation_follows(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    # By time, if validation is; the ranks' clocks differ.
    return trainer.strategy.reduce_boolean_decision(loop.epoch_loop._should_check_val_fx(loop._data_fetcher), all=False)
