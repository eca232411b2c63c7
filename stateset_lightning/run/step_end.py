"""What waits for the end of an optimizer step: saves, early stops and signals; and `last`, the run's newest state.

A checkpoint made between two micro-steps of an accumulation would lose the gradient so far, and a stop there the work.
"""

import logging
import os
import signal
import threading
from contextlib import suppress
from itertools import chain, count
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from stateset_lightning.errors import CheckpointError
from stateset_lightning.ranks import Ranks, explain_lost_rank
from stateset_lightning.run import lightning_internals
from stateset_lightning.run.checkpoint_io import local_path, read_checkpoint
from stateset_lightning.run.folder import CHECKPOINTS, run_folder

_log = logging.getLogger("stateset_lightning")

SIGNALS: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StepEnd(Callback):
    """Makes checkpoints, early stops and signals wait for the end of the running optimizer step; every run has it.

    On SIGTERM and on Ctrl-C a last checkpoint is written, `last.ckpt` beside the others, and `SystemExit` raised with
    code 143 and 130. A second Ctrl-C interrupts at once and saves nothing. An exception saves nothing either: it could
    hold the state that failed.

    A validation that was due right after a checkpoint is made up for when a run resumes from it; Lightning would leave
    it out.
    """

    def __init__(self) -> None:
        self._received = 0  # the signal to act on; 0: none
        self._requeue: Any = None  # Lightning's handler of SLURM's signal
        self._stop = False  # an early stop was asked for inside the optimizer step
        self._validating = False
        self._validated_batch = -1  # the last validation came after this training batch
        self._validation_progress: dict[str, Any] = {}  # as the running validation found it
        self._missed_validation = False

    # Saves and stops --------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.checkpoint_callbacks:
            _wait_for_step_end(callback)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop = self._validating = False
        self._validated_batch = -1
        self._listen(trainer)
        self._make_up_for_validation(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if self._waits(trainer, pl_module):
            return
        if received := max(Ranks(trainer.global_rank, trainer.world_size).gather(self._received)):
            self._act(trainer, received)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating = True
        self._validation_progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        # Several ranks may have different numbers of batches, and could not agree here: they end after the validation.
        fits = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self._received and fits and trainer.world_size == 1 and not pl_module.inside_optimizer_step:
            self._act(trainer, self._received)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating = False
        self._validated_batch = trainer.fit_loop.epoch_loop.total_batch_idx
        self._waits(trainer, pl_module)

    def _waits(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether an optimizer step is running; holds a stop (early stopping, `max_time`) back until it is not."""
        inside, stop = bool(pl_module.inside_optimizer_step), trainer.should_stop or self._stop
        trainer.should_stop, self._stop = stop and not inside, stop and inside
        return inside

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if monitor not in {None, "step", "epoch", *trainer.callback_metrics}:
                name = type(callback).__name__
                _announce(trainer, f"{name}.monitor={monitor} was never logged in this run: {name} did nothing by it")

    # The validation that was due --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        validated = trainer.fit_loop.epoch_loop.total_batch_idx == self._validated_batch
        missed = trainer.training and not validated and lightning_internals.validation_follows(trainer)
        checkpoint["missed_validation"] = self._validating or missed
        progress = checkpoint["loops"]["fit_loop"]
        if self._validating:  # it starts anew when the run resumes, and its progress with it
            progress["epoch_loop.val_loop.batch_progress"] = self._validation_progress
        lightning_internals.turn_back_to_last_batch(progress)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._missed_validation = trainer.state.fn == "fit" and checkpoint["missed_validation"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._make_up_for_validation(trainer)  # the checkpoint was the run's last, and there was nothing left to train

    def _make_up_for_validation(self, trainer: Trainer) -> None:
        if self._missed_validation:
            self._missed_validation = False
            lightning_internals.validate_now(trainer)

    # Errors and signals -----------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        explain_lost_rank(exception)

    def _listen(self, trainer: Trainer) -> None:
        """Takes the place of Lightning's handlers, which act, and talk to other ranks, wherever the signal finds them.

        Lightning restores all handlers from before the run at its end.
        """
        self._received = 0
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if requeue := lightning_internals.requeue_signal(trainer):
            self._requeue = signal.getsignal(requeue)
            signal.signal(requeue, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received not in SIGNALS:
            self._received = number
        if number in SIGNALS:
            again = ", Ctrl-C again at once and without" if number == signal.SIGINT else ""
            said = f"\n{signal.Signals(number).name}: ending after this optimizer step with a last checkpoint{again}\n"
            os.write(2, said.encode())  # a handler may interrupt a `print` and must not print itself

    def _act(self, trainer: Trainer, number: int) -> None:
        """What a signal asked for, at the end of an optimizer step.

        Raises:
            SystemExit: With code 128 + the signal's number.
        """
        if number not in SIGNALS:
            self._received = 0
            self._requeue(number, None)  # Lightning's: a checkpoint, and the job back into the queue
            return
        path = _last_path(trainer)
        _remove_link(trainer, path)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            after = f"stopped by {SIGNALS[number]} after optimizer step {trainer.global_step}"
            print(f"{after}; resume with --ckpt_path {path}", flush=True)
        raise SIGTERMException(128 + number) if number == signal.SIGTERM else SystemExit(128 + number)


def _wait_for_step_end(callback: Checkpoint) -> None:
    """Lets a checkpoint callback act between optimizer steps only; its turn inside a step comes at the step's end."""
    if hasattr(callback, "waits_for_step_end"):
        return
    after_batch, after_validation = callback.on_train_batch_end, callback.on_validation_end
    waiting = False  # for its turn after a validation

    def on_validation_end(trainer: Trainer, pl_module: LightningModule) -> None:
        nonlocal waiting
        waiting = bool(pl_module.inside_optimizer_step)
        if not waiting:
            after_validation(trainer, pl_module)

    def on_train_batch_end(trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if pl_module.inside_optimizer_step:
            return
        if waiting:
            on_validation_end(trainer, pl_module)
        after_batch(trainer, pl_module, *args, **kwargs)

    callback.waits_for_step_end = True  # type: ignore[attr-defined]
    callback.on_validation_end, callback.on_train_batch_end = on_validation_end, on_train_batch_end  # type: ignore[method-assign]


# The last checkpoint --------------------------------------------------------------------------------------------------
# Private fields of ModelCheckpoint (seen in lightning 2.6.6) are used below, and nowhere else.


class LastCheckpoint(Checkpoint):
    """What `save_last` promises: after every opportunity to save, and at the run's end, `last` is the newest state.

    ModelCheckpoint alone writes `last` only together with a file that is among the best, and nothing before the
    monitored metric is there. This saves `last` where a ModelCheckpoint had the opportunity and left it as it was, at
    most once per optimizer step. At the run's end it lets those save that keep the newest state under its own name.
    Every run with a ModelCheckpoint has it. It is a `Checkpoint`, because Lightning calls those after all other
    callbacks, in their order: it comes after every ModelCheckpoint.
    """

    def __init__(self) -> None:
        self._saved_step: dict[ModelCheckpoint, int] = {}
        self._clock: dict[ModelCheckpoint, float | None] = {}  # when a ModelCheckpoint's `train_time_interval` began

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._saved_step = {}

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
            _announce(trainer, "no checkpoint was saved: no ModelCheckpoint had the opportunity; set save_last: true")

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
            _remove_link(trainer, callback.last_model_path)
            callback._last_checkpoint_saved = ""  # what `save_last: link` would link to, and an older state
            callback._save_last_checkpoint(trainer, metrics)
            callback._last_global_step_saved = step  # or it would not save the best of this step's validation
        else:
            callback._save_topk_checkpoint(trainer, metrics)


def _announce(trainer: Trainer, what: str) -> None:
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _log.warning(what)


def _keeping_newest(trainer: Trainer) -> list[ModelCheckpoint]:
    """The callbacks that promise a `last`, and those that compare nothing and so keep what is newest."""
    callbacks = model_checkpoints(trainer)
    return [c for c in callbacks if c.save_last or (c.monitor is None and c.save_top_k)]


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """Lightning's own, and what is made of them."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _last_path(trainer: Trainer) -> str:
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
    mine = run_folder(trainer).absolute()
    if trainer.ckpt_path is None or (file := local_path(path)) is None:
        return False
    with suppress(CheckpointError):
        folder = read_checkpoint(file, map_location="cpu", mmap=True)["stateset"].get("run_folder")
        return folder == str(mine) or file.absolute().is_relative_to(mine)  # or it has been moved
    return False


def _remove_link(trainer: Trainer, path: str) -> None:
    """A writer that opened it would write over the file that it names."""
    if trainer.is_global_zero and os.path.islink(path):
        os.remove(path)


def _is_stopped(trainer: Trainer) -> bool:
    """Whether an early stop ends the run now, and not only after `min_epochs` and `min_steps`."""
    enough = trainer.current_epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return trainer.should_stop and enough


def _is_last_step(trainer: Trainer) -> bool:
    """Whether the run ends with this step; to be asked before Lightning counts the epoch as done, or saves later."""
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch) or _is_stopped(trainer)
