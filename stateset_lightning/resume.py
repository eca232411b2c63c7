"""Where a run goes on: the checkpoint to resume from, and the folder that its files are continued in."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from stateset_lightning.checkpoint_io import newest_checkpoints
from stateset_lightning.run_checks import check_checkpoint

_log = logging.getLogger("stateset_lightning")


def continue_run(trainer: Trainer, ckpt_path: str) -> str | None:
    """Makes a resumed run write to the folder of the run that it continues, if the checkpoint lies in one of the
    logger's.

    Args:
        trainer: Before its `fit`; a logger with a version (W&B: an id) of its own keeps it.
        ckpt_path: A file, or `last` for the newest checkpoint of the runs that have the logger's name.

    Returns:
        The checkpoint's path, for `trainer.fit(ckpt_path=...)`. None if there is no last one, which is announced: a run
        that may be killed at any time can be started by the same command each time.
    """
    if ckpt_path == "last":
        found = _find_last(trainer)
        if found is None:
            places = " or ".join(f"{folder}/{below}" for folder, below in _places(trainer))
            _log.info("--ckpt_path last: there is no checkpoint in %s yet; a new run starts", places)
            return None
        ckpt_path = str(found)
    check_checkpoint(ckpt_path)
    folder = Path(ckpt_path).absolute().parent.parent
    for logger in trainer.loggers[:1]:
        if Path(logger.save_dir or "", str(logger.name)).absolute() != folder.parent:
            continue
        if isinstance(logger, CSVLogger | TensorBoardLogger) and logger._version is None:
            number = folder.name.removeprefix("version_")
            logger._version = int(number) if number.isdigit() else folder.name
        elif isinstance(logger, WandbLogger) and logger._id is None:
            logger._id = folder.name
            logger._wandb_init.update(id=folder.name, resume="allow")
    _log.info("resuming %s", ckpt_path)
    return ckpt_path


def _find_last(trainer: Trainer) -> Path | None:
    files = [file for folder, pattern in _places(trainer) for file in newest_checkpoints(folder, f"{pattern}*.ckpt")]
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)


def _places(trainer: Trainer) -> list[tuple[Path, str]]:
    """Where checkpoints may lie: a folder, and the pattern of folders below it."""
    given = [
        (Path(c.dirpath), "") for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath
    ]
    if given or not trainer.loggers:
        return given or [(Path(trainer.default_root_dir) / "checkpoints", "")]
    logger = trainer.loggers[0]
    return [(Path(logger.save_dir or trainer.default_root_dir) / str(logger.name), "*/checkpoints/")]
