"""The files of a run -> what its page shows, bounded in size whatever the run's length."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import yaml

from stateset_lightning.cli.messages import class_name
from stateset_lightning.errors import ConfigError, told_as
from stateset_lightning.files import read_lines, read_table
from stateset_lightning.run.folder import CONFIGS, ENVIRONMENT, METRICS, SAMPLES

SPLITS = ("train", "validation", "test")

# Points of a curve; of longer ones, means of equally many neighbours.
MAX_POINTS = 1500
MOST = {"episodes": 60, "prompts": 60, "evaluations": 12}  # of each split
MAX_SAMPLE_BYTES = 6_000_000
# Characters of a prompt or completion.
MAX_TEXT = 6_000

Item = TypeVar("Item")
Place = tuple[str, str, Any]  # kind, split, value


def read_run(folder: Path) -> dict[str, Any]:
    """All that the page shows, as JSON holds it.

    Returns:
        `metrics`: name -> [steps, values]; `train`: groups by episode; `evaluations`: prompts with a completion per
        evaluation; `shown`: of episodes, prompts and evaluations [how many are shown, how many there are]; `config`:
        YAML text; `environment`; `missing`: files that are not there.

    Raises:
        ConfigError: If the folder holds no run, or its config or environment is damaged.
    """
    _check_folder(folder)
    config = next((name for name in CONFIGS if (folder / name).is_file()), CONFIGS[0])
    missing = [name for name in (METRICS, SAMPLES, config, ENVIRONMENT) if not (folder / name).is_file()]
    return {
        "run": "/".join(folder.absolute().parts[-2:]),
        "metrics": {} if METRICS in missing else _read_metrics(folder / METRICS),
        **({"train": [], "evaluations": [], "shown": {}} if SAMPLES in missing else _read_samples(folder / SAMPLES)),
        "config": "" if config in missing else _text(folder / config),
        "facts": {} if config in missing else _facts(_parsed(folder / config, yaml.safe_load) or {}),
        "environment": {} if ENVIRONMENT in missing else _parsed(folder / ENVIRONMENT, json.loads),
        "missing": missing,
    }


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: give a run's, such as runs/single_turn/version_0")
    # A run's first rows come minutes after its folder and its config, where a model is large.
    files = (METRICS, SAMPLES, ENVIRONMENT, *CONFIGS)
    if any((folder / name).is_file() for name in files) or re.match(r"version_\d", folder.absolute().name):
        return
    runs = [*folder.glob("version_*"), *folder.glob("*/version_*")]
    newest = max(runs, key=lambda run: run.stat().st_mtime, default=None)
    hint = f"; did you mean {newest}?" if newest else ": fit writes them with a CSVLogger and the samples callback"
    raise ConfigError(f"{folder} holds no run: there is neither {METRICS} nor {SAMPLES} in it{hint}")


# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def _read_metrics(path: Path) -> dict[str, list[list[float]]]:
    """Steps and values by name; of several values of a step, the last one. What is no finite number is left out."""
    columns: dict[str, dict[int, float]] = {}
    for _, row in read_table(path, "step"):
        for name in row.keys() - {"step", "epoch"}:
            with suppress(ValueError):  # an empty cell
                if math.isfinite(value := float(row[name])):
                    columns.setdefault(name, {})[int(float(row["step"]))] = value
    return {name: _binned(sorted(points.items())) for name, points in sorted(columns.items())}


def _binned(points: Sequence[tuple[int, float]]) -> list[list[float]]:
    """[steps, values], averaged over neighbours where there are more than `MAX_POINTS`; each mean stands at its last
    step.
    """
    size = math.ceil(len(points) / MAX_POINTS)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    return [[part[-1][0] for part in bins], [float(f"{fmean(value for _, value in part):.6g}") for part in bins]]


# Samples
# ---------------------------------------------------------------------------------------------------------------------


def _read_samples(path: Path) -> dict[str, Any]:
    """Groups of training, prompts of evaluations, and of how many episodes, prompts and evaluations they are.

    Two passes: the file is larger than what is shown of it.
    """
    there = dict.fromkeys(place for _, _, row in read_lines(path, _sample) for place in _places(row))
    chosen = set[Place]()
    for kind, split in product(MOST, SPLITS):
        chosen.update(_spread([place for place in there if place[:2] == (kind, split)], MOST[kind]))
    rows = [row for _, _, row in read_lines(path, _sample) if chosen.issuperset(_places(row))]
    groups, evaluated = dict[Any, dict[str, Any]](), dict[Any, dict[str, Any]]()
    for row in sorted(rows, key=itemgetter("step")):
        split, step = row["split"], row["step"]
        if split == "train":
            place = {"step": step, "episode": row["episode"]}
            group = groups.setdefault((*place.values(), row["id"]), {**_heading(row), **place, "completions": []})
            group["completions"].append(_completion(row))
        else:
            prompt = evaluated.setdefault((split, row["id"]), {**_heading(row), "split": split, "completions": {}})
            prompt["completions"][step] = {"step": step, **_completion(row)}
    for prompt in evaluated.values():
        prompt["completions"] = list(prompt["completions"].values())
    train = _within(list(groups.values()))
    shown = {kind: [sum(kind == place[0] for place in places) for places in (chosen, there)] for kind in MOST}
    shown["episodes"][0], shown["prompts"][0] = len({group["episode"] for group in train}), len(evaluated)
    return {"train": train, "evaluations": _within(list(evaluated.values())), "shown": shown}


def _places(row: Mapping[str, Any]) -> list[Place]:
    """What a row is part of: of each kind, there may be more than is shown."""
    if row["split"] == "train":
        return [("episodes", "train", (row["step"], row["episode"]))]
    return [("prompts", row["split"], row["id"]), ("evaluations", row["split"], row["step"])]


def _sample(line: str) -> dict[str, Any]:
    row = json.loads(line, parse_constant=lambda _: None)  # NaN and inf
    kinds = {"step": int, "id": str, "completion": str, **({"episode": int} if row["split"] == "train" else {})}
    if row["split"] not in SPLITS or not all(isinstance(row[name], kind) for name, kind in kinds.items()):
        raise ValueError("not what the samples callback writes")
    return dict(row)


def _heading(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("id", "topic", "target")} | {"prompt": _cut(row.get("prompt", ""))}


_KEPT = ("reward", "rewards", "advantage", "finish_reason", "num_tokens", "breakdown", "errors", "tokens")
_PER_TOKEN = ("logprobs", "logprobs_after", "ref_logprobs")


def _completion(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in _KEPT if row.get(name) is not None}
    for name in filter(row.__contains__, _PER_TOKEN):
        kept[name] = [None if value is None else round(value, 3) for value in row[name]]
    return {"text": _cut(row["completion"]), **kept}


def _cut(text: str) -> str:
    more = len(text) - MAX_TEXT
    return text if more <= 0 else f"{text[:MAX_TEXT]} … ({more} more characters in {SAMPLES})"


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many items at most, evenly spread, the first and the last among them."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def _within(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evenly spread items that take `MAX_SAMPLE_BYTES` at most."""
    while len(items) > 2 and len(json.dumps(items)) > MAX_SAMPLE_BYTES:
        items = _spread(items, len(items) // 2)
    return items


# Config and environment
# ------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    with told_as(ConfigError, f"{path}: cannot be read as {path.suffix[1:].upper()}: ", ValueError, yaml.YAMLError):
        return parse(_text(path))


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Model, algorithm, rewards and data in a word each."""
    model, data = (config.get(name) or {} for name in ("model", "data"))
    policy, rewards = model.get("policy"), model.get("reward") or []
    facts = {
        "model": policy.get("model_name") if isinstance(policy, dict) else policy,
        "algorithm": class_name(model.get("algorithm")),
        "reward": ", ".join(map(class_name, rewards if isinstance(rewards, list) else [rewards])),
        "data": data.get("train") if isinstance(data.get("train"), str) else None,
    }
    return {name: value for name, value in facts.items() if value}
