"""LightningCLI with this package's parser, errors and default callbacks.

Importing this file imports Lightning, which takes seconds.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pydoc import locate
from typing import Any, NoReturn

import yaml
from jsonargparse import _typehints, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.callbacks import ConsoleProgress, PredictionWriter, RunSummary, SampleWriter
from stateset_lightning.cli.messages import PROGRAM, shorten
from stateset_lightning.datamodule import ScenarioDataModule
from stateset_lightning.errors import ConfigError, UserError
from stateset_lightning.files import atomic_write
from stateset_lightning.module import GRPOLightningModule
from stateset_lightning.redaction import redacted, redacted_text, remember
from stateset_lightning.run.find_checkpoint import continue_run, find_checkpoint
from stateset_lightning.run.folder import ENVIRONMENT, config_file
from stateset_lightning.run.system import environment

# A tie to a private function of jsonargparse, as it is in 4.53; tests/cli/test_config.py fails when that changes. By
# itself jsonargparse keeps, of a class chosen before, all options that the class chosen now has too, defaults among
# them: GSPO chosen over a config with GRPO would clip at GRPO's bounds, a thousand times its own.
_keep_shared_options = _typehints.discard_init_args_on_class_path_change


def forget_options_of_another_algorithm(parser_or_action: Any, previous: Any, value: Any) -> None:
    """Another algorithm starts from its own defaults: its name means its paper."""
    _keep_shared_options(parser_or_action, previous, value)
    if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
        chosen = locate(value["class_path"])
        if isinstance(chosen, type) and issubclass(chosen, Algorithm):
            for name in list(vars(previous["init_args"])):
                del previous["init_args"][name]


_typehints.discard_init_args_on_class_path_change = forget_options_of_another_algorithm


class Parser(LightningArgumentParser):
    """Reports an error in a few lines, without the usage of some hundred options."""

    known_keys: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a nested class: its message becomes part of the outer one's
            super().error(message, ex)
        raise UserError(shorten(redacted_text(message), self.known_keys))  # before a secret is cut in two

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        if lightning_class is ScenarioDataModule:
            # With sub-configs, `data.train: rows.json` would be read while parsing, as if it held the key's own value.
            return self.add_class_arguments(lightning_class, nested_key, fail_untyped=False, instantiate=True)
        return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config, and what it runs on, to the run's own folder.

    Also with W&B, where Lightning would write to a `log_dir` that all runs share.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        file = config_file(trainer)
        config = redacted(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
        # The resolved config of a second command in the same folder (a baseline, then `fit`) is the same one.
        with atomic_write(file) as opened:
            opened.write(yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
        if trainer.loggers:  # else it would stand among the user's own files
            with atomic_write(file.with_name(ENVIRONMENT)) as opened:
                opened.write(json.dumps(environment(trainer), indent=1).encode())
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


class StatesetCLI(LightningCLI):
    """LightningCLI with this package's parser, errors and default callbacks.

    Args:
        args: The command line, without the program's name.

    Raises:
        UserError: For whatever the user can mend.
    """

    def __init__(self, args: ArgsType) -> None:
        words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        # Each parser takes most of a second to build, and attribute docs as long to collect: only what this command
        # needs.
        self._wanted = [name for name in super().subcommands() if name in words] or list(super().subcommands())
        set_parsing_settings(docstring_parse_attribute_docstrings=any("help" in word or word == "-h" for word in words))
        progress = [RunSummary()] if sys.stdout.isatty() else [RunSummary(), ConsoleProgress()]
        try:
            super().__init__(
                GRPOLightningModule,
                ScenarioDataModule,
                seed_everything_default=42,
                auto_configure_optimizers=False,  # it would build the optimizer before the weights are loaded
                save_config_callback=SaveRunConfig,
                save_config_kwargs={"save_to_log_dir": False},
                trainer_defaults={
                    "callbacks": progress,
                    "num_sanity_val_steps": 0,
                    "use_distributed_sampler": False,  # the loader shards by rank itself
                    "log_every_n_steps": 1,
                    "enable_progress_bar": sys.stdout.isatty(),
                    "enable_model_summary": False,  # its one useful line is announced instead
                },
                parser_kwargs={"prog": PROGRAM, "default_env": False},
                args=args,
            )
        except MisconfigurationException as error:
            raise ConfigError(str(error)) from error

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {name: skipped for name, skipped in super().subcommands().items() if name in self._wanted}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        keys = [action.dest for sub in self._subcommand_parsers.values() for action in sub._actions]
        for each in (parser, *self._subcommand_parsers.values()):
            each.known_keys = keys  # type: ignore[attr-defined]

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = Parser(**kwargs, allow_abbrev=False)  # a shortened key is more often a slip than meant
        parser.add_argument("-c", "--config", action="config", help="A YAML file; later ones win. May be repeated.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--baseline", type=bool, default=False, help="fit: validate before training as well.")
        parser.add_lightning_class_args(SampleWriter, "samples")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        # An instance, which the signature's default is, could not be written to the run's config.yaml.
        parser.set_defaults({"model.algorithm": {"class_path": "stateset_lightning.algorithm.GRPO"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        remember(self.config.as_dict())  # also what defaults and configs of single keys hold

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would merge a checkpoint's hyperparameters over the flags, a new rate too."""

    def before_fit(self) -> None:
        config = self.config.fit
        if config.ckpt_path is not None:
            self._set_checkpoint(continue_run(self.trainer, config.ckpt_path))
        if config.baseline and not config.ckpt_path:
            # All data is read before any model is loaded, also what the baseline itself does not need.
            if self.datamodule.tokenizer is None:
                self.datamodule.tokenizer = self.model.tokenizer
            self.datamodule.setup("fit")
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def _find_checkpoint(self) -> None:
        path = self.config[self.subcommand].ckpt_path
        if path is not None:
            self._set_checkpoint(find_checkpoint(self.trainer, path))
            # A run of its own has a folder of its own, and keeps no best checkpoints.
            warnings.filterwarnings("ignore", "The dirpath has changed from")

    before_validate = before_test = before_predict = _find_checkpoint

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        # the Trainer's own checks of its arguments
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: {error}") from error

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what a constructor raised into a list of all types that did not fit.
            cause: BaseException = error
            while not isinstance(cause, UserError) and isinstance(cause.__cause__, ValueError | TypeError):
                cause = cause.__cause__
            if isinstance(cause, UserError):
                raise cause from error
            if cause is error:
                raise
            raise ConfigError(
                f"a class of the config refuses its arguments: {type(cause).__name__}: {cause}"
            ) from error

    def after_instantiate_classes(self) -> None:
        if self.trainer.strategy.launcher is None:  # else the other ranks are started with this command line
            sys.argv[1:] = map(redacted_text, sys.argv[1:])  # W&B records it

    def _set_checkpoint(self, path: str | None) -> None:
        """Lightning runs with the instantiated config, and the other one is saved."""
        self.config[self.subcommand].ckpt_path = self.config_init[self.subcommand].ckpt_path = path
