"""What `data.train` and its like say -> the scenarios of a split, and which source each one comes from.

A split is a path, a glob, a hub id, a list of rows, or a list of sources. Here the sources are read; the loader mixes
them by their weights.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le

from stateset_lightning.data import content
from stateset_lightning.data.hub import is_hub_id, read_hub
from stateset_lightning.data.reading import READERS, TABLES, read_file
from stateset_lightning.data.reasoning_gym import MAX_SEED, MAX_SIZE, read_task
from stateset_lightning.data.rows import ListRows, Problem, RawRow, Rows, is_stream, is_table, raise_problems
from stateset_lightning.data.scenario_set import NO_ROW_LEFT_OUT, ScenarioSet, ServedScenarios, spare_texts
from stateset_lightning.data.scenarios import Part
from stateset_lightning.data.shapes import LEFT_OUT, QUESTION_COLUMNS, RowOptions, recognise
from stateset_lightning.data.tables import is_saved, read_table, rows_of
from stateset_lightning.errors import ConfigError, DataError, check_bounds
from stateset_lightning.files import keep_inputs
from stateset_lightning.types import Scenario

# Not to `Any`: jsonargparse would read a text in it as YAML, and take what stands in quotes for a number or boolean.
Row = dict[str, str | int | float | bool | list | dict | None]


@dataclass(frozen=True, kw_only=True)
class Source(RowOptions):
    """One of several sources of scenarios: `path`, `rows` or `reasoning_gym`.

    Args:
        path: A file, a folder of `save_to_disk`, a glob, or a hub id (owner/name, owner/name:config or
            owner/name:config:split).
        rows: Scenarios, as a list of mappings; in Python also a data set, an Arrow table or a data frame.
        reasoning_gym: A task of the library of this name (`chain_sum`); `ReasoningGymReward` scores it.
        size: Instances of the task.
        seed: Decides which ones; two seeds have none in common.
        options: The task's own options, such as its difficulty.
        weight: Share of an epoch, relative to the other sources' weights. Without weights every row comes once per
            epoch.
        fields: Our name -> the source's column. A source that has this or one of the next goes without those of `data`.
        format, prompt_template, system_template, row, final_assistant_turn: As those of `data`.
        rewards: Names of the reward functions that score this source's rows; without it all of them do.
        name: What messages and generated ids call this source.
    """

    path: str | None = None
    rows: list[Row] | None = None
    reasoning_gym: str | None = None
    size: Annotated[int, Ge(1), Le(MAX_SIZE)] | None = None
    seed: Annotated[int, Ge(0), Le(MAX_SEED)] = 0
    options: dict[str, Any] | None = None
    weight: Annotated[float, Gt(0)] | None = None
    rewards: list[str] | None = None
    name: str | None = None


# The rows of one file or list: the index of their source, what begins their ids, and what does instead where others
# begin so, too, and the source has no name.
_Found = tuple[int, Rows, str, str]

_ORIGINS = ("path", "rows", "reasoning_gym")
SplitSpec = str | os.PathLike[str] | Sequence[Source | Mapping[str, Any]]


def read_split(
    spec: SplitSpec, split: str, options: RowOptions | None = None, first: int | None = None, are_scripts: bool = False
) -> ScenarioSet:
    """Reads and checks all scenarios of a split.

    Args:
        spec: A path, glob or hub id, a list of rows, or a list of sources.
        split: train, validation, test or predict.
        options: What is said about the columns, for sources that say nothing of their own.
        first: Rows of each file that are looked at, and of no hub or library; None: all.
        are_scripts: Whether a row's `user_responses` are said in one conversation; by default each is a prompt.

    Raises:
        ConfigError: If `spec` or a source is none of these.
        DataError: If a file cannot be read, or rows cannot be used: all of them are listed.
    """
    key = f"data.{split}"
    sources = _as_sources(spec, key)
    options = options or RowOptions()
    parts, checked, problems, sizes = list[Part](), list[tuple[Scenario, str]](), list[Problem](), list[int]()
    read = [(i, source) for i, source in enumerate(sources) if first is None or _is_quick(source, key)]
    lists = [found for i, source in read for found in _row_lists(source, i, len(sources), split)]
    stems = Counter(stem for *_, stem, _ in lists)
    size = sum(rows.num_bytes for _, rows, *_ in lists)
    is_large = sum(len(rows) for _, rows, *_ in lists) > content.LARGE_ROWS or size > content.LARGE_BYTES
    for index, rows, stem, path in lists:
        # Each row is read once, for the shape and for the scenarios; of a large split the first ones are.
        source, readings = sources[index], list(islice(rows, content.SAMPLE if is_large else None))
        if not readings:
            raise DataError(f"{rows.origin} has no rows; give at least one scenario")
        said = RowOptions(format="prompt") if source.reasoning_gym else options.of(vars(source))
        sample = [row for row in readings if isinstance(row, RawRow)]
        shape = recognise(sample, said, str(rows.origin), needs_target=split != "predict")
        part = Part(rows, shape, stem if stems[stem] == 1 else source.name or path, source.rewards, are_scripts)
        scenarios, bad = part.scenarios(readings if is_large else readings[:first])
        parts.append(part)
        checked += scenarios
        problems += bad
        sizes.append(len(rows) if is_large else len(scenarios))
    cut = f", the first {first:,} rows of each file" if first and any(len(part.rows) > first for part in parts) else ""
    raise_problems(f"{key}{cut}", [*problems, *_repeated_ids(checked)])
    if parts and not checked:
        raise DataError(f"{key}: data.row leaves out every row")
    found: Sequence[Scenario] = [scenario for scenario, _ in checked]
    spare_texts(found)
    notes = list(dict.fromkeys(note for part in parts for note in (part.rows.note, part.shape.announcement()) if note))
    if 0 < (count := sum(scenario.target in (None, "", []) for scenario in found)) < len(found):
        notes.append(f"{count:,} of {len(found):,} scenarios have no target")
    if is_large:
        if any(part.shape.counts[LEFT_OUT] for part in parts):
            raise DataError(f"{key}: {NO_ROW_LEFT_OUT}")
        found = ServedScenarios(parts, key)
        later = "bad rows, rows of one id and overlong prompts among the others are found when they are served"
        notes.append(f"the first {content.SAMPLE:,} rows of a file are checked now: {later}")
    weights = None if sources[0].weight is None else [source.weight or 0.0 for source in sources]
    names = [s.name or s.path or s.reasoning_gym or f"{key} item {i}" for i, s in enumerate(sources, start=1)]
    return ScenarioSet(found, np.repeat([i for i, *_ in lists], sizes), names, weights, notes)


def _as_sources(spec: SplitSpec, key: str) -> list[Source]:
    """The sources that a split's value stands for. A mapping without any of _ORIGINS, or with a prompt, is a row."""
    if isinstance(spec, Mapping) or is_table(spec):
        return [Source(rows=spec)]  # type: ignore[arg-type]
    paths = [spec] if isinstance(spec, str | os.PathLike) else spec
    if not isinstance(paths, Sequence):
        raise ConfigError(f"{key} must be a path, a hub id, or a list of rows or sources, not {type(spec).__name__}")
    if not paths:
        raise DataError(f"{key} is an empty list; give at least one scenario or source")
    items: list[Any] = [{"path": os.fspath(p)} if isinstance(p, str | os.PathLike) else p for p in paths]
    are_sources = [isinstance(item, Source) or _is_source(item) for item in items]
    if not any(are_sources):
        return [Source(rows=items)]  # what is no mapping is reported with the bad rows
    if not all(are_sources):
        row = are_sources.index(False) + 1
        raise ConfigError(f"{key} mixes sources and rows: put rows, such as item {row}, into a source's 'rows'")
    sources = [_checked_source(item, f"{key} item {i}") for i, item in enumerate(items, start=1)]
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError(f"{key}: some sources have a weight and some have none; give all of them one, or none")
    return sources


def _is_source(item: Any) -> bool:
    names = {*item} if isinstance(item, Mapping) else set()
    return bool(names & {*_ORIGINS}) and not names & {*QUESTION_COLUMNS}


def _checked_source(item: Source | Mapping[str, Any], place: str) -> Source:
    known = [field.name for field in fields(Source)]
    if not isinstance(item, Source) and (unknown := [name for name in item if name not in known]):
        raise ConfigError(f"{place}: a source has no key '{unknown[0]}'; its keys are {', '.join(known)}")
    source = item if isinstance(item, Source) else Source(**item)
    given = [name for name in _ORIGINS if getattr(source, name) is not None]
    task, weight, rewards = source.reasoning_gym, source.weight, source.rewards
    is_task = isinstance(source.size, int) and isinstance(source.seed, int) and source.fields is None
    is_weight = weight is None or (isinstance(weight, int | float) and 0 < weight < float("inf"))
    are_names = isinstance(rewards, list | None) and all(isinstance(name, str) for name in rewards or [])
    needs = {
        f"a source needs one of {', '.join(_ORIGINS)}, but has {' and '.join(given) or 'none'}": len(given) == 1,
        "size, seed and options belong to a source of reasoning_gym; remove them": task is not None
        or (source.size, source.seed, source.options) == (None, 0, None),
        f"reasoning_gym={task} needs a size (instances), may have a seed, and takes no fields": task is None or is_task,
        f"path={source.path!r} must be text": isinstance(source.path, str | os.PathLike | None),
        f"rows must be a list of scenarios, not {type(source.rows).__name__}": is_table(source.rows)
        or isinstance(source.rows, list | Mapping | None),
        f"weight={weight!r} must be a number above 0; leave the source out to ignore it": is_weight,
        f"rewards={rewards!r} must be a list of reward names": are_names,
    }
    if broken := [told for told, holds in needs.items() if not holds]:
        raise ConfigError(f"{place}: {broken[0]}")
    check_bounds(place, Source, {"size": source.size, "seed": source.seed})
    return source


def _is_quick(source: Source, key: str) -> bool:
    """Whether a source's rows need neither a network, nor a library, nor a while."""
    files = [] if source.path is None else _files(source.path, key)
    return source.rows is not None or 0 < sum(max(file.stat().st_size, 1) for file in files) < content.LARGE_BYTES


def _row_lists(source: Source, index: int, num_sources: int, split: str) -> Iterator[_Found]:
    """The files or the list of rows that a source stands for."""
    place = f"data.{split} item {index + 1}"
    if source.rows is not None:
        origin = f"data.{split}" if num_sources == 1 else f"{place} rows"
        stem = source.name or (split if num_sources == 1 else f"{split}.{index + 1}")
        yield index, rows_of(source.rows, origin, split), stem, stem
    elif source.reasoning_gym is not None:
        stem = source.name or f"{source.reasoning_gym}.{source.seed}"
        task = read_task(source.reasoning_gym, source.size or 0, source.seed, source.options or {}, place)
        yield index, ListRows(task, place), stem, f"{stem}.{index + 1}"
    else:
        path = os.fspath(source.path or "")
        files = _files(path, f"data.{split}")
        keep_inputs(*files)
        for file in files:
            stem = content.unpacked(file).stem
            is_text = file.suffix.lower() not in TABLES and not is_saved(file)
            rows: Rows = read_file(file, split) if is_text else read_table(file, split)
            yield index, rows, stem, str(file.with_name(stem))
        if not files:
            yield index, read_hub(path, split), path, path


def _files(path: str, key: str) -> list[Path]:
    """The files at a path or glob, in sorted order; none for a hub id."""
    expanded = os.path.expanduser(path)
    if os.path.exists(expanded):
        return [Path(expanded)]
    here = f"paths are relative to {os.getcwd()}"
    if glob.has_magic(expanded):
        found = sorted(name for name in glob.glob(expanded, recursive=True) if os.path.isfile(name))
        if not found:
            raise DataError(f"{key}={path}: no file matches; {here}")
        return [Path(name) for name in found]
    # `data/train.jsonl` has the form of a hub id, but one of our suffixes, or begins with a folder that is here.
    has_our_suffix = os.path.splitext(path)[1].lower() in (*READERS, *TABLES, *content.PACKED)
    if has_our_suffix or os.path.isdir(path.split("/")[0]) or not is_hub_id(path):
        raise DataError(f"{key}={path}: there is no such file, and it does not look like a hub id (owner/name); {here}")
    return []


def _repeated_ids(checked: Sequence[tuple[Scenario, str]]) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for scenario, place in checked:
        if taken := first.get(scenario.id):
            yield Problem(place, f"the id '{scenario.id}' is already that of {taken}; ids must differ within a split")
        first[scenario.id] = taken or place


def check_options(data: Any) -> None:
    """The options of a data module do not contradict each other.

    Raises:
        ConfigError: If they do.
    """
    if data.curriculum is not None and not data.shuffle:
        raise ConfigError("data.shuffle=False keeps the order, data.curriculum draws: leave one of them out")
    if is_stream(data.specs["train"]) and (data.curriculum or data.validation_fraction):
        raise ConfigError("data.curriculum and data.validation_fraction need all rows, and data.train is a stream")
    fraction = f"data.validation_fraction={data.validation_fraction}"
    if data.validation_fraction and data.specs["validation"] is not None:
        raise ConfigError(f"data.validation and {fraction} are both given; leave one of them out")
    if data.validation_fraction and data.specs["train"] is None:
        raise ConfigError(f"{fraction} is a fraction of data.train, which is not given")
    if isinstance(data.tokenizer, str):
        raise ConfigError(f"data.tokenizer={data.tokenizer!r} must be a tokenizer object; by default it is the model's")
