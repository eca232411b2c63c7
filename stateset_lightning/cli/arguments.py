"""Arguments of the commands that are not LightningCLI's."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from stateset_lightning.cli.messages import PROGRAM
from stateset_lightning.errors import ConfigError

if TYPE_CHECKING:
    from stateset_lightning.policy import LoadingOptions


class Arguments(argparse.ArgumentParser):
    """The parser of a command of arguments.yaml; it reports an error in one line, as `ConfigError`."""

    def __init__(self, command: str) -> None:
        known = yaml.safe_load(files(__package__).joinpath("arguments.yaml").read_text(encoding="utf-8"))[command]
        super().__init__(prog=f"{PROGRAM} {command}", description=known["description"], allow_abbrev=False)
        for name, kind in _TYPES.items():
            self.register("type", name, kind)
        for names, options in {**known["arguments"], **known.get("loading", {})}.items():
            self.add_argument(*names.split(), **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def loading_options(options: argparse.Namespace) -> LoadingOptions:
    """What the user has given of `loading` in arguments.yaml."""
    from stateset_lightning.policy import LoadingOptions  # not for `--help`: it imports torch

    return LoadingOptions(**{name: getattr(options, name) for name in vars(LoadingOptions())})


def with_flags(message: str) -> str:
    """A message that names keys of a config, with the flags that a command without one has for them."""
    message = message.replace("model.policy.model_name", "--ckpt_path").replace("model.rollout.", "--")
    return message.replace("data.system_prompt", "--system_prompt")


def _count(text: str) -> int:
    """A type of argument: a whole number, at least 1."""
    if not text.isdigit() or text == "0":
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def _mapping(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"""{text} must be a JSON object, such as '{{"variant": "fp16"}}'""")


_TYPES = {"count": _count, "mapping": _mapping, "integer": int, "number": float, "path": Path}
