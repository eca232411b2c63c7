"""`stateset-lightning generate`: try a checkpoint or a model on a prompt, or line by line.

Where the run's environment answers, each prompt is played to its end, as in an evaluation.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from stateset_lightning.cli.arguments import Arguments, loading_options, with_flags
from stateset_lightning.errors import ConfigError, DataError, UserError
from stateset_lightning.threads import heartbeat


def main(words: Sequence[str]) -> None:
    """Runs the command with the words that follow it.

    Raises:
        UserError: If an option, the checkpoint or the prompt cannot be used.
    """
    parser = Arguments("generate", "Try a checkpoint, or any model, on a prompt, or in a conversation that it begins.")
    source = "a checkpoint of a run, `last` or `best` (below runs/), a run's folder, a model folder, or a hub id"
    parser.add_argument("--ckpt_path", required=True, metavar="CKPT", help=source)
    parser.add_argument("--prompt", help="what to ask; or a row as JSON. Without it, standard input has one per line")
    samples = "completions to sample; without it, one greedy completion, unless a temperature or top-p is given"
    parser.add_argument("--samples", type=int, help=samples)
    parser.add_argument("--temperature", type=float, help="of sampling; by default that of training")
    parser.add_argument("--top_p", type=float, help="of sampling; by default that of training")
    parser.add_argument("--max_new_tokens", type=int, help="by default as in training")
    parser.add_argument("--system_prompt", help="instead of the run's")
    parser.add_argument("--seed", type=int, help="of sampling; by default the run's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    parser.add_loading_options()
    options = parser.parse_args(words)
    if options.samples is not None and options.samples < 1:
        raise ConfigError(f"--samples={options.samples} must be at least 1")
    import torch  # not for `--help`

    from stateset_lightning.cli.trained import load_trained
    from stateset_lightning.data.loader import Prompts
    from stateset_lightning.data.sources import read_split
    from stateset_lightning.environments.player import Player
    from stateset_lightning.policy import Policy
    from stateset_lightning.rewards import Scorer
    from stateset_lightning.rollout import InProcessEngine
    from stateset_lightning.training.collect import Sampler
    from stateset_lightning.types import read_literal

    trained = load_trained(options.ckpt_path, options.config, loading_options(options))
    names = ("temperature", "top_p", "max_new_tokens")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    rollout = replace(trained.rollout, **given, keep_sampling_mask=False)
    greedy = options.samples is None and options.temperature is None and options.top_p is None
    num_samples = options.samples or 1
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Nothing is scored, so packed scoring, which would be faster, need not be probed.
    try:
        policy = Policy(trained.model.to(device), replace(trained.policy, scoring="padded"))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error
    encoder, environment = trained.encoder(options.system_prompt), trained.environment()
    engine, scorer, player = InProcessEngine(trained.tokenizer), Scorer(lambda turns, context: 0.0), None
    if environment is not None:
        plain = Player.of(environment, rollout, None, trained.tokenizer, lambda turn, taken: None)
        player = replace(plain, encoder=encoder)
    sampler = Sampler(engine, scorer, rollout, trained.seed if options.seed is None else options.seed, player=player)
    trained_with = trained.checkpoint.get("stateset", {}).get("longest", 0)
    trained_with = trained_with if environment is None else policy.context_length or 0

    def answer(prompt: str, number: int) -> None:
        row = read_literal(prompt) if environment is not None else None
        rows = [row if isinstance(row, dict) else {"id": str(number), "prompt": prompt}]
        scenarios = read_split(rows, "generate", are_scripts=bool(environment and environment.are_scripts)).scenarios
        encoded = encoder.encode(scenarios, "generate")
        prompts = Prompts(scenarios, encoded.tokens, encoder.system_prompt, encoded.opened)
        batch = prompts.batch([*range(len(scenarios))], [number] * len(scenarios), "generate", episode_index=0)
        policy.prepare_for(max(int(encoded.tokens.lengths.max()) + rollout.max_new_tokens, trained_with))
        sample = sampler.sample(policy, batch, num_samples, greedy=greedy)
        texts = list(map(_played, sample.told)) or sample.rollout.texts
        for i, text in enumerate(map(_shown, texts), start=1):
            print(f"[{i}] {text}" if num_samples > 1 else text, flush=True)
        for failure in sample.scores.failures:
            raise DataError(f"the environment failed: {failure.error}: {failure.message}; --prompt takes a row as JSON")

    if options.prompt is not None:
        answer(options.prompt, 0)
        return
    heartbeat.stop()  # from here on, the user is waited for
    for number, prompt in enumerate(_prompts()):
        try:
            answer(prompt, number)
        except UserError as error:  # a prompt that is too long, say: the next one may do
            print(f"error: {with_flags(str(error))}", file=sys.stderr)


def _played(told: dict[str, Any]) -> str:
    """All turns of a conversation, and what became of it, in the words of predictions."""
    turns = [f"[{turn['role']}] {turn['content']}" for turn in told["turns"]]
    end = [f"{name}={told[name]}" for name in ("ended_by", "num_turns", "environment_reward")]
    return "\n".join([*turns, f"[end] {', '.join(end)}"])


def _shown(text: str) -> str:
    """A completion as a terminal may have it: without the sequences that would control it."""
    if not sys.stdout.isatty():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def _prompts() -> Iterator[str]:
    """A prompt per line: in a terminal up to an empty one, of a pipe or a file all lines that are not blank."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused, the next one may do
        yield from filter(None, map(str.strip, sys.stdin))
        return
    print("a prompt per line; an empty line or Ctrl-D ends")
    with suppress(EOFError):
        while prompt := input("> ").strip():
            yield prompt
