"""Saves, stops and signals that come inside an optimizer step wait for its end; SIGTERM and Ctrl-C then end the run with a last checkpoint.

A checkpoint made between two micro-steps of an accumulation would lose the gradient so far, and a stop there the work.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from stateset_lightning.callbacks.run_folder import run_folder
from stateset_lightning.ranks import Ranks, explain_lost_rank

SIGNALS: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StepEnd(Callback):
    """Makes checkpoints, early stops and signals wait for the end of the running optimizer step. The module adds it to every run.

    On SIGTERM and on Ctrl-C a last checkpoint is written, `last.ckpt` beside the others, and `SystemExit` raised with code 143 and 130.
    A second Ctrl-C interrupts at once and saves nothing. An exception saves nothing either: it could hold the state that failed.

    The validation that a checkpoint came before is made up for when a run resumes from it; Lightning would leave it out.
    """

    def __init__(self) -> None:
        self._received = 0
        self._stop = False
        self._validating = False
        self._validated_batch = -1
        self._validation_progress: dict[str, Any] = {}
        self._missed_validation = False
        self._requeue: Any = None

    # Saves and stops ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint):
                _make_wait(callback)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop = self._validating = False
        self._validated_batch = -1
        self._validation_progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()
        self._listen(trainer)
        if self._missed_validation:
            self._validate(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._waits(trainer, pl_module):
            return
        self._validation_progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()
        received = max(Ranks(trainer.global_rank, trainer.world_size).gather(self._received))
        if received:
            self._act(trainer, received)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating = True

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
        """Whether an optimizer step is under way; holds a stop (early stopping, `max_time`) back until it is not."""
        inside = bool(pl_module.inside_optimizer_step)
        if inside and trainer.should_stop:
            trainer.should_stop, self._stop = False, True
        elif self._stop and not inside:
            trainer.should_stop, self._stop = True, False
        return inside

    # The validation that was due ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loop = trainer.fit_loop.epoch_loop
        due = trainer.training and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        checkpoint["missed_validation"] = self._validating or (due and loop.total_batch_idx != self._validated_batch)
        if self._validating:  # it starts anew when the run resumes, and its progress with it
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = self._validation_progress
        _as_after_last_batch(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._missed_validation = trainer.state.fn == "fit" and checkpoint["missed_validation"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._missed_validation:  # the checkpoint was the run's last, and there was nothing left to train
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        self._missed_validation = False
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        # A resumed epoch counts as done once a validation has run, and one whose last batch is done would never leave its restart.
        loop._has_run = False
        trainer.training = True

    # Errors ------------------------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        explain_lost_rank(exception)

    # Signals -----------------------------------------------------------------------------------------------------------------

    def _listen(self, trainer: Trainer) -> None:
        """Takes the place of Lightning's handlers, which act, and talk to other ranks, wherever the signal finds them.

        Lightning puts back all handlers from before the run at its end.
        """
        self._received = 0
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal is not None:
            self._requeue = signal.getsignal(environment.requeue_signal)
            signal.signal(environment.requeue_signal, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received not in SIGNALS:
            self._received = number
        again = ", Ctrl-C again at once and without" if number == signal.SIGINT else ""
        message = f"\n{signal.Signals(number).name}: ending after this optimizer step with a last checkpoint{again}\n"
        if number in SIGNALS:
            os.write(2, message.encode())  # a handler may interrupt a `print` and must not print itself

    def _act(self, trainer: Trainer, number: int) -> None:
        """What a signal asked for, now that nothing is half done.

        Raises:
            SystemExit: With code 128 + the signal's number.
        """
        if number not in SIGNALS:
            self._received = 0
            self._requeue(number, None)  # Lightning's: a checkpoint, and the job back into the queue
            return
        path = _last_checkpoint(trainer)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            print(f"stopped by {SIGNALS[number]} after optimizer step {trainer.global_step}; resume with --ckpt_path {path}", flush=True)
        raise SIGTERMException(128 + number) if number == signal.SIGTERM else SystemExit(128 + number)


def _as_after_last_batch(progress: dict[str, Any]) -> None:
    """Turns the progress that a fit loop has in `on_train_epoch_end` back by what it counted since the epoch's last batch.

    With `max_steps`, Lightning would otherwise end a resumed epoch a second time, or train a batch too many.
    """
    epoch, batch = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    if not epoch["current"]["completed"] < epoch["current"]["processed"] == epoch["current"]["ready"]:
        return
    for span in ("total", "current"):
        epoch[span]["processed"] -= 1
        batch[span]["completed"] -= 1
    progress["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def _make_wait(callback: Checkpoint) -> None:
    """Lets a checkpoint callback act only where no optimizer step is under way; a save that came inside one is made at its end."""
    if hasattr(callback, "waits_for_step_end"):
        return
    after_batch, after_validation = callback.on_train_batch_end, callback.on_validation_end
    waiting = False

    def on_validation_end(trainer: Trainer, pl_module: LightningModule) -> None:
        nonlocal waiting
        waiting = bool(pl_module.inside_optimizer_step)
        if not waiting:
            after_validation(trainer, pl_module)

    def on_train_batch_end(trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        nonlocal waiting
        if pl_module.inside_optimizer_step:
            return
        if waiting:
            waiting = False
            after_validation(trainer, pl_module)
        after_batch(trainer, pl_module, *args, **kwargs)

    callback.waits_for_step_end = True  # type: ignore[attr-defined]
    callback.on_validation_end, callback.on_train_batch_end = on_validation_end, on_train_batch_end  # type: ignore[method-assign]


def _last_checkpoint(trainer: Trainer) -> Path:
    """Where `--ckpt_path last` looks for the newest state: beside the checkpoints of the run."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    if not callbacks:
        return run_folder(trainer) / "checkpoints" / "last.ckpt"
    callback = next((callback for callback in callbacks if callback.save_last), callbacks[0])
    candidates = callback._monitor_candidates(trainer)
    # Kept in the callback's state, so that the resumed run writes to the same file.
    callback.last_model_path = callback.last_model_path or callback.format_checkpoint_name(candidates, callback.CHECKPOINT_NAME_LAST)
    return Path(callback.last_model_path)
