"""Where a run's files go: beside its checkpoints, whatever the logger."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger


def run_folder(trainer: Trainer) -> Path:
    """`save_dir/name/version` of the first logger, as ModelCheckpoint builds it; the Trainer's root folder without a
    logger.

    `trainer.log_dir` would do for most loggers, but with W&B it is a folder that all runs share.
    """
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    if isinstance(logger, WandbLogger):
        _ = logger.experiment  # starts the run: before that it has no id, and so no version
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def continues(trainer: Trainer, folder: str) -> bool:
    """Whether this run goes on in the files of the one whose checkpoint it resumes from, and which wrote to
    `folder`.
    """
    mine = run_folder(trainer).absolute()
    return Path(folder) == mine or Path(str(trainer.ckpt_path)).absolute().is_relative_to(mine)  # or it has been moved


def config_file(trainer: Trainer) -> Path:
    """Where the resolved config goes. Without a logger the folder may be the one that the user's own `config.yaml` is
    in.
    """
    return run_folder(trainer) / ("config.yaml" if trainer.loggers else "resolved_config.yaml")


def metrics_place(trainer: Trainer) -> str:
    """Where the metrics of the first logger are; empty without one."""
    if not trainer.loggers:
        return ""
    logger = trainer.loggers[0]
    if isinstance(logger, WandbLogger):
        return str(logger.experiment.url or Path(logger.experiment.dir).parent)
    return str(run_folder(trainer) / "metrics.csv" if isinstance(logger, CSVLogger) else logger.log_dir or "")
