"""`stateset-lightning convert`: the YAML of StateSet Agents' guide -> a config that `fit` runs.

The guide's YAML has the sections `agent`, `environment` and `training`; guide.yaml holds what becomes of their keys.
Whatever is not carried over is named, with the reason. With `max_turns` above 1 it is one of conversations, else of
single turns.
"""

import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import MinLen
from pydantic import BeforeValidator, FiniteFloat, StrictBool, StrictInt, StrictStr, TypeAdapter

from stateset_lightning.cli.arguments import Arguments
from stateset_lightning.cli.overlays import merge, nested, read_yaml
from stateset_lightning.errors import ConfigError
from stateset_lightning.files import atomic_write
from stateset_lightning.redaction import redacted

SECTIONS = ("agent", "environment", "training")
SCENARIOS = "environment.scenarios"
TURNS = "environment.max_turns", "training.max_turns"

KINDS: dict[str, Any] = {"text": StrictStr, "true or false": StrictBool, "a whole number": StrictInt}
# Read as text, of which true is no number.
KINDS |= {"a number": Annotated[FiniteFloat, BeforeValidator(str)], "a mapping of keys": dict[Any, Any]}
KINDS |= {"a list of scenarios, each with its user_responses": Annotated[list[dict[Any, Any]], MinLen(1)]}


def main(words: Sequence[str]) -> None:
    """Runs the command: the config goes to a file or standard output, the notes to standard error.

    Raises:
        ConfigError: If the guide's file cannot be converted, or the output is there already.
    """
    parser = Arguments("convert", "Turn the guide's YAML, single-turn or multi-turn, into a config that `fit` runs.")
    parser.add_argument("guide", help="a YAML file with agent, environment and training")
    parser.add_argument("-o", "--output", type=Path, help="the config to write; by default standard output")
    options = parser.parse_args(words)
    keys = ", ".join(SECTIONS)
    guide = read_yaml(options.guide, options.guide, f"the keys {keys}")
    if not guide.keys() >= set(SECTIONS):
        raise ConfigError(f"{options.guide}: must hold the keys {keys}, but holds {', '.join(map(str, guide))}")
    config, notes = convert(guide)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=140)
    if options.output is None:
        print(text, end="")
    elif options.output.exists():
        raise ConfigError(f"--output {options.output}: the file is there already; remove it or choose another name")
    else:
        with atomic_write(options.output) as file:
            file.write(text.encode())
        print(f"stateset-lightning fit --config {options.output}")
    for note in notes:
        print(note, file=sys.stderr)


def convert(guide: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config of this package from one of the guide.

    Args:
        guide: What the guide's YAML holds.

    Returns:
        The config, and a line for each key that is not carried over and each choice that the guide leaves open.

    Raises:
        ConfigError: If it lacks a model or scenarios, does not say how many turns there are, or a value is of the wrong
            kind.
    """
    known = yaml.safe_load(files(__package__).joinpath("guide.yaml").read_text(encoding="utf-8"))
    given = dict(_flat(guide))
    looked_at = {SCENARIOS, *known["carried"], *known["accepted"], *known["precision"]}
    left_out = redacted({key: value for key, value in given.items() if key not in looked_at})
    reasons, unknown = known["reasons"], known["unknown"]
    notes = [f"{key}={value!r:.60} is not carried over: {reasons.get(key, unknown)}" for key, value in left_out.items()]
    for key, values in known["accepted"].items():
        if given.get(key, values[-1]) not in values:
            raise ConfigError(f"{key}={given[key]!r} must be {' or '.join(map(repr, values))}, or left out")
    scenarios = _checked(SCENARIOS, given.get(SCENARIOS), "a list of scenarios, each with its user_responses")
    for key, remedy in known["required"].items():
        if given.get(key) is None:
            raise ConfigError(f"{key} is missing: {remedy} to train")
    config: dict[str, Any] = known["config"]
    turns = {_checked(key, given[key], "a whole number") for key in TURNS if given.get(key) is not None}
    is_multi = max(turns, default=1) > 1
    if len(turns) > 1 or given.get("agent.type", "") in (("Agent", "agent") if is_multi else ("MultiTurnAgent",)):
        said = ", ".join(f"{key}={given[key]}" for key in ("agent.type", *TURNS) if given.get(key) is not None)
        raise ConfigError(f"{said}: give one max_turns, above 1 for a MultiTurnAgent and 1 (or none) for an Agent")
    prompts = sum(len(row["user_responses"]) if isinstance(row.get("user_responses"), list) else 1 for row in scenarios)
    if is_multi:
        prompts, config["trainer"]["logger"]["init_args"]["name"] = len(scenarios), "multi_turn"
    config["data"] = {"train": scenarios, "batch_size": min(8, prompts)}  # where the guide names none
    wanted = [key for key in known["precision"] if _checked(key, given.get(key, False), "true or false")]
    if len(wanted) > 1:
        raise ConfigError(f"{' and '.join(wanted)} are both true: leave one of them out")
    for key in wanted:
        config["trainer"]["precision"] = known["precision"][key]
    for key, (ours, kind) in known["carried"].items():
        if given.get(key) is not None:
            config = merge(config, nested(ours, _checked(key, given[key], kind)))
    notes += known["notes"]
    if given.get("training.learning_rate") is None:
        notes.append("model.optimizer.init_args.lr is 1e-5: training.learning_rate is not given")
    return config, notes


def _flat(guide: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """`agent.model_name` and so on; other sections as they are."""
    for section, content in guide.items():
        if section in SECTIONS:
            content = _checked(section, content, "a mapping of keys")
            yield from ((f"{section}.{name}", value) for name, value in content.items())
        else:
            yield str(section), content


def _checked(key: str, value: Any, kind: str) -> Any:
    """The value as its kind. YAML 1.1 takes `5e-5` for text; here it is the number that was meant."""
    try:
        return TypeAdapter(KINDS[kind]).validate_python(value)
    except ValueError:
        raise ConfigError(f"{key}={value!r:.60} must be {kind}") from None
