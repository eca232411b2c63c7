"""LightningCLI with this package's parser, errors and default callbacks.

Importing this file imports Lightning, which takes seconds.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import re
import sys
from datetime import timedelta
from typing import Annotated, Any, NoReturn

import yaml
from annotated_types import Ge, Le
from jsonargparse import _typehints, set_parsing_settings
from jsonargparse.typing import register_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from stateset_lightning.callbacks import ConsoleProgress, PredictionWriter, RunSummary, SampleWriter
from stateset_lightning.cli.early_checks import Merged
from stateset_lightning.cli.messages import PROGRAM, explain, options, refusal
from stateset_lightning.cli.overlays import dump_yaml
from stateset_lightning.datamodule import ScenarioDataModule
from stateset_lightning.errors import ConfigError, UserError, one_line
from stateset_lightning.files import atomic_write, check_output, writing
from stateset_lightning.module import GRPOLightningModule
from stateset_lightning.redaction import json_text, redacted, redacted_text, remember
from stateset_lightning.run.find_checkpoint import continue_run
from stateset_lightning.run.folder import CONFIGS, ENVIRONMENT, config_file, continues
from stateset_lightning.run.made_of import KINDS, accepted
from stateset_lightning.run.system import environment
from stateset_lightning.training.checks import checks_before_weights

# Two ties to private functions of jsonargparse 4.53; tests/cli/test_config.py fails when they change. By itself it
# takes what YAML reads as null, `####` or `~`, for no value, and keeps all options of a default's class that the class
# chosen now has too: GSPO would clip at GRPO's bounds, a thousand times its own.
_parse_as_yaml = _typehints.parse_value_or_config


def keep_text(value: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Text stays text, unless it is literally null."""
    parsed, path = _parse_as_yaml(value, *args, **kwargs)
    return (value if parsed is None and isinstance(value, str) and value != "null" else parsed), path


def start_anew(parser_or_action: Any, previous: Any, value: Any) -> None:
    """Another class than the default's starts from its own defaults."""
    if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
        previous.pop(_typehints.subclasses_disabled_meta_key, None)  # of a dataclass: the class chosen now has a path
        for name in list(vars(previous["init_args"])):
            del previous["init_args"][name]


def interval(text: Any) -> timedelta:
    """A time as DD:HH:MM:SS, which Lightning's other options take, or as Python writes it: [D days, ]H:MM:SS.

    jsonargparse would take the first three numbers of either for hours, minutes and seconds.
    """
    found = re.fullmatch(r"(?:(\d+)(?: days?, |:))?(\d+):(\d+):(\d+(?:\.\d+)?)", str(text))
    if found is None:
        raise ValueError(f"{text} is no time")
    days, hours, minutes, seconds = (float(number or 0) for number in found.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


register_type(timedelta, str, interval, fail_already_registered=False)
_typehints.parse_value_or_config = keep_text
_typehints.discard_init_args_on_class_path_change = start_anew


_NO_CLASS = "model and data take options, and no class: a subclass runs from Python, by Trainer(...).fit(MyModule(...))"


class Parser(LightningArgumentParser):
    """Reports an error in a few lines, without the usage of some hundred options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a nested class: its message becomes part of the outer one's
            super().error(message, ex)
        raise UserError(one_line(redacted_text(message)))  # before a secret is cut in two

    def add_lightning_class_args(self, lightning_class: Any, nested_key: str, *args: Any, **kwargs: Any) -> list[str]:
        if lightning_class is ScenarioDataModule:
            # With sub-configs, `data.train: rows.json` would be read while parsing, as if it held the key's own value.
            return self.add_class_arguments(lightning_class, nested_key, fail_untyped=False, instantiate=True)
        return super().add_lightning_class_args(lightning_class, nested_key, *args, **kwargs)


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config, and what it runs on, to the run's own folder.

    Also with W&B, where Lightning would write to a `log_dir` that all runs share. Not before a checkpoint was accepted:
    a resume that is refused must leave the run's config as it was.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        file = config_file(trainer)
        config = redacted(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
        # The resolved config of a second command in the same folder (a baseline, then `fit`) is the same one; that of
        # the run may be what it is resumed with.
        is_runs = file.name != CONFIGS[0] or (trainer.ckpt_path is not None and continues(trainer, ""))
        with atomic_write(file, over_input=is_runs) as opened:
            opened.write(dump_yaml(config).encode())
        if trainer.loggers:  # else it would stand among the user's own files
            with atomic_write(file.with_name(ENVIRONMENT)) as opened:
                opened.write(json_text(environment(trainer), indent=1).encode())
        check_output(file.with_name("hparams.yaml"))  # which Lightning's loggers write there
        with writing(file.parent):
            for logger in trainer.loggers:
                logger.log_hyperparams(config)


class StatesetCLI(LightningCLI):
    """LightningCLI with this package's parser, errors and default callbacks.

    Args:
        words: The command line, without the program's name.
        merged: What its words say.

    Raises:
        UserError: For whatever the user can mend.
    """

    def __init__(self, words: list[str], merged: Merged) -> None:
        self._command = words[0]
        self.given, self._rest = merged
        set_parsing_settings(docstring_parse_attribute_docstrings=any("help" in word or word == "-h" for word in words))
        progress = [RunSummary()] if sys.stdout.isatty() else [RunSummary(), ConsoleProgress()]
        try:
            super().__init__(
                GRPOLightningModule,
                ScenarioDataModule,
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
                args=words,
            )
        except MisconfigurationException as error:
            raise ConfigError(str(error)) from error

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # Each parser takes most of a second to build, and attribute docs as long to collect: only what is needed.
        return {self._command: super().subcommands()[self._command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        for section in (self.given.get("model"), self.given.get("data")):
            named = section.keys() & {"class_path", "init_args"} if isinstance(section, dict) else [section]
            if any(isinstance(name, str) and re.fullmatch(r"(\w+\.)*\w+", name) for name in named):
                raise ConfigError(_NO_CLASS)
        known = self._parser(self._command)
        list(options(known, self.given))  # gives nulls their meaning
        try:
            super().parse_arguments(parser, [self._command, "--config", dump_yaml(self.given), *self._rest])
        except UserError as error:
            raise ConfigError(explain(known, self.given) or str(error)) from error

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        seed = Annotated[int, Ge(0), Le(2**32 - 1)] | bool
        parser.add_argument("--seed_everything", type=seed, default=42, help="Of all randomness; true: a random one.")

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = Parser(**kwargs, allow_abbrev=False)  # a shortened key is more often a slip than meant
        parser.add_argument("-c", "--config", action="config", help="A YAML file; later ones win. May be repeated.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--baseline", type=bool, default=False, help="fit: validate before training as well.")
        parser.add_argument("--accept_changes", type=str | list[str] | None, help=f"fit: of {', '.join(KINDS)}.")
        parser.add_lightning_class_args(SampleWriter, "samples")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        # An instance, which the signature's default is, could not be written to the run's config.yaml.
        parser.set_defaults({"model.algorithm": {"class_path": "stateset_lightning.algorithm.GRPO"}})

    def before_instantiate_classes(self) -> None:
        remember(self.config.as_dict())  # also what defaults and configs of single keys hold

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would merge a checkpoint's hyperparameters over the flags, a new rate too."""

    def before_fit(self) -> None:
        config = self.config.fit
        self.model.accept_changes = accepted(config.accept_changes)
        # For this once: the run's config serves later resumes, too.
        config.accept_changes = self.config_init.fit.accept_changes = None
        if config.ckpt_path is not None:
            # Lightning runs with the instantiated config, and the other one is saved.
            config.ckpt_path = self.config_init.fit.ckpt_path = continue_run(self.trainer, config.ckpt_path)
        if config.baseline and not config.ckpt_path:
            # All data is read before any model is loaded, also what the baseline itself does not need. How it is read
            # depends on the module.
            self.trainer.strategy.connect(self.model)
            self.datamodule.trainer = self.trainer
            self.datamodule.setup("fit")
            for check in checks_before_weights(self.datamodule, self.model):
                check()
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def before_validate(self) -> None:
        self.model.folder_kind = "evaluation"

    before_test = before_predict = before_validate

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.refused: tuple[type, Exception] | None = None
        self.parser.add_instantiator(self._make, object)

    def _make(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        """Makes an object; what its class raises, jsonargparse would hide behind types that do not fit."""
        try:
            return cls(*args, **kwargs)
        except Exception as error:
            self.refused = cls, error
            raise

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            by = (Trainer, error) if hasattr(self, "model") else self.refused or (GRPOLightningModule, error)
            told = refusal(*by, self._parser(self.subcommand), self.given)
            if told in (None, error):
                raise
            raise told from error

    def after_instantiate_classes(self) -> None:
        if self.trainer.strategy.launcher is None:  # else the other ranks are started with this command line
            sys.argv[1:] = map(redacted_text, sys.argv[1:])  # W&B records it
