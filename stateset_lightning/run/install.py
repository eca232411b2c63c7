"""What every run gets: writers of complete checkpoints and metrics, and the callbacks of step_end.py."""

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer

from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.run.metrics_file import install_metrics_files
from stateset_lightning.run.step_end import LastCheckpoint, StepEnd, model_checkpoints


def install(trainer: Trainer) -> list[Callback]:
    """Puts our writers in place where the user has chosen none, and returns the callbacks that the run still needs."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    install_metrics_files(trainer)
    needed: list[type[Callback]] = [StepEnd, LastCheckpoint] if model_checkpoints(trainer) else [StepEnd]
    present = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    return [kind() for kind in needed if kind not in present]
