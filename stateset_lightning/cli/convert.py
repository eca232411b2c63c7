"""The YAML of StateSet Agents' single-turn guide (`agent`, `environment`, `training`) -> a config that `fit` runs.

Whatever is not carried over is named, with the reason. What cannot be single-turn is refused.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from stateset_lightning.cli.messages import PROGRAM
from stateset_lightning.errors import ConfigError
from stateset_lightning.files import atomic_write
from stateset_lightning.redaction import redacted

_CARRIED: dict[str, tuple[str, type]] = {
    "agent.model_name": ("model.policy.model_name", str),
    "agent.trust_remote_code": ("model.policy.trust_remote_code", bool),
    "agent.max_new_tokens": ("model.rollout.max_new_tokens", int),
    "agent.temperature": ("model.rollout.temperature", float),
    "agent.top_k": ("model.rollout.top_k", int),
    "agent.top_p": ("model.rollout.top_p", float),
    "agent.system_prompt": ("data.system_prompt", str),
    "training.num_episodes": ("trainer.max_steps", int),
    "training.learning_rate": ("model.optimizer.init_args.lr", float),
    "training.weight_decay": ("model.optimizer.init_args.weight_decay", float),
    "training.per_device_train_batch_size": ("data.batch_size", int),
    "training.num_generations": ("model.rollout.num_generations", int),
    "training.beta": ("model.algorithm.init_args.beta", float),
    "training.max_grad_norm": ("trainer.gradient_clip_val", float),
    "training.seed": ("seed_everything", int),
}
_HANDLED = {"agent.type", "environment.type", "environment.scenarios", "environment.max_turns", "training.max_turns"}
_HANDLED |= {"training.bf16", "training.fp16"}
_REASONS = {
    "training.max_steps_per_episode": (
        "an episode here is one batch of prompts, sampled and trained on once (data.num_iterations for more)"
    ),
    "training.gradient_accumulation_steps": (
        "set data.steps_per_episode and trainer.accumulate_grad_batches: the gradient stays the same"
    ),
    "training.output_dir": "set trainer.logger.init_args.save_dir",
    "training.report_to": "add --config configs/wandb.yaml for Weights & Biases",
}
_UNKNOWN = "the guide does not explain it; `stateset-lightning fit --help` lists our keys"
_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
_MOST_PROMPTS = 8


def convert(guide: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config of this kit from one of the guide.

    Args:
        guide: What the guide's YAML holds.

    Returns:
        The config, and a line for each key that is not carried over and each choice that the guide leaves open.

    Raises:
        ConfigError: If it is not single-turn, lacks a model or scenarios, or a value is of the wrong kind.
    """
    given = dict(_flat(guide))
    left_out = {key: value for key, value in given.items() if key not in _CARRIED.keys() | _HANDLED}
    notes = [
        f"{key}={value!r:.60} is not carried over: {_REASONS.get(key, _UNKNOWN)}"
        for key, value in redacted(left_out).items()
    ]
    _check_single_turn(given)
    scenarios = _scenarios(given)
    if given.get("agent.model_name") is None:
        raise ConfigError("agent.model_name is missing: name the model to train")
    config: dict[str, Any] = {
        "seed_everything": 42,
        "model": {
            "policy": {},
            "reward": [{"class_path": "stateset_lightning.rewards.HelpfulnessReward"}],
            "rollout": {},
            "algorithm": {"class_path": "stateset_lightning.algorithm.GRPO", "init_args": {"beta": 0.0}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5, "weight_decay": 0.0}},
        },
        "data": {"train": scenarios, "batch_size": min(_MOST_PROMPTS, _num_prompts(scenarios))},
        "trainer": {"max_epochs": -1, "gradient_clip_val": 1.0, **_precision(given), **_run_files()},
    }
    for key, (ours, kind) in _CARRIED.items():
        if given.get(key) is not None:
            _set(config, ours, _checked(key, given[key], kind))
    notes.append(
        "model.reward is HelpfulnessReward, as in the guide's quick start: its YAML names none; put your own there"
    )
    if "max_steps" not in config["trainer"]:
        raise ConfigError("training.num_episodes is missing: say how many episodes to train")
    if given.get("training.learning_rate") is None:
        notes.append("model.optimizer.init_args.lr is 1e-5: training.learning_rate is not given")
    return config, notes


def main(args: Sequence[str]) -> None:
    """`stateset-lightning convert GUIDE [-o FILE]`: the config to FILE or standard output, the notes to standard
    error.
    """
    parser = argparse.ArgumentParser(
        f"{PROGRAM} convert", description="Turn the guide's YAML into a config that `fit` runs."
    )
    parser.add_argument("guide", help="a YAML file with agent, environment and training")
    parser.add_argument("-o", "--output", type=Path, help="the config to write; by default standard output")
    options = parser.parse_args(args)
    config, notes = convert(read_guide(Path(options.guide)))
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


def read_guide(path: Path) -> dict[str, Any]:
    """The mapping that a file of the guide's form holds.

    Raises:
        ConfigError: If the file cannot be read or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: malformed YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not {"agent", "environment", "training"} <= content.keys():
        found = (
            f"a mapping with the keys {', '.join(map(str, content))}"
            if isinstance(content, dict)
            else repr(content)[:60]
        )
        raise ConfigError(f"{path}: must be a mapping with the keys agent, environment and training, but is {found}")
    return content


def _flat(guide: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """`agent.model_name` and so on; other sections as they are."""
    for section, content in guide.items():
        if section not in ("agent", "environment", "training"):
            yield str(section), content
        elif not isinstance(content, dict):
            raise ConfigError(f"{section}={content!r:.60} must be a mapping of keys")
        else:
            yield from ((f"{section}.{name}", value) for name, value in content.items())


def _check_single_turn(given: dict[str, Any]) -> None:
    for key in ("environment.max_turns", "training.max_turns"):
        if given.get(key, 1) != 1:
            raise ConfigError(
                f"{key}={given[key]!r}: only single-turn tasks can be converted; set it to 1 if one answer ends a"
                " conversation"
            )
    for key, accepted in {
        "agent.type": ("Agent", "agent"),
        "environment.type": ("ConversationEnvironment", "conversation"),
    }.items():
        if given.get(key, accepted[0]) not in accepted:
            raise ConfigError(f"{key}={given[key]!r} is not single-turn: it must be {accepted[1]!r}, or left out")


def _scenarios(given: dict[str, Any]) -> list[dict[str, Any]]:
    scenarios = given.get("environment.scenarios")
    if not isinstance(scenarios, list) or not scenarios or not all(isinstance(row, dict) for row in scenarios):
        raise ConfigError(
            f"environment.scenarios={scenarios!r:.60} must be a list of scenarios, each with its user_responses"
        )
    return scenarios


def _num_prompts(scenarios: list[dict[str, Any]]) -> int:
    return sum(len(row["user_responses"]) if isinstance(row.get("user_responses"), list) else 1 for row in scenarios)


def _precision(given: dict[str, Any]) -> dict[str, str]:
    bf16, fp16 = (_checked(key, given.get(key, False), bool) for key in ("training.bf16", "training.fp16"))
    if bf16 and fp16:
        raise ConfigError("training.bf16 and training.fp16 are both true: leave one of them out")
    return {"precision": "bf16-mixed"} if bf16 else {"precision": "16-mixed"} if fp16 else {}


def _run_files() -> dict[str, Any]:
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs", "name": "single_turn"},
    }
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    return {"logger": logger, "callbacks": [checkpoint]}


def _checked(key: str, value: Any, kind: type) -> Any:
    """The value as `kind`. YAML 1.1 takes `5e-5` for text; here it is the number that was meant."""
    number = _number(value) if kind is float else None
    if number is not None:
        return number
    if kind is float or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{key}={value!r} must be {_KINDS[kind]}")
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[name] = value
