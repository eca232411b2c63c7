"""Which checkpoint `--ckpt_path` names, and the folder in which a resumed run goes on."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from stateset_lightning.errors import CheckpointError, ConfigError
from stateset_lightning.run.checkpoint_io import local_path, newest_checkpoints, read_checkpoint
from stateset_lightning.run.folder import CHECKPOINTS, run_folder
from stateset_lightning.run.lightning_internals import continue_version

_log = logging.getLogger("stateset_lightning")


def continue_run(trainer: Trainer, ckpt_path: str) -> str | None:
    """Makes a resumed run write to the folder of the run that it continues, if that is one of the logger's.

    Args:
        trainer: Before its `fit`. A logger that was given a version (W&B: an id) keeps it.
        ckpt_path: As in `find_checkpoint`.

    Returns:
        The checkpoint's path, for `trainer.fit(ckpt_path=...)`. None if `last` finds none, which is announced: a job
        that may be killed at any time can be started by the same command each time.

    Raises:
        UserError: If the checkpoint cannot be found or used.
    """
    if ckpt_path == "last" and _newest(trainer) is None:
        _log.info("--ckpt_path last: there is no checkpoint in %s yet; a new run starts", _searched(trainer))
        return None
    path = find_checkpoint(trainer, ckpt_path)
    if path != "hpc":
        for logger in trainer.loggers[:1]:
            if folder := _folder_of_run(path, Path(logger.save_dir or "", str(logger.name)).absolute()):
                continue_version(logger, folder.name)
        _log.info("resuming %s", path)
    return path


def find_checkpoint(trainer: Trainer, ckpt_path: str) -> str:
    """The path of the checkpoint that `ckpt_path` names.

    Lightning's own search is not used. It takes as `last` only files of that name in the folder of the run that starts,
    and goes on without weights where there is none; it knows a `best` only in the process that trained it.

    Args:
        trainer: Its logger and checkpoint callbacks say where to look.
        ckpt_path: A file; `last` for the newest checkpoint of the runs that have the logger's name; `best` for the best
            one, by its callback's `monitor`, of the run that wrote the last; `hpc` is left to Lightning.

    Raises:
        ConfigError: If `ckpt_path` is empty.
        CheckpointError: If there is no such checkpoint, or it is damaged or none of this package.
    """
    if not ckpt_path:
        raise ConfigError("ckpt_path is empty: give a .ckpt file, `last` or `best`, or leave it out for the base model")
    if ckpt_path in ("last", "best"):
        if (newest := _newest(trainer)) is None:
            absent = f"ckpt_path={ckpt_path}: there is no checkpoint in {_searched(trainer)} yet"
            raise CheckpointError(f"{absent}: give a .ckpt file, or leave ckpt_path out to use the base model")
        ckpt_path = newest if ckpt_path == "last" else str(_best_of_run(newest))
    check_checkpoint(ckpt_path)
    return ckpt_path


def check_checkpoint(path: str) -> None:
    """A checkpoint file can be read and is one of ours; Lightning's `hpc`, remote and sharded ones are left to it.

    Raises:
        CheckpointError: If there is no such file, or it is damaged or none of this package.
    """
    if path != "hpc" and not path.startswith("registry") and "://" not in path and not Path(path).is_dir():
        _read(Path(path))


def _best_of_run(newest: str) -> Path:
    """The best checkpoint of a run, by what its checkpoint callbacks wrote into its newest one.

    Raises:
        CheckpointError: If they know none or more than one, or the file is gone.
    """
    if (file := local_path(newest)) is None:
        raise CheckpointError(f"ckpt_path=best finds local files alone, and the newest is {newest}: give a file")
    states = [state for state in _read(file).get("callbacks", {}).values() if isinstance(state, dict)]
    # Where there is no monitor, Lightning calls the newest checkpoint the best.
    best = {s["best_model_path"]: s["monitor"] for s in states if s.get("best_model_path") and s.get("monitor")}
    if not best:
        reason = "its run had no ModelCheckpoint with a `monitor`, or did not reach its first value"
        raise CheckpointError(f"ckpt_path=best: {file} knows no best checkpoint: {reason}; give `last` or a .ckpt file")
    if len(best) > 1:
        several = ", ".join(f"{path} ({monitor})" for path, monitor in best.items())
        raise CheckpointError(f"ckpt_path=best: the run has several, by different callbacks: give one of {several}")
    path, monitor = next(iter(best.items()))
    for place in (Path(path), file.with_name(Path(path).name)):  # the run's folder may have been moved
        if place.exists():
            return place
    raise CheckpointError(f"ckpt_path=best: {path}, the best by {monitor}, is gone: give `last` or a .ckpt file")


def _folder_of_run(path: str, runs: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint, if it is one of those below `runs`."""
    file = Path(path)
    folders = list(file.absolute().parents)
    if file.is_file():  # ModelCheckpoint's `dirpath` may lie elsewhere
        folders.append(Path(_read(file)["stateset"].get("run_folder", "")))
    return next((folder for folder in folders if folder.parent == runs and folder.is_dir()), None)


def _read(file: Path) -> dict[str, Any]:
    return read_checkpoint(file, map_location="cpu", mmap=True)


def _newest(trainer: Trainer) -> str | None:
    """The newest checkpoint in all places, by the time when it was written."""
    found: list[tuple[float, str]] = []
    for folder, pattern in _places(trainer):
        if "://" in folder:
            system, root = url_to_fs(folder)
            files = system.glob(f"{root}/{pattern}")
            found += [(system.modified(file).timestamp(), system.unstrip_protocol(file)) for file in files]
        else:
            found += [(file.stat().st_mtime, str(file)) for file in newest_checkpoints(Path(folder), pattern)[:1]]
    return max(found, default=(0.0, None))[1]


def _searched(trainer: Trainer) -> str:
    """The places, for a message."""
    shown = ((folder, pattern.removesuffix("*.ckpt").removesuffix("**/")) for folder, pattern in _places(trainer))
    return " or ".join(os.path.join(*place) for place in shown)


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
    if trainer.loggers:
        logger = trainer.loggers[0]
        runs = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name))
        yield runs, f"*/{CHECKPOINTS}/**/*.ckpt"
    else:
        yield str(run_folder(trainer) / CHECKPOINTS), "**/*.ckpt"
