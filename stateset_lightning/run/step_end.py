"""What waits for the end of an optimizer step: saves, early stops and signals.

A checkpoint made between two micro-steps of an accumulation would lose the gradient so far, and a stop there the work.
"""

import os
import signal
import threading
from contextlib import suppress
from copy import deepcopy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from stateset_lightning.ranks import Ranks, explain_lost_rank
from stateset_lightning.run import lightning_internals
from stateset_lightning.run.last_checkpoint import announce, last_path, remove_link
from stateset_lightning.threads import Interruption, cut_off_waits

SIGNALS: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}


class StepEnd(Callback):
    """Makes checkpoints, early stops and signals wait for the end of the running optimizer step; every run has it.

    On SIGTERM, Ctrl-C and SIGHUP a last checkpoint is written, `last.ckpt` beside the others, and `SystemExit` raised
    with code 143, 130 and 129. A wait for a reward or a server is cut off, and the checkpoint is then of the optimizer
    step before. A second Ctrl-C ends the run at once and saves nothing. An exception saves nothing either: it could
    hold the state that failed.

    A validation that was due right after a checkpoint is made up for when a run resumes from it; Lightning would leave
    it out.
    """

    def __init__(self) -> None:
        self._trains = False  # a signal waits for the end of the optimizer step
        self._received = 0  # the signal to act on; 0: none
        self._finished: Any = None  # progress of loops and data at the end of the last optimizer step
        self._gave_up = False  # the optimizer step under way: the next checkpoint is of the last one's end
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
        self._keep(trainer, pl_module)
        self._make_up_for_validation(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if not self._waits(trainer, pl_module):
            self._act_on_signal(trainer)
            self._keep(trainer, pl_module)

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
                announce(trainer, f"{name}.monitor={monitor} was never logged in this run: {name} did nothing by it")

    # The validation that was due --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        validated = trainer.fit_loop.epoch_loop.total_batch_idx == self._validated_batch
        missed = trainer.training and not validated and lightning_internals.validation_follows(trainer)
        checkpoint["missed_validation"] = self._validating or missed
        if self._gave_up:  # any validation that followed the last step has been done
            loops, data = self._finished
            checkpoint["loops"]["fit_loop"], checkpoint["missed_validation"] = loops, False
            checkpoint.update(data)
            return
        progress = checkpoint["loops"]["fit_loop"]
        if self._validating:  # it starts anew when the run resumes, and its progress with it
            progress["epoch_loop.val_loop.batch_progress"] = self._validation_progress
        lightning_internals.turn_back_to_last_batch(progress)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._missed_validation = trainer.state.fn == "fit" and checkpoint["missed_validation"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._make_up_for_validation(trainer)  # the checkpoint was the run's last, and there was nothing left to train
        self._act_on_signal(trainer)
        self._trains = False

    def _make_up_for_validation(self, trainer: Trainer) -> None:
        if self._missed_validation:
            self._missed_validation = False
            lightning_internals.validate_now(trainer)

    # Errors and signals -----------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        explain_lost_rank(exception)
        if isinstance(exception, Interruption) and (trainer.world_size == 1 or not self._validating):
            if pl_module.inside_optimizer_step:
                self._gave_up = True
                pl_module.state.turn_back()  # type: ignore[operator, union-attr]
            self._save_last(trainer, exception.code - 128)
        cut_off_waits(0)

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        states = {type(data).__qualname__: data.state_dict()} if data else {}
        self._finished = deepcopy((trainer.fit_loop.state_dict(), states))
        pl_module.state.keep()  # type: ignore[operator, union-attr]

    def _listen(self, trainer: Trainer) -> None:
        """Takes the place of Lightning's handlers, which act, and talk to other ranks, wherever the signal finds them.

        Lightning restores all handlers from before the run at its end.
        """
        self._received, self._trains, self._gave_up = 0, True, False
        if threading.current_thread() is not threading.main_thread():
            return
        cut_off_waits(0)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._on_signal)
        if requeue := lightning_internals.requeue_signal(trainer):
            self._requeue = signal.signal(requeue, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if number in SIGNALS and (not self._trains or number == self._received == signal.SIGINT):
            raise SystemExit(128 + number)
        if self._received not in SIGNALS:
            self._received = number
        if number in SIGNALS:
            again = ", Ctrl-C again at once and without" if number == signal.SIGINT else ""
            said = f"\n{signal.Signals(number).name}: ending after this optimizer step with a last checkpoint{again}\n"
            with suppress(OSError):  # a terminal that is gone
                os.write(2, said.encode())  # a handler may interrupt a `print` and must not print itself
            cut_off_waits(128 + number)

    def _act_on_signal(self, trainer: Trainer) -> None:
        if received := max(Ranks.current().gather(self._received)):
            self._act(trainer, received)

    def _act(self, trainer: Trainer, number: int) -> None:
        """What a signal asked for, at the end of an optimizer step.

        Raises:
            SystemExit: With code 128 + the signal's number.
        """
        if number not in SIGNALS:
            self._received = 0
            self._requeue(number, None)  # Lightning's: a checkpoint, and the job back into the queue
            return
        self._save_last(trainer, number)
        raise SIGTERMException(128 + number) if number == signal.SIGTERM else SystemExit(128 + number)

    def _save_last(self, trainer: Trainer, number: int) -> None:
        path = last_path(trainer)
        remove_link(trainer, path)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            after = f"stopped by {SIGNALS[number]} after optimizer step {trainer.global_step}"
            print(f"{after}; resume with --ckpt_path {path}", flush=True)


def _wait_for_step_end(callback: Any) -> None:
    """Lets a checkpoint callback act between optimizer steps only; its turn inside a step comes at the step's end."""
    if hasattr(callback, "waits_for_step_end"):
        return
    after_batch, after_validation = callback.on_train_batch_end, callback.on_validation_end
    callback.waits_for_step_end = False  # for its turn after a validation

    def on_validation_end(trainer: Trainer, pl_module: LightningModule) -> None:
        callback.waits_for_step_end = bool(pl_module.inside_optimizer_step)
        if not callback.waits_for_step_end:
            after_validation(trainer, pl_module)

    def on_train_batch_end(trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if pl_module.inside_optimizer_step:
            return
        if callback.waits_for_step_end:
            on_validation_end(trainer, pl_module)
        after_batch(trainer, pl_module, *args, **kwargs)

    callback.on_validation_end, callback.on_train_batch_end = on_validation_end, on_train_batch_end
