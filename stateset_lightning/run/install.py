"""What every run gets: a folder of its own, writers of complete checkpoints and metrics, and callbacks."""

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint

from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.run.folder import CHECKPOINTS, run_folder
from stateset_lightning.run.last_checkpoint import LastCheckpoint, model_checkpoints
from stateset_lightning.run.lightning_internals import claim_versions, replace_checkpoint_io
from stateset_lightning.run.lock import RunLock
from stateset_lightning.run.metrics_file import install_metrics_files
from stateset_lightning.run.samples import PredictionWriter, SampleWriter
from stateset_lightning.run.step_end import StepEnd


def install(trainer: Trainer) -> list[Callback]:
    """Puts our writers in place where the user has chosen none, and returns the callbacks that the run still needs."""
    replace_checkpoint_io(trainer, TorchCheckpointIO, AtomicCheckpointIO())
    if trainer.is_global_zero:
        claim_versions(trainer)
    install_metrics_files(trainer)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # it leaves nothing behind
        writers = Checkpoint | SampleWriter | PredictionWriter
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
