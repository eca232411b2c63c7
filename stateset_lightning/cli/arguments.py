"""Arguments of the commands that are not LightningCLI's."""

import argparse
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from stateset_lightning.cli.messages import PROGRAM
from stateset_lightning.errors import ConfigError

if TYPE_CHECKING:
    from stateset_lightning.policy import LoadingOptions


class Arguments(argparse.ArgumentParser):
    """The parser of a command; it reports an error in one line, as `ConfigError`."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"{PROGRAM} {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def add_loading_options(self) -> None:
        """The run's config, and the flags of `LoadingOptions`: which code a model runs with is the user's to say, and
        not a checkpoint's.
        """
        self.add_argument("--config", help="the run's resolved config; by default its folder's, which runs no code")
        self.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
        self.add_argument("--revision", help="branch, tag or commit of a Hugging Face id; never the checkpoint's own")
        self.add_argument("--attn_implementation", metavar="NAME", help="attention of transformers (sdpa, eager, ...)")
        self.add_argument("--model_kwargs", type=_mapping, default={}, metavar="JSON", help="more for from_pretrained")


def loading_options(options: argparse.Namespace) -> "LoadingOptions":
    """What the user has given of `add_loading_options`."""
    from stateset_lightning.policy import LoadingOptions  # not for `--help`: it imports torch

    return LoadingOptions(**{name: getattr(options, name) for name in vars(LoadingOptions())})


def with_flags(message: str) -> str:
    """A message that names keys of a config, with the flags that a command without one has for them."""
    message = message.replace("model.policy.model_name", "--ckpt_path").replace("model.rollout.", "--")
    return message.replace("data.system_prompt", "--system_prompt").replace("data.generate", "--prompt")


def _mapping(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"""{text} must be a JSON object, such as '{{"variant": "fp16"}}'""")
