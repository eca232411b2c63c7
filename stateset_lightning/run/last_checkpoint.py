"""`last`, the newest state of a run: what `save_last` promises, and where it is.

Private fields of ModelCheckpoint (seen in lightning 2.6.6) are used here, and nowhere else.
"""

import os
from contextlib import suppress
from itertools import chain, count
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from stateset_lightning.errors import CheckpointError, DiskError, log
from stateset_lightning.run import lightning_internals
from stateset_lightning.run.checkpoint_io import local_path, read_checkpoint
from stateset_lightning.run.folder import CHECKPOINTS, continues, run_folder


class LastCheckpoint(Checkpoint):
    """What `save_last` promises: after every opportunity to save, and at the run's end, `last` is the newest state.

    ModelCheckpoint alone writes `last` only together with a file that is among the best, and nothing before the
    monitored metric is there. This saves `last` where a ModelCheckpoint had the opportunity and left it as it was, at
    most once per optimizer step. At the run's end it lets those save that keep the newest state under its own name.
    Every run with a ModelCheckpoint has it. It is a `Checkpoint`, because Lightning calls those after all other
    callbacks, in their order: it comes after every ModelCheckpoint.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._saved_step: dict[ModelCheckpoint, int] = {}
        self._clock: dict[ModelCheckpoint, float | None] = {}  # when a ModelCheckpoint's `train_time_interval` began

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in model_checkpoints(trainer):
            self._clock[callback] = callback._last_time_checked
            if trainer.ckpt_path is not None:
                callback.last_model_path = _last_of_run(trainer, callback)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        ends = _is_last_step(trainer) and not lightning_internals.validation_follows(trainer)
        for callback in _keeping_newest(trainer):
            steps, clock = callback._every_n_train_steps, callback._last_time_checked
            # Before a validation as well, which may be long: a resumed run makes up for it.
            if ends or clock != self._clock[callback] or (steps and trainer.global_step % steps == 0):
                self._save(trainer, callback)
            self._clock[callback] = clock

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_due(trainer, _is_last_step(trainer), at_epoch_end=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_due(trainer, _is_stopped(trainer), at_epoch_end=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_due(trainer, True, at_epoch_end=True)  # if the run was stopped from a hook that comes after these
        if not any(c.best_model_path or c._last_checkpoint_saved for c in model_checkpoints(trainer)):
            announce(trainer, "no checkpoint was saved: no ModelCheckpoint had the opportunity; set save_last: true")

    def _save_due(self, trainer: Trainer, ends: bool, at_epoch_end: bool) -> None:
        """Saves at the run's end, and for those ModelCheckpoints that count epochs and save now."""
        for callback in _keeping_newest(trainer):
            epochs = callback.every_n_epochs
            due = epochs and (trainer.current_epoch + 1) % epochs == 0
            if ends or (due and callback._should_save_on_train_epoch_end(trainer) == at_epoch_end):
                self._save(trainer, callback)

    def _save(self, trainer: Trainer, callback: ModelCheckpoint) -> None:
        """As `callback` would, unless its newest state is of this step."""
        if self._saved_step.get(callback) == trainer.global_step or callback._should_skip_saving_checkpoint(trainer):
            return
        self._saved_step[callback] = trainer.global_step
        step, metrics = callback._last_global_step_saved, callback._monitor_candidates(trainer)
        if callback.save_last:
            remove_link(trainer, callback.last_model_path)
            callback._last_checkpoint_saved = ""  # what `save_last: link` would link to, and an older state
            callback._save_last_checkpoint(trainer, metrics)
            callback._last_global_step_saved = step  # or it would not save the best of this step's validation
        else:
            callback._save_topk_checkpoint(trainer, metrics)


def announce(trainer: Trainer, what: str) -> None:
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        log.warning(what)


def _keeping_newest(trainer: Trainer) -> list[ModelCheckpoint]:
    """The callbacks that promise a `last`, and those that compare nothing and so keep what is newest."""
    return [c for c in model_checkpoints(trainer) if c.save_last or (c.monitor is None and c.save_top_k)]


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """Lightning's own, and what is made of them."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def last_path(trainer: Trainer) -> str:
    """Where `--ckpt_path last` looks for the newest state: beside the checkpoints of the run."""
    callbacks = [*model_checkpoints(trainer), ModelCheckpoint(run_folder(trainer) / CHECKPOINTS)]
    callback = min(callbacks, key=lambda callback: not callback.save_last)  # the first that promises it, or the first
    # Kept in the callback's state, so that the resumed run writes to the same file.
    callback.last_model_path = callback.last_model_path or _last_of_run(trainer, callback, new=True)
    return callback.last_model_path


def _last_of_run(trainer: Trainer, callback: ModelCheckpoint, *, new: bool = False) -> str:
    """The `last` that a callback of this run wrote, before it was resumed; other runs may share its `dirpath`.

    Args:
        trainer: The run.
        callback: Whose `last`; those of others in the same folder are left alone.
        new: Whether to name a file where there is none yet. If not, the answer is empty, and Lightning finds a name.
    """
    name, metrics = callback.CHECKPOINT_NAME_LAST, callback._monitor_candidates(trainer)
    others = [other.last_model_path for other in model_checkpoints(trainer) if other is not callback]
    names = (callback.format_checkpoint_name(metrics, name, ver=version or None) for version in count())
    path, exists = "", False
    for path in chain([callback.last_model_path], names) if trainer.is_global_zero else ():
        exists = bool(path) and callback._fs.exists(path)
        if path and path not in others and (not exists or _is_of_run(trainer, path)):
            break
    return str(trainer.strategy.broadcast(path if exists or new else ""))


def _is_of_run(trainer: Trainer, path: str) -> bool:
    """Whether the run that is resumed here wrote a checkpoint, by what that says of itself."""
    if trainer.ckpt_path is None or (file := local_path(path)) is None:
        return False
    with suppress(CheckpointError):
        return continues(trainer, read_checkpoint(file)["stateset"].get("run_folder", ""), file)
    return False


def remove_link(trainer: Trainer, path: str) -> None:
    """A writer that opened it would write over the file that it names.

    Raises:
        DiskError: If it cannot be removed.
    """
    if trainer.is_global_zero and os.path.islink(path):
        try:
            os.remove(path)
        except OSError as error:
            raise DiskError(f"{path}: the link cannot be removed ({error.strerror}): choose another folder") from error


def _is_stopped(trainer: Trainer) -> bool:
    """Whether an early stop ends the run now, and not only after `min_epochs` and `min_steps`."""
    enough = trainer.current_epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return trainer.should_stop and enough


def _is_last_step(trainer: Trainer) -> bool:
    """Whether the run ends with this step; to be asked before Lightning counts the epoch as done, or saves later."""
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch) or _is_stopped(trainer)
