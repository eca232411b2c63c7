"""Which checkpoint `--ckpt_path` names, and the folder in which a resumed run goes on."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from lightning.pytorch import Trainer

from stateset_lightning.errors import CheckpointError, ConfigError, UserError, log
from stateset_lightning.ranks import Ranks
from stateset_lightning.run.checkpoint_io import age, is_foreign, is_sharded, newest_checkpoints, read_checkpoint
from stateset_lightning.run.folder import CHECKPOINTS, run_folder
from stateset_lightning.run.last_checkpoint import model_checkpoints
from stateset_lightning.run.lightning_internals import continue_version, with_all_ranks

T = TypeVar("T")


def continue_run(trainer: Trainer, ckpt_path: str, *, announce: bool = True) -> str | None:
    """Makes a resumed run write to the folder of the run that it continues, if that is one of the logger's.

    What rank 0 finds is every rank's.

    Args:
        trainer: Before its `fit`. A logger that was given a version (W&B: an id) keeps it.
        ckpt_path: As in `find_checkpoint`.
        announce: Whether a line says which checkpoint it is.

    Returns:
        The checkpoint's path, for `trainer.fit(ckpt_path=...)`. None if `last` finds none, which is announced: a job
        that may be killed at any time can be started by the same command each time.

    Raises:
        UserError: If the checkpoint cannot be found or used.
    """

    def find() -> tuple[str | None, str | None]:
        path = find_resumed(trainer, ckpt_path, announce=announce)
        return path, path and _folder_of_run(trainer, path)

    path, folder = _agreed(trainer, find)
    if folder and trainer.logger:
        continue_version(trainer.logger, folder)
    return path


def find_resumed(trainer: Trainer, ckpt_path: str, *, announce: bool = True) -> str | None:
    """`find_checkpoint` for `fit`: None, announced, if `last` finds none."""
    if ckpt_path == "last" and _newest(places := [*_places(trainer)]) is None:
        log.info("--ckpt_path last: there is no checkpoint in %s yet; a new run starts", _shown(places))
        return None
    path = find_checkpoint(trainer, ckpt_path)
    if Path(path).is_file() and {"loops", "lr_schedulers"} & set(read_checkpoint(Path(path))) == {"loops"}:
        raise CheckpointError(f"ckpt_path={path}: no run can go on from save_weights_only: evaluate it, or export it")
    if announce:
        log.info("resuming %s", path)
    return path


def find_checkpoint(trainer: Trainer, ckpt_path: str) -> str:
    """The path of the checkpoint that `ckpt_path` names, where the Trainer's runs are.

    Lightning's own search is not used. It takes as `last` only files of that name in the folder of the run that starts,
    and goes on without weights where there is none; it knows a `best` only in the process that trained it.

    Args:
        trainer: Its logger and checkpoint callbacks say where to look.
        ckpt_path: A file; `last` for the newest checkpoint of the runs that have the logger's name; `best` for the best
            one, by its callback's `monitor`, of the run that wrote the last; a folder (of checkpoints, of a run, of
            runs) for the newest below it. `hpc` is left to Lightning.

    Raises:
        ConfigError: If `ckpt_path` is empty.
        CheckpointError: If there is no such checkpoint, or it is damaged or none of this package.
    """
    return find_among(list(_places(trainer)), ckpt_path)


def find_among(places: Sequence[tuple[str, str]], ckpt_path: str) -> str:
    """`find_checkpoint` where `last` and `best` are looked for in these folders, by these patterns."""
    if not ckpt_path:
        raise ConfigError("ckpt_path is empty: give a .ckpt file, `last` or `best`, or leave it out for the base model")
    is_name = ckpt_path in ("last", "best")
    if is_name or (Path(ckpt_path).is_dir() and not is_sharded(Path(ckpt_path))):
        places = places if is_name else [(ckpt_path, "**/*.ckpt")]
        if (newest := _newest(places)) is None:
            absent = f"ckpt_path={ckpt_path}: there is no checkpoint in {_shown(places)} yet"
            raise CheckpointError(f"{absent}: give a .ckpt file, or leave it out (generate, export: name the model)")
        ckpt_path = str(_best_of_run(newest)) if ckpt_path == "best" else newest
    # Lightning's `hpc`, remote and sharded ones are left to it.
    is_left = ckpt_path == "hpc" or ckpt_path.startswith("registry") or "://" in ckpt_path
    if not is_left and not Path(ckpt_path).is_dir():
        read_checkpoint(Path(ckpt_path))
    return ckpt_path


def found_by_trainer(trainer: Trainer, ckpt_path: str) -> str | None:
    """The checkpoint of a fit, validate, test or predict, as the command line finds it.

    An evaluation takes from it what the policy leaves open of its adapter and, at the default precision, of its dtype.
    """
    if trainer.state.fn == "fit":
        return continue_run(trainer, ckpt_path, announce=not Path(ckpt_path).is_file())  # else Lightning names it
    # An evaluation has a folder of its own, and keeps no best checkpoints.
    warnings.filterwarnings("ignore", "The dirpath has changed from")

    def find() -> tuple[str, Any]:
        path = find_checkpoint(trainer, ckpt_path)
        content = read_checkpoint(Path(path)) if Path(path).is_file() else {}
        return path, content.get("hyper_parameters", {}).get("policy")

    path, saved = _agreed(trainer, find)
    module: Any = trainer.lightning_module
    if module.policy is None and isinstance(saved, Mapping):
        names = ["lora", "adapter", *(["dtype"] if trainer.precision == "32-true" else [])]
        module.policy_config = module.policy_config.completed(saved, names)
    return path


def _agreed(trainer: Trainer, find: Callable[[], T]) -> T:
    """Rank 0's answer on every rank: each disk may hold something else.

    Raises:
        UserError: On every rank, if there is none.
    """
    if trainer.world_size == 1:
        return find()

    def ask_first() -> T | UserError:
        try:
            answer: Any = find() if trainer.is_global_zero else None
        except UserError as error:
            answer = error
        return Ranks.current().from_first(answer)

    answer = with_all_ranks(trainer, ask_first)
    if isinstance(answer, UserError):
        raise answer
    return answer


def _best_of_run(newest: str) -> Path:
    """The best checkpoint of a run, by what its checkpoint callbacks wrote into its newest one.

    Raises:
        CheckpointError: If they know none or more than one, or the file is gone.
    """
    if "://" in newest:
        raise CheckpointError(f"ckpt_path=best finds local files alone, and the newest is {newest}: give a file")
    file = Path(newest)
    states = [state for state in read_checkpoint(file).get("callbacks", {}).values() if isinstance(state, dict)]
    # Where there is no monitor, Lightning calls the newest checkpoint the best.
    best = {s["best_model_path"]: s for s in states if s.get("best_model_path") and s.get("monitor")}
    if not best:
        raise CheckpointError(f"ckpt_path=best: {file} has no best one by a `monitor`; give `last` or a .ckpt file")
    if len(best) > 1:
        several = ", ".join(f"{path} ({state['monitor']})" for path, state in best.items())
        raise CheckpointError(f"ckpt_path=best: the run has several, by different callbacks: give one of {several}")
    path, monitor, dirpath = next((path, state["monitor"], state.get("dirpath")) for path, state in best.items())
    name = os.path.relpath(path, dirpath)
    # Near the newest first: the run's folder may have been moved, and another run be where it was.
    for place in [*(folder / name for folder in file.parents[:3]), Path(path)]:
        if place.exists():
            return place
    raise CheckpointError(f"ckpt_path=best: {path}, the best by {monitor}, is gone: give `last` or a .ckpt file")


def _folder_of_run(trainer: Trainer, path: str) -> str | None:
    """The name of the folder of the run that wrote a checkpoint, if it is one of those of the logger."""
    if trainer.logger is None or path == "hpc":
        return None
    runs, file = Path(trainer.logger.save_dir or "", str(trainer.logger.name)).absolute(), Path(path)
    folders = list(file.absolute().parents)
    if file.is_file():  # ModelCheckpoint's `dirpath` may lie elsewhere
        folders.append(Path(read_checkpoint(file)["stateset"].get("run_folder", "")))
    return next((folder.name for folder in folders if folder.parent == runs and folder.is_dir()), None)


def _newest(places: Iterable[tuple[str, str]]) -> str | None:
    """The newest checkpoint in all places; files that are none of ours are passed over, each with a line."""
    found: list[tuple[tuple[bool, float, str], str]] = []
    for folder, pattern in places:
        if "://" in folder:
            system, root = url_to_fs(folder)
            files = system.glob(f"{root}/{pattern}")
            found += [((True, system.modified(file).timestamp(), ""), system.unstrip_protocol(file)) for file in files]
        else:
            found += [(age(file), str(file)) for file in newest_checkpoints(Path(folder), pattern)]
    for _, path in sorted(found, reverse=True):
        if "://" in path or not is_foreign(Path(path)):
            return path
        log.info("%s is passed over: it is no checkpoint of stateset-lightning", path)
    return None


def _shown(places: Iterable[tuple[str, str]]) -> str:
    """The places, for a message."""
    return " or ".join(os.path.join(f, pattern.removesuffix("*.ckpt").removesuffix("**/")) for f, pattern in places)


def _places(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Where checkpoints may lie: a folder, local or remote, and the pattern of their names below it.

    A file name that holds a metric with a slash, such as `{val/reward:.2f}`, is one in a folder below.
    """
    callbacks = model_checkpoints(trainer)
    elsewhere = [callback for callback in callbacks if callback.dirpath]
    for callback in elsewhere:
        for depth in range((callback.filename or "").count("/") + 1):  # and no deeper: other runs may lie there
            yield str(callback.dirpath), "*/" * depth + "*.ckpt"
    if callbacks and elsewhere == callbacks:
        return
    if trainer.loggers:
        logger = trainer.loggers[0]
        runs = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name))
        yield runs, f"*/{CHECKPOINTS}/**/*.ckpt"
    else:
        yield str(run_folder(trainer) / CHECKPOINTS), "**/*.ckpt"
