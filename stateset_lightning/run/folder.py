"""Where a run's files go, and what each of them is called: one folder per run, whatever the logger.

Lightning is imported where a logger is looked at: the names serve commands that need not wait for torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# The folder that ModelCheckpoint writes to by default.
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
# The resolved config; the second name without a logger, when the folder may hold the user's own `config.yaml`.
CONFIGS = "config.yaml", "resolved_config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.csv"
SAMPLES = "samples.jsonl"
PREDICTIONS = "predictions.jsonl"
BAD_STEPS = "bad_steps.jsonl"
REPORT = "report.html"
# The folder of a run without a logger that was given no `default_root_dir`: the working folder's files are others'.
UNLOGGED = "lightning_logs/without_logger"


def run_folder(trainer: "Trainer") -> Path:
    """`save_dir/name/version` of the first logger, as ModelCheckpoint builds it; else the Trainer's root folder, or one
    of its own where that is the working folder.

    `trainer.log_dir` would do for most loggers, but with W&B it is a folder that all runs share.
    """
    from lightning.pytorch.loggers import WandbLogger

    if not trainer.loggers:
        root = Path(trainer.default_root_dir)
        return root / UNLOGGED if root.absolute() == Path.cwd() else root
    logger = trainer.loggers[0]
    if isinstance(logger, WandbLogger):
        _ = logger.experiment  # starts the run: before that it has no id, and so no version
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def continues(trainer: "Trainer", folder: str, file: Path | None = None) -> bool:
    """Whether this run goes on in the folder of the run that wrote a checkpoint.

    Args:
        trainer: Of this run.
        folder: Of the other run, by what its checkpoint says.
        file: The checkpoint; by default the one from which this run is resumed.
    """
    mine = run_folder(trainer).absolute()
    # the second where it has been moved
    return Path(folder) == mine or Path(file or str(trainer.ckpt_path)).absolute().is_relative_to(mine)


def of_rank(trainer: "Trainer", path: Path) -> Path:
    """The file of this rank, where every rank writes its own: `name.jsonl`, `name-rank1.jsonl`, ..."""
    return path.with_stem(f"{path.stem}-rank{trainer.global_rank}") if trainer.global_rank else path


def config_file(trainer: "Trainer") -> Path:
    """Where the resolved config goes."""
    return run_folder(trainer) / CONFIGS[0 if trainer.loggers else 1]
