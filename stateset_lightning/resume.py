"""Which checkpoint `--ckpt_path` names, and the folder that a resumed run's files are continued in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from fsspec.core import url_to_fs
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from stateset_lightning.checkpoint_io import local_path, newest_checkpoints, read_checkpoint
from stateset_lightning.errors import CheckpointError, ConfigError
from stateset_lightning.run_checks import check_checkpoint

_log = logging.getLogger("stateset_lightning")


def continue_run(trainer: Trainer, ckpt_path: str) -> str | None:
    """Makes a resumed run write to the folder of the run that it continues, if that is one of the logger's.

    Args:
        trainer: Before its `fit`; a logger with a version (W&B: an id) of its own keeps it.
        ckpt_path: As in `find_checkpoint`.

    Returns:
        The checkpoint's path, for `trainer.fit(ckpt_path=...)`. None if there is no last one, which is announced: a run that may be
        killed at any time can be started by the same command each time.

    Raises:
        UserError: If the checkpoint cannot be found or used.
    """
    if ckpt_path == "last" and _newest(trainer) is None:
        _log.info("--ckpt_path last: there is no checkpoint in %s yet; a new run starts", _searched(trainer))
        return None
    path = find_checkpoint(trainer, ckpt_path)
    if path == "hpc":
        return path
    for logger in trainer.loggers[:1]:
        folder = _folder_of_run(path, Path(logger.save_dir or "", str(logger.name)).absolute())
        if folder is None:
            continue
        if isinstance(logger, CSVLogger | TensorBoardLogger) and logger._version is None:
            number = folder.name.removeprefix("version_")
            logger._version = int(number) if number.isdigit() else folder.name
        elif isinstance(logger, WandbLogger) and logger._id is None:
            logger._id = folder.name
            logger._wandb_init.update(id=folder.name, resume="allow")
    _log.info("resuming %s", path)
    return path


def find_checkpoint(trainer: Trainer, ckpt_path: str) -> str:
    """The path of the checkpoint that `ckpt_path` names.

    Lightning's own search is not used: it sees as `last` only files of that name in the folder of the run that starts, and goes on
    without weights where there is none; it knows a `best` only in the process that trained it.

    Args:
        trainer: Its logger and checkpoint callbacks say where to look.
        ckpt_path: A file; `last` for the newest checkpoint of the runs that have the logger's name; `best` for the best one, by its
            callback's `monitor`, of the run that wrote the last; `hpc` is left to Lightning.

    Raises:
        ConfigError: If `ckpt_path` is empty.
        CheckpointError: If there is no such checkpoint, or it is no whole one of this package.
    """
    if not ckpt_path:
        raise ConfigError("ckpt_path is empty: give a .ckpt file, `last` or `best`, or leave it out to start from the base model")
    if ckpt_path in ("last", "best"):
        newest = _newest(trainer)
        if newest is None:
            raise CheckpointError(
                f"ckpt_path={ckpt_path}: there is no checkpoint in {_searched(trainer)} yet: give a .ckpt file, or leave ckpt_path out "
                "to use the base model"
            )
        ckpt_path = newest if ckpt_path == "last" else str(_best_of_run(newest))
    check_checkpoint(ckpt_path)
    return ckpt_path


def _best_of_run(newest: str) -> Path:
    """The best checkpoint of a run, by what its checkpoint callbacks wrote into its newest one.

    Raises:
        CheckpointError: If they know none or more than one, or it is gone.
    """
    file = local_path(newest)
    if file is None:
        raise CheckpointError(f"ckpt_path=best: it is found on local disks alone, and the run's newest checkpoint is {newest}: give a file")
    states = read_checkpoint(file, map_location="cpu", mmap=True).get("callbacks", {}).values()
    saved = [state for state in states if isinstance(state, dict) and state.get("best_model_path")]
    # Where there is no monitor, Lightning calls the newest checkpoint the best.
    best = {state["best_model_path"]: state["monitor"] for state in saved if state.get("monitor")}
    if not best:
        raise CheckpointError(
            f"ckpt_path=best: {file} knows no best checkpoint: its run had no ModelCheckpoint with a `monitor`, or did not reach its "
            "first value; give `last` or a .ckpt file"
        )
    if len(best) > 1:
        several = ", ".join(f"{path} ({monitor})" for path, monitor in best.items())
        raise CheckpointError(f"ckpt_path=best: the run has several, by different callbacks: give one of {several}")
    path, monitor = next(iter(best.items()))
    places = (Path(path), file.with_name(Path(path).name))  # the run's folder may have been moved
    for place in places:
        if place.exists():
            return place
    raise CheckpointError(f"ckpt_path=best: {path}, the best by {monitor}, is gone: give `last` or a .ckpt file")


def _folder_of_run(path: str, runs: Path) -> Path | None:
    """The folder, in that of all runs of a name, of the run that wrote a checkpoint; None if it is none of them."""
    file = Path(path)
    folders = list(file.absolute().parents)
    if file.is_file():  # ModelCheckpoint's `dirpath` may lie elsewhere
        folders.append(Path(read_checkpoint(file, map_location="cpu", mmap=True)["stateset"].get("run_folder", "")))
    return next((folder for folder in folders if folder.parent == runs and folder.is_dir()), None)


def _newest(trainer: Trainer) -> str | None:
    found: list[tuple[float, str]] = []
    for folder, pattern in _places(trainer):
        if "://" in folder:
            system, root = url_to_fs(folder)
            found += [(system.modified(file).timestamp(), system.unstrip_protocol(file)) for file in system.glob(f"{root}/{pattern}")]
        else:
            found += [(file.stat().st_mtime, str(file)) for file in newest_checkpoints(Path(folder), pattern)[:1]]
    return max(found, default=(0.0, None))[1]


def _searched(trainer: Trainer) -> str:
    folders = [os.path.join(folder, pattern.removesuffix("*.ckpt").removesuffix("**/")) for folder, pattern in _places(trainer)]
    return " or ".join(folders)


def _places(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Where checkpoints may lie: a folder, local or remote, and the pattern of their names below it.

    A file name that holds a metric with a slash, such as `{val/reward:.2f}`, is one in a folder below.
    """
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    for callback in callbacks:
        if callback.dirpath:
            for depth in range((callback.filename or "").count("/") + 1):  # and no deeper: other runs may lie there
                yield str(callback.dirpath), "*/" * depth + "*.ckpt"
    if callbacks and all(callback.dirpath for callback in callbacks):
        return
    if not trainer.loggers:
        yield os.path.join(trainer.default_root_dir, "checkpoints"), "**/*.ckpt"
        return
    logger = trainer.loggers[0]
    yield os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name)), "*/checkpoints/**/*.ckpt"
