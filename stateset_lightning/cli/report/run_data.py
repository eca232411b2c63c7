"""The files of a run -> what its page shows, bounded in size whatever the run's length."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from stateset_lightning.cli.messages import class_name
from stateset_lightning.errors import ConfigError, one_line
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


def read_run(folder: Path) -> dict[str, Any]:
    """All that the page shows, as JSON holds it.

    Returns:
        `metrics`: name -> [steps, values]; `train`: groups by episode; `evaluations`: prompts with a completion per
        evaluation; `config`: YAML text; `environment`; `missing`: files that are not there.

    Raises:
        ConfigError: If the folder holds no run, or its config or environment is damaged.
    """
    _check_folder(folder)
    files = {name: folder / name for name in (METRICS, SAMPLES, CONFIGS[0], ENVIRONMENT)}
    if not files[CONFIGS[0]].is_file():
        files[CONFIGS[0]] = folder / CONFIGS[1]
    there = {name: path for name, path in files.items() if path.is_file()}
    config = there.get(CONFIGS[0])
    text = "" if config is None else config.read_text(encoding="utf-8", errors="replace")
    train, evaluations, shown = _read_samples(there[SAMPLES]) if SAMPLES in there else ([], [], {})
    return {
        "run": f"{folder.absolute().parent.name}/{folder.absolute().name}",
        "metrics": _read_metrics(there[METRICS]) if METRICS in there else {},
        "train": train,
        "evaluations": evaluations,
        "shown": shown,
        "config": text,
        "facts": {} if config is None else _facts(_parsed(config) or {}),
        "environment": _parsed(there[ENVIRONMENT]) if ENVIRONMENT in there else {},
        "missing": [name for name in files if name not in there],
    }


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: give a run's, such as runs/single_turn/version_0")
    # A run's first rows come minutes after its folder and its config, where a model is large.
    files = (METRICS, SAMPLES, ENVIRONMENT, *CONFIGS)
    if any((folder / name).is_file() for name in files) or re.match(r"version_\d", folder.absolute().name):
        return
    runs = sorted(
        {path.parent for name in (METRICS, SAMPLES) for depth in ("*/", "*/*/") for path in folder.glob(depth + name)},
        key=lambda run: run.stat().st_mtime,
    )
    hint = f"; did you mean {runs[-1]}?" if runs else ": fit writes them with a CSVLogger and the samples callback"
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
    return [
        [part[-1][0] for part in bins],
        [float(f"{sum(value for _, value in part) / len(part):.6g}") for part in bins],
    ]


# Samples
# ---------------------------------------------------------------------------------------------------------------------


def _read_samples(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[int]]]:
    """Groups of training, prompts of evaluations, and of episodes, prompts and evaluations [how many are shown, how
    many there are].

    Two passes: the file is larger than what is shown of it.
    """
    found: dict[str, dict[str, Any]] = {kind: {} for kind in MOST}  # kind -> split -> which there are, in order
    for _, _, row in read_lines(path, _sample):
        for kind, value in _places(row):
            found[kind].setdefault(row["split"], {})[value] = None
    chosen: dict[str, dict[str, Any]] = {
        kind: {split: _spread([*values], MOST[kind]) for split, values in of.items()} for kind, of in found.items()
    }
    groups: dict[Any, dict[str, Any]] = {}
    evaluated: dict[Any, dict[str, Any]] = {}
    for _, _, row in read_lines(path, _sample):
        split, step = row["split"], row["step"]
        # A split may have begun since the first pass, where the run is still going on.
        if not all(value in chosen[kind].get(split, []) for kind, value in _places(row)):
            continue
        if split == "train":
            key = (step, row["episode"], row["id"])
            groups.setdefault(key, {**_heading(row), "step": step, "episode": row["episode"], "completions": []})
            groups[key]["completions"].append(_completion(row))
        else:
            prompt = evaluated.setdefault((split, row["id"]), {**_heading(row), "split": split, "completions": {}})
            prompt["completions"][step] = {"step": step, **_completion(row)}
    train = _within(list(groups.values()))
    for prompt in evaluated.values():
        prompt["completions"] = [prompt["completions"][step] for step in sorted(prompt["completions"])]
    shown = {kind: [sum(map(len, of[kind].values())) for of in (chosen, found)] for kind in MOST}
    shown["episodes"][0], shown["prompts"][0] = len({group["episode"] for group in train}), len(evaluated)
    return train, _within(list(evaluated.values())), shown


def _places(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a row is part of: of each kind, there may be more than is shown."""
    if row["split"] == "train":
        return [("episodes", (row["step"], row["episode"]))]
    return [("prompts", row["id"]), ("evaluations", row["step"])]


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
    kept |= {
        name: [None if value is None else round(value, 3) for value in row[name]] for name in _PER_TOKEN if name in row
    }
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


def _parsed(path: Path) -> Any:
    parse, kind = (json.loads, "JSON") if path.suffix == ".json" else (yaml.safe_load, "YAML")
    try:
        return parse(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as {kind}: {one_line(error, 200)}") from error


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
