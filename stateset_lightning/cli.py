"""The command line: `stateset-lightning fit | validate | test | predict --config FILE`.

LightningCLI with this kit's module and datamodule: typed keys, `--print_config`, overlays by repeated `--config`, any key as a flag.
What a user can mend is reported in a line or two; anything else keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from stateset_lightning.callbacks import ConsoleProgress, PredictionWriter, RunSummary, SampleWriter
from stateset_lightning.callbacks.run_folder import run_folder
from stateset_lightning.datamodule import ScenarioDataModule
from stateset_lightning.errors import UserError
from stateset_lightning.module import GRPOLightningModule

PROGRAM = "stateset-lightning"


class Parser(LightningArgumentParser):
    """Reports an error in a few lines, without the usage of some hundred options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        fail(shorten(message))


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config to the run's own folder, also with W&B, whose `log_dir` all runs share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        # The resolved config of a second command in the same folder (a baseline, then `fit`) is the same one.
        self.parser.save(self.config, folder / "config.yaml", skip_none=False, overwrite=True)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.as_dict())


class StatesetCLI(LightningCLI):
    """LightningCLI with this kit's parser, errors and default callbacks."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="A YAML file; later ones win. May be repeated.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--baseline", type=bool, default=False, help="fit: validate before training, to compare with.")
        parser.add_lightning_class_args(SampleWriter, "samples")
        parser.add_lightning_class_args(PredictionWriter, "predictions")

    def _parse_ckpt_path(self) -> None:
        """Not done: Lightning merges a checkpoint's hyperparameters over the flags, so that a new learning rate is ignored."""

    def before_fit(self) -> None:
        config = self.config.fit
        if config.baseline and not config.ckpt_path:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def main(args: ArgsType = None) -> StatesetCLI:
    """Runs the command line; `args` replaces `sys.argv[1:]`, for tests and notebooks.

    Raises:
        SystemExit: With code 2 for whatever the user can mend, after a message of a line or two on stderr.
    """
    quieten()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    progress = [RunSummary()] if sys.stdout.isatty() else [RunSummary(), ConsoleProgress()]
    try:
        return StatesetCLI(
            GRPOLightningModule,
            ScenarioDataModule,
            seed_everything_default=42,
            auto_configure_optimizers=False,  # it would build the optimizer before the weights are loaded
            save_config_callback=SaveRunConfig,
            trainer_defaults={
                "callbacks": progress,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,  # the loader shards by rank itself
                "log_every_n_steps": 1,
                "enable_progress_bar": sys.stdout.isatty(),
            },
            parser_kwargs={"prog": PROGRAM, "default_env": False},
            args=args,
        )
    except (UserError, MisconfigurationException) as error:
        fail(str(error))


def quieten() -> None:
    """Silences what libraries say at every start and no user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`gradient_checkpointing_enable` is deprecated.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.getMessage())
    announcements = logging.getLogger("stateset_lightning")
    announcements.setLevel(logging.INFO)
    if not announcements.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        announcements.addHandler(handler)


def fail(message: str) -> NoReturn:
    print(f"{PROGRAM}: error: {message.strip()}", file=sys.stderr)
    raise SystemExit(2)


def shorten(message: str, max_lines: int = 4) -> str:
    """The lines of a parser's message that say what is wrong; it lists every member of a union type that did not fit."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "\n  ".join(line[:300] for line in lines[:max_lines])


def configs_folder() -> Path:
    return Path(__file__).parents[1] / "configs"


if __name__ == "__main__":
    main()
