"""A checkpoint is the whole run: the part of the module that says what goes into one, and what comes out of it."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.errors import CheckpointError, ConfigError
from stateset_lightning.policy import Policy
from stateset_lightning.policy.lora_state import check_same_kind
from stateset_lightning.ranks import Ranks
from stateset_lightning.rollout import RolloutConfig
from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO, local_path, newest_checkpoints, read_checkpoint
from stateset_lightning.run.folder import continues, run_folder
from stateset_lightning.run.last_checkpoint import LastCheckpoint, keeping_last
from stateset_lightning.run.metrics_file import (
    drop_later_events,
    install_metrics_files,
    metrics_files,
    skip_known_rows,
    wandb_rows,
)
from stateset_lightning.run.records import drop_later_steps
from stateset_lightning.run.step_end import StepEnd
from stateset_lightning.seeding import run_seed
from stateset_lightning.training.checks import check_checkpoint, check_resumable
from stateset_lightning.training.episode import Episode
from stateset_lightning.training.fsdp import ShardableModule
from stateset_lightning.training.metrics import RunMetrics
from stateset_lightning.training.schedule import keep_given_options

_log = logging.getLogger("stateset_lightning")


class ResumableModule(ShardableModule):
    """Saves what Lightning does not, as tensors and plain containers, and goes on from there."""

    algorithm: Algorithm
    rollout: RolloutConfig
    metrics: RunMetrics
    policy: Policy | None

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self._given_seed = seed
        self._episode: Episode | None = None
        self._episode_states: list[dict[str, Any]] | None = None  # of all ranks, while a checkpoint would need them
        self._step_started: float | None = None
        self._bad_steps = 0
        self._given_options: list[dict[str, Any]] = []  # of the optimizer
        self._resumed: Mapping[str, Any] | None = None  # state of the checkpoint, until training starts

    @property
    def inside_optimizer_step(self) -> bool:
        """Whether a gradient is being accumulated or applied: a checkpoint made now could not be resumed exactly."""
        return self._step_started is not None

    @property
    def episode(self) -> Episode | None:
        """What is being trained on, of this rank; for callbacks."""
        return self._episode

    @property
    def seed(self) -> int:
        """The seed of all sampling: the one given, or that of `seed_everything`, also if it was called after this was
        made.
        """
        return run_seed() if self._given_seed is None else self._given_seed

    @property
    def _ranks(self) -> Ranks:
        return Ranks(self.trainer.global_rank, self.trainer.world_size) if self._trainer is not None else Ranks()

    @property
    def _accumulate(self) -> int:
        return int(self.trainer.accumulate_grad_batches)

    def configure_callbacks(self) -> list[Callback]:
        """Installs our writers of checkpoints and metrics where the user has chosen none, and adds the callbacks that a
        run needs.
        """
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        install_metrics_files(self.trainer)
        needed: list[type[Callback]] = [StepEnd, LastCheckpoint] if keeping_last(self.trainer) else [StepEnd]
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [kind() for kind in needed if kind not in present]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the run's state.

        Raises:
            ConfigError: Inside an optimizer step: the gradient so far would be lost, and the run could not go on
                exactly.
        """
        trainer = self.trainer
        if self.inside_optimizer_step:
            raise ConfigError(
                "trainer.save_checkpoint was called inside an optimizer step, whose gradient so far no checkpoint"
                " holds: call it where `pl_module.inside_optimizer_step` is false, or use a ModelCheckpoint, which"
                " waits"
            )
        for logger in trainer.loggers:
            logger.save()  # metrics up to here survive together with the checkpoint
        checkpoint["stateset"] = {
            "seed": self.seed,
            "step": trainer.global_step,
            "algorithm": self.algorithm.state_dict(),
            "episode": self._episode_states,
            "metrics": self.metrics.state_dict(),
            "bad_steps": self._bad_steps,
            "adapter": None if self.policy is None or self.policy.adapter is None else self.policy.adapter.state_dict(),
            "accumulate": self._accumulate,
            "optimizer_options": self._given_options,
            "options": self._options(),
            "run_folder": str(run_folder(trainer).absolute()),
            "wandb_rows": wandb_rows(trainer),
            "metrics_rows": [writer.num_rows for writer in metrics_files(trainer)],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the run's state, and its files if it goes on in the same folder.

        Raises:
            ConfigError: If the run cannot go on exactly.
        """
        state = checkpoint["stateset"]
        self.algorithm.load_state_dict(state["algorithm"])
        self.metrics.load_state_dict(state["metrics"])
        self._load_adapter_state(state.get("adapter"))
        if self._trainer is None or not self.trainer.training:
            return
        check_resumable(state, self.seed, self._accumulate, self._ranks.world)
        if self._whole is None and "optimizer_states" not in checkpoint:
            raise ConfigError("the checkpoint is a folder of shards: its run goes on with trainer.strategy=fsdp2 alone")
        self._resumed = state
        self._bad_steps = state["bad_steps"]
        if (episodes := state["episode"]) is not None:
            self._episode, self._episode_states = Episode.from_state_dict(episodes[self._ranks.rank]), episodes
        if continues(self.trainer, state["run_folder"]):
            for writer, rows in zip(metrics_files(self.trainer), state["metrics_rows"], strict=False):
                writer.resume(rows)
            drop_later_steps(self.trainer, state["step"])
            drop_later_events(self.trainer, state["step"])

    def _load_adapter_state(self, saved: Mapping[str, Any] | None) -> None:
        if self.policy is not None:
            check_same_kind(self.policy.adapter, saved)
            if self.policy.adapter is not None and saved is not None:
                self.policy.adapter.load_state_dict(saved)

    def on_train_start(self) -> None:
        """Optimizer and scheduler are restored by now: options given win over the checkpoint's, and the log says which
        differ.
        """
        state, self._resumed = self._resumed, None
        if state is None:
            return
        given, saved = self._given_options, state["optimizer_options"]
        keep_given_options(self.trainer.optimizers[0], self.lr_schedulers(), given, saved)
        pairs = [(name, value, state["options"].get(name, value)) for name, value in self._options().items()]
        for now, before in zip(given, saved, strict=True):
            pairs += [
                (f"model.optimizer {name}", now[name], before[name]) for name in sorted(now.keys() & before.keys())
            ]
        changed = [pair for pair in pairs if pair[1] != pair[2]]
        if self.trainer.is_global_zero:
            for pair in changed:
                _log.info("%s=%s, and %s in the checkpoint: the new value is used", *pair)
        if not changed and continues(self.trainer, state["run_folder"]):
            skip_known_rows(self.trainer, state["wandb_rows"])

    def _options(self) -> dict[str, Any]:
        """Options that may change between a checkpoint and its resume."""
        options = {
            f"trainer.{name}": getattr(self.trainer, name) for name in ("max_steps", "max_epochs", "gradient_clip_val")
        }
        options |= {f"model.rollout.{name}": value for name, value in asdict(self.rollout).items()}
        own = {name: asdict(value) if is_dataclass(value) else value for name, value in vars(self.algorithm).items()}  # type: ignore[arg-type]
        plain = {name: value for name, value in own.items() if isinstance(value, float | int | str | dict | None)}
        adaptive = self.algorithm.state_dict()
        return options | {f"model.algorithm.{name}": value for name, value in plain.items() if name not in adaptive}


# MERGED: Which checkpoint `--ckpt_path` names, and the folder that a resumed run's files are continued in.

_log = logging.getLogger("stateset_lightning")


def continue_run(trainer: Trainer, ckpt_path: str) -> str | None:
    """Makes a resumed run write to the folder of the run that it continues, if that is one of the logger's.

    Args:
        trainer: Before its `fit`; a logger with a version (W&B: an id) of its own keeps it.
        ckpt_path: As in `find_checkpoint`.

    Returns:
        The checkpoint's path, for `trainer.fit(ckpt_path=...)`. None if there is no last one, which is announced: a run
        that may be killed at any time can be started by the same command each time.

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

    Lightning's own search is not used: it sees as `last` only files of that name in the folder of the run that starts,
    and goes on without weights where there is none; it knows a `best` only in the process that trained it.

    Args:
        trainer: Its logger and checkpoint callbacks say where to look.
        ckpt_path: A file; `last` for the newest checkpoint of the runs that have the logger's name; `best` for the best
            one, by its callback's `monitor`, of the run that wrote the last; `hpc` is left to Lightning.

    Raises:
        ConfigError: If `ckpt_path` is empty.
        CheckpointError: If there is no such checkpoint, or it is no whole one of this package.
    """
    if not ckpt_path:
        raise ConfigError(
            "ckpt_path is empty: give a .ckpt file, `last` or `best`, or leave it out to start from the base model"
        )
    if ckpt_path in ("last", "best"):
        newest = _newest(trainer)
        if newest is None:
            raise CheckpointError(
                f"ckpt_path={ckpt_path}: there is no checkpoint in {_searched(trainer)} yet: give a .ckpt file, or"
                " leave ckpt_path out to use the base model"
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
        raise CheckpointError(
            f"ckpt_path=best: it is found on local disks alone, and the run's newest checkpoint is {newest}: give a"
            " file"
        )
    states = read_checkpoint(file, map_location="cpu", mmap=True).get("callbacks", {}).values()
    saved = [state for state in states if isinstance(state, dict) and state.get("best_model_path")]
    # Where there is no monitor, Lightning calls the newest checkpoint the best.
    best = {state["best_model_path"]: state["monitor"] for state in saved if state.get("monitor")}
    if not best:
        raise CheckpointError(
            f"ckpt_path=best: {file} knows no best checkpoint: its run had no ModelCheckpoint with a `monitor`, or did"
            " not reach its first value; give `last` or a .ckpt file"
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
            found += [
                (system.modified(file).timestamp(), system.unstrip_protocol(file))
                for file in system.glob(f"{root}/{pattern}")
            ]
        else:
            found += [(file.stat().st_mtime, str(file)) for file in newest_checkpoints(Path(folder), pattern)[:1]]
    return max(found, default=(0.0, None))[1]


def _searched(trainer: Trainer) -> str:
    folders = [
        os.path.join(folder, pattern.removesuffix("*.ckpt").removesuffix("**/")) for folder, pattern in _places(trainer)
    ]
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
