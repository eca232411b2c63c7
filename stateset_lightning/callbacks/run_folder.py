"""Where a run's files go: beside its checkpoints, whatever the logger."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """`save_dir/name/version` of the first logger, as ModelCheckpoint builds it; the Trainer's root folder without a logger.

    `trainer.log_dir` would do for most loggers, but with W&B it is a folder that all runs share.
    """
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
