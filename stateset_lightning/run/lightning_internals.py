"""Lightning's private fields that a run depends on, each behind a function that says what for.

Seen in lightning 2.6.6; tests/run/test_lightning_internals.py fails first when a release changes one. Those of
ModelCheckpoint are in last_checkpoint.py, beside their only use.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from stateset_lightning.files import make_folder

T = TypeVar("T")

# Loggers that count the runs in their folder, and call each `version_N`.
COUNTING = CSVLogger | TensorBoardLogger

# Loops ----------------------------------------------------------------------------------------------------------------


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates right after this training batch, on any rank: it may go by clocks, which differ."""
    loop, fetcher = trainer.fit_loop, trainer.fit_loop._data_fetcher
    return trainer.strategy.reduce_boolean_decision(loop.epoch_loop._should_check_val_fx(fetcher), all=False)  # type: ignore[arg-type]


def validate_now(trainer: Trainer) -> None:
    """A validation between two training batches, or before the first, outside Lightning's own schedule."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    # A resumed epoch counts as done once a validation has run, and one whose last batch is done would never leave its
    # restart.
    loop._has_run = False
    trainer.training = True


def turn_back_to_last_batch(progress: dict[str, Any]) -> None:
    """Takes from a fit loop's saved progress what `on_train_epoch_end` found counted after the epoch's last batch.

    With `max_steps`, Lightning would otherwise end a resumed epoch a second time, or train a batch too many.
    """
    epoch, batch = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    if epoch["current"]["completed"] < epoch["current"]["processed"] == epoch["current"]["ready"]:
        for span in ("total", "current"):
            epoch[span]["processed"] -= 1
            batch[span]["completed"] -= 1
        progress["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def loader_states(checkpoint: dict[str, Any], trainer: Trainer) -> list[dict[str, Any]]:
    """What a checkpoint holds of the training loader: the data module's state, and Lightning's own copy."""
    own = checkpoint.get(type(getattr(trainer, "datamodule", None)).__qualname__, {}).get("train")
    return [own, *checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])] if own else []


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal on which Lightning saves and puts the SLURM job back into the queue; None if it does not."""
    slurm = trainer._accelerator_connector.cluster_environment
    return slurm.requeue_signal if isinstance(slurm, SLURMEnvironment) and slurm.auto_requeue else None


# Start of a run -------------------------------------------------------------------------------------------------------


def search_with(trainer: Trainer, find: Callable[[Trainer, str], str | None]) -> None:
    """Lets `find` say which file the `ckpt_path` of fit, validate, test and predict names; None: no file is loaded."""
    connector: Any = trainer._checkpoint_connector
    search = type(connector)._select_ckpt_path

    def select(state_fn: Any, ckpt_path: Any, **given: bool) -> Any:
        return search(connector, state_fn, None if ckpt_path is None else find(trainer, str(ckpt_path)), **given)

    connector._select_ckpt_path = select


def with_all_ranks(trainer: Trainer, function: Callable[[], T]) -> T:
    """Calls a function in which ranks talk to each other; ranks that are not running yet are started for it."""
    strategy: Any = trainer.strategy

    def connected() -> T:
        (getattr(strategy, "setup_distributed", None) or strategy._setup_distributed)()  # DDP, or sharded
        strategy.accelerator.setup_device(strategy.root_device)
        return function()

    launches = isinstance(strategy.launcher, _SubprocessScriptLauncher)
    return strategy.launcher.launch(connected, trainer=trainer) if launches else connected()


# Modules --------------------------------------------------------------------------------------------------------------


def is_compiled(module: LightningModule) -> bool:
    """Whether the Trainer was given `torch.compile(module)`: it unwraps that, and compiles the module's steps."""
    return module._compiler_ctx is not None


def is_watched_by_wandb(module: LightningModule) -> bool:
    """Whether W&B has looked for weights to watch (wandb 0.31 leaves the names of what it found)."""
    return hasattr(module, "_wandb_hook_names")


# Checkpoint plugins ---------------------------------------------------------------------------------------------------


def replace_checkpoint_io(trainer: Trainer, kind: type[CheckpointIO], replacement: CheckpointIO) -> None:
    """Puts a plugin in the place of one of exactly this kind, also inside those that wrap it (AsyncCheckpointIO)."""
    holder: Any = trainer.strategy
    while isinstance(plugin := holder.checkpoint_io, _WrappingCheckpointIO):
        holder = plugin
    if type(plugin) is kind:
        holder._checkpoint_io = replacement


# Loggers --------------------------------------------------------------------------------------------------------------


def writer_of(logger: CSVLogger) -> Any:
    """What the logger writes with; None before its first use."""
    return logger._experiment


def set_writer(logger: CSVLogger, writer: Any) -> None:
    logger._experiment = writer


def continue_version(logger: Logger, folder: str) -> None:
    """Makes a logger go on in the folder of an earlier run, unless it was given a version (W&B: an id) of its own."""
    if isinstance(logger, COUNTING) and logger._version is None:
        number = folder.removeprefix("version_")
        logger._version = int(number) if number.isdigit() else folder
    elif isinstance(logger, WandbLogger) and logger._id is None:
        logger._id = folder
        logger._wandb_init.update(id=folder, resume="allow")


def claim_versions(trainer: Trainer, kind: str = "version") -> None:
    """Makes the folder `version_N` for loggers that count them: runs that start together never share one.

    Lightning counts the folders that are there, and makes its own much later. Loggers of one run that write to the same
    place share a version.

    Args:
        trainer: With loggers; nothing is done on other ranks than the first.
        kind: `evaluation` for a folder `evaluation_N`, which takes no number of a training run.

    Raises:
        DiskError: If the folder cannot be made.
    """
    claimed: dict[str, int | str] = {}
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, COUNTING) and logger._version is None and "://" not in (root := logger.root_dir):
            if root not in claimed:
                numbers = itertools.count(logger._get_next_version() if kind == "version" else 0)
                number = next(n for n in numbers if make_folder(Path(root, f"{kind}_{n}")))
                claimed[root] = number if kind == "version" else f"{kind}_{number}"
            logger._version = claimed[root]


def share_versions(trainer: Trainer) -> None:
    """Gives the loggers of every rank the first one's version; called by all."""
    for logger in trainer.loggers:
        if isinstance(logger, COUNTING):
            logger._version = trainer.strategy.broadcast(logger._version)
