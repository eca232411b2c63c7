"""`stateset-lightning generate`: try a checkpoint or a model on a prompt, or line by line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from stateset_lightning.errors import ConfigError, UserError

if TYPE_CHECKING:
    from stateset_lightning.policy import LoadingOptions


class Arguments(argparse.ArgumentParser):
    """Reports an error in a line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `LoadingOptions`: which code a model runs with is for the user to say, never for a checkpoint."""
    add: Any = parser.add_argument
    add("--trust_remote_code", action="store_true", help="run code that comes with the model; a checkpoint cannot ask for that itself")
    add("--revision", help="branch, tag or commit of a Hugging Face id; never the checkpoint's own")
    add("--attn_implementation", metavar="NAME", help="attention of transformers (sdpa, eager, ...); by default the model's")
    add("--model_kwargs", type=_mapping, default={}, metavar="JSON", help="further arguments of from_pretrained, as a JSON object")


def loading_options(options: argparse.Namespace) -> LoadingOptions:
    """What the user has given of them."""
    from stateset_lightning.policy import LoadingOptions

    return LoadingOptions(options.revision, options.attn_implementation, options.trust_remote_code, options.model_kwargs)


def main(words: Sequence[str]) -> None:
    """Runs the subcommand with the words that follow it.

    Raises:
        UserError: If an option, the checkpoint or the prompt cannot be used.
    """
    options = _parser().parse_args(words)
    import torch  # not for `--help`

    from stateset_lightning.policy import Policy
    from stateset_lightning.rollout import InProcessEngine
    from stateset_lightning.trained import load_trained

    trained = load_trained(options.ckpt_path, options.config, loading_options(options))
    given = {name: value for name in ("temperature", "top_p", "max_new_tokens") if (value := getattr(options, name)) is not None}
    rollout = replace(trained.rollout, **given)
    greedy = options.samples is None and options.temperature is None and options.top_p is None
    count = 1 if options.samples is None else options.samples
    seed = trained.seed if options.seed is None else options.seed
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Nothing is scored, so the faster way to do that need not be probed.
    engine = InProcessEngine(trained.tokenizer)
    engine.sync(Policy(trained.model.to(device), replace(trained.policy, scoring="padded")))
    encoder = trained.encoder(options.system_prompt)

    def answer(prompt: str, number: int) -> list[str]:
        from stateset_lightning.seeding import sample_seeds
        from stateset_lightning.types import Scenario

        tokens = encoder.encode([Scenario(id=str(number), prompt=prompt)], "generate").tokens[0]
        return engine.generate([tokens], count, rollout, sample_seeds(seed, "generate", 0, [number], count), greedy=greedy).texts

    if options.prompt is not None:
        _show(answer(options.prompt, 0))
        return
    if sys.stdin.isatty():
        print("a prompt per line; an empty line or Ctrl-D ends")
    number = 0
    while prompt := _line():
        try:
            _show(answer(prompt, number))
        except UserError as error:  # a prompt that is too long, say: the next one may do
            print(f"error: {error}", file=sys.stderr)
        number += 1


def _line() -> str:
    """The next line without its end; empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _show(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts, start=1):
        print(f"[{number}] {text}" if len(texts) > 1 else text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="stateset-lightning generate", description="Try a checkpoint, or any model, on a prompt.", allow_abbrev=False)
    add: Any = parser.add_argument
    add(
        "--ckpt_path",
        required=True,
        metavar="CKPT",
        help="a checkpoint of a run, a model folder, or a Hugging Face id (`tiny`: the bundled one)",
    )
    add("--prompt", help="what to ask; without it, prompts are read line by line")
    add("--samples", type=_count, help="completions to sample; without it, one greedy completion, unless a temperature or top-p is given")
    add("--temperature", type=float, help="of sampling; by default that of training")
    add("--top_p", type=float, help="of sampling; by default that of training")
    add("--max_new_tokens", type=int, help="by default as in training")
    add("--system_prompt", help="instead of the run's")
    add("--config", help="the run's resolved config; by default the one in the run's folder")
    add("--seed", type=int, help="of sampling; by default the run's")
    add("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    add_loading_options(parser)
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or text == "0":
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""{text} must be a JSON object, such as '{{"variant": "fp16"}}'""")
    return value
