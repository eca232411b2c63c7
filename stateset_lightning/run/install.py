"""What every run gets: a folder of its own, writers of complete checkpoints and metrics, and callbacks."""

import fcntl
import os
import socket
from contextlib import ExitStack
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks

from stateset_lightning.errors import ConfigError
from stateset_lightning.files import writing
from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.run.folder import CHECKPOINTS, LOCK, run_folder
from stateset_lightning.run.last_checkpoint import LastCheckpoint, announce, model_checkpoints
from stateset_lightning.run.lightning_internals import claim_versions, replace_checkpoint_io, share_versions
from stateset_lightning.run.metrics_file import install_metrics_files
from stateset_lightning.run.samples import PredictionWriter, SampleWriter
from stateset_lightning.run.step_end import StepEnd


def install(trainer: Trainer, kind: str) -> list[Callback]:
    """Puts our writers in place where the user has chosen none, and returns the callbacks that the run still needs.

    Args:
        trainer: Of the run.
        kind: Of its folder, as in `claim_versions`.
    """
    replace_checkpoint_io(trainer, TorchCheckpointIO, AtomicCheckpointIO())
    claim_versions(trainer, kind)
    install_metrics_files(trainer)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # it leaves nothing behind
        writers = callbacks.Checkpoint | SampleWriter | PredictionWriter
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, writers)]  # type: ignore[attr-defined]
    for callback in model_checkpoints(trainer) if not trainer.loggers else []:
        if callback.dirpath is None:
            callback.dirpath = str(run_folder(trainer) / CHECKPOINTS)  # it would be the working folder's
    needed: list[type[Callback]] = [StepEnd, *([LastCheckpoint] if model_checkpoints(trainer) else []), RunLock]
    present = {type(callback): callback for callback in trainer.callbacks}  # type: ignore[attr-defined]
    added = [kind() for kind in needed if kind not in present]
    writes = trainer.loggers or trainer.checkpoint_callbacks
    if trainer.is_global_zero and trainer.state.fn == "fit" and writes and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        next(lock for lock in [*added, *present.values()] if isinstance(lock, RunLock)).take(trainer)
    return added


class RunLock(Callback):
    """Keeps the folder of a training run for this process, and tells the other ranks which one it is.

    One run at a time writes to a folder: the kernel releases the lock, however its holder ends.
    """

    def __init__(self) -> None:
        self._held = ExitStack()

    def __deepcopy__(self, memo: Any) -> "RunLock":
        return self  # in a copy of all that the trainer holds, too, as WeightAveraging makes it

    def take(self, trainer: Trainer) -> None:
        """Called before anything is written to the folder; on the first rank alone.

        Raises:
            ConfigError: If another process trains there.
            DiskError: If the folder cannot be written.
        """
        path = run_folder(trainer) / LOCK
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = self._held.enter_context(path.open("a+"))
            try:
                # One of `flock` would live on in what a reward has forked.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = path.read_text()
                raise ConfigError(f"{path.parent}: {holder} trains in this folder: wait for it, or end it") from None
            except OSError as error:
                announce(trainer, f"{path} cannot be locked ({error.strerror}): nothing keeps a second run out")
            file.truncate(0)
            # Not by the file's buffer, which would fail once more when it is closed.
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        share_versions(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._held.close()

    on_exception = teardown  # type: ignore[assignment]  # Lightning leaves `teardown` out then
