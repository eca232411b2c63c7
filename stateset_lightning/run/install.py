"""What every run gets: writers of complete checkpoints and metrics, and the callbacks of step_end.py."""

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.run.folder import CHECKPOINTS, run_folder
from stateset_lightning.run.lightning_internals import replace_checkpoint_io
from stateset_lightning.run.metrics_file import install_metrics_files
from stateset_lightning.run.samples import PredictionWriter, SampleWriter
from stateset_lightning.run.step_end import LastCheckpoint, StepEnd, keeping_last

_WRITERS = (Checkpoint, SampleWriter, PredictionWriter)


def install(trainer: Trainer) -> list[Callback]:
    """Puts our writers in place where the user has chosen none, and returns the callbacks that the run still needs."""
    replace_checkpoint_io(trainer, TorchCheckpointIO, AtomicCheckpointIO())
    install_metrics_files(trainer)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # it leaves nothing behind
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [callback for callback in callbacks if not isinstance(callback, _WRITERS)]  # type: ignore[attr-defined]
    for callback in trainer.checkpoint_callbacks if not trainer.loggers else []:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(run_folder(trainer) / CHECKPOINTS)  # it would be the working folder's
    needed: list[type[Callback]] = [StepEnd, LastCheckpoint] if keeping_last(trainer) else [StepEnd]
    present = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    return [kind() for kind in needed if kind not in present]
