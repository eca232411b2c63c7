"""Hostile scenario files, configs and reward returns: every case ends in success or in a documented error, never in
another exception.

The quick profile is part of `make test`; `STATESET_FUZZ=20` multiplies the number of cases. How many were tried is
printed (`pytest -s`).
"""

# ruff: noqa: PT017 (a refusal is one of two good ends)
import copy
import csv
import gzip
import io
import json
import math
import os
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from stateset_lightning.data import read_split
from stateset_lightning.errors import DataError, RewardError, UserError
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import RewardResult, Scorer
from stateset_lightning.training.collect import check_failures
from stateset_lightning.types import NOT_APPLICABLE, Turn

ROOT = Path(__file__).parents[1]
FACTOR = int(os.environ.get("STATESET_FUZZ", "1"))
TRIED: Counter[str] = Counter()


def quick(cases: int) -> Any:
    return settings(
        max_examples=cases * FACTOR,
        deadline=None,
        derandomize=FACTOR == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def _count():
    yield
    print("\nfuzz cases tried:", ", ".join(f"{name}: {count}" for name, count in sorted(TRIED.items())))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "prompt", "\ud800", "a\x00b", "<|end|>"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = st.sampled_from(
    [
        "prompt",
        "messages",
        "user_responses",
        "context",
        "id",
        "topic",
        "target",
        "rewards",
        "model_config",
        "x",
        "",
        "path",
        "turns",
    ]
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "x"]), "content": SCALARS}),
    max_size=3,
)
GOOD_ROWS = st.fixed_dictionaries(
    {"prompt": st.text(min_size=1, max_size=8)}, optional={"target": VALUES, "x": VALUES, "topic": st.text(max_size=3)}
)
ANY_ROWS = st.dictionaries(COLUMNS, VALUES | MESSAGES, max_size=5) | SCALARS
ROWS = st.lists(GOOD_ROWS, min_size=1, max_size=4) | st.lists(ANY_ROWS | GOOD_ROWS, max_size=4)
# A message has at most one line for each of the twenty rows shown, and their heading.
LINES = 24


def read_or_refuse(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            scenarios = read_split(str(path), "train")
        except DataError as error:
            assert "data.train" in str(error) or "rows" in str(error)
            assert len(str(error).splitlines()) <= LINES
            TRIED["files refused"] += 1
        else:
            assert all(
                (scenario.prompt or scenario.messages) and scenario.id and scenario.turns()
                for scenario in scenarios.scenarios
            )
            TRIED["files read"] += 1


@quick(250)
@given(
    st.binary(max_size=60),
    st.sampled_from(
        [".jsonl", ".json", ".csv", ".yaml", ".tsv", ".jsonl.gz", ".csv.zst", ".parquet", ".arrow", ".feather"]
    ),
)
def test_files_of_any_bytes(content, suffix):
    read_or_refuse(content, suffix)


@quick(150)
@given(ROWS, st.sampled_from([".jsonl", ".json", ".yaml"]))
def test_files_of_any_rows(rows, suffix):
    # A list in JSON is YAML too.
    text = "\n".join(json.dumps(row) for row in rows) if suffix == ".jsonl" else json.dumps(rows)
    read_or_refuse(text.encode(), suffix)


@quick(150)
@given(
    st.lists(st.lists(st.text(max_size=6), max_size=4), max_size=5),
    st.sampled_from(["prompt,target", "prompt", "id,prompt,x"]),
)
def test_tables_of_any_cells(table, header):
    written = io.StringIO()
    written.write(header + "\n")
    for row in table:
        written.write(",".join(row) + "\n")
    read_or_refuse(written.getvalue().encode(errors="surrogatepass"), ".csv")


@quick(150)
@given(ROWS)
def test_lists_of_any_rows(rows):
    try:
        read_split(rows, "train")
        TRIED["lists read"] += 1
    except UserError as error:
        assert len(str(error).splitlines()) <= LINES
        TRIED["lists refused"] += 1


# Files of every kind, which hold the same rows: all of them are read as they were written, or the file is refused.


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def as_json(rows: Any) -> bytes:
    return json.dumps(rows).encode()


def as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def as_delimited(delimiter: str, rows: list[dict[str, Any]]) -> bytes:
    written = io.StringIO()
    table = csv.writer(written, delimiter=delimiter)
    table.writerows([list(rows[0]), *(row.values() for row in rows)])
    return written.getvalue().encode()


def as_table(write: Any, rows: list[dict[str, Any]]) -> bytes:
    written = io.BytesIO()
    write(pa.Table.from_pydict(as_columns(rows)), written)
    return written.getvalue()


def as_arrow_file(table: pa.Table, file: io.BytesIO) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def as_arrow_stream(table: pa.Table, file: io.BytesIO) -> None:
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


ANYTHING = {  # can hold any JSON value
    ".jsonl": as_lines,
    ".ndjson": as_lines,
    ".json": as_json,
    " data.json": lambda rows: as_json({"data": rows}),
    " split.json": lambda rows: as_json({"train": rows, "test": []}),
    " columns.json": lambda rows: as_json(as_columns(rows)),
    ".yaml": as_json,
    ".jsonl.gz": lambda rows: gzip.compress(as_lines(rows), mtime=0),
    ".json.zst": lambda rows: pa.compress(as_json(rows), codec="zstd", asbytes=True),
}
TEXTS = {
    ".csv": partial(as_delimited, ","),
    " semicolon.csv": partial(as_delimited, ";"),
    " bar.csv": partial(as_delimited, "|"),
    " tab.csv": partial(as_delimited, "\t"),
    ".tsv": partial(as_delimited, "\t"),
    ".csv.gz": lambda rows: gzip.compress(as_delimited(",", rows), mtime=0),
}
TYPED = {
    ".parquet": partial(as_table, pq.write_table),
    ".arrow": partial(as_table, as_arrow_file),
    ".feather": partial(as_table, feather.write_feather),
    " stream.arrow": partial(as_table, as_arrow_stream),
}
NAMES = st.text(min_size=1, max_size=6).map(str.strip).filter(bool) | st.sampled_from(
    ["a.b", "a[0]", "n", "context2", "a\u2028b"]
)
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
COLUMN_TYPES = st.sampled_from(
    [
        st.none() | st.integers(-(2**63), 2**63 - 1),
        st.none() | st.text(st.characters(codec="utf-8"), max_size=8),
        st.none() | st.booleans(),
        st.lists(st.integers(0, 9) | st.none(), max_size=3),
        st.fixed_dictionaries(
            {"b": st.text(st.characters(codec="utf-8"), max_size=3), "c": st.none() | st.integers(0, 9)}
        ),
        st.binary(max_size=3),
    ]
)


@st.composite
def files_of_rows(draw: Any) -> tuple[str, bytes, list[dict[str, Any]]]:
    """A file's suffix, its bytes, and the rows that it holds, each with a prompt of its own."""
    kinds = draw(st.sampled_from([ANYTHING, TEXTS, TYPED]))
    suffix = draw(st.sampled_from([*kinds]))
    count = draw(st.integers(1, 4))
    # Neither a name of ours nor one that a shape is known by.
    names = ["prompt", *(f"x_{name}" for name in draw(st.lists(NAMES, max_size=2, unique=True)))]
    if kinds is TYPED:
        columns = {name: draw(st.lists(draw(COLUMN_TYPES), min_size=count, max_size=count)) for name in names[1:]}
    else:
        cells = CELLS if kinds is TEXTS else VALUES
        columns = {name: draw(st.lists(cells, min_size=count, max_size=count)) for name in names[1:]}
    rows = [{"prompt": f"question {i}", **{name: values[i] for name, values in columns.items()}} for i in range(count)]
    return suffix, kinds[suffix](rows), rows


def as_text(row: dict[str, Any]) -> str:
    """What a row holds. NaN is missing, wherever it stands."""
    return json.dumps(without_nan(row), default=repr, sort_keys=True)


def without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@quick(300)
@given(files_of_rows(), st.none() | st.tuples(st.integers(0, 400), st.binary(max_size=2)))
def test_files_of_every_kind_are_read_whole_or_refused(file, damage):
    suffix, content, rows = file
    if damage is not None:
        at, written = damage
        content = content[:at] + written + content[at + len(written) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            scenarios = list(read_split(str(path), "train").scenarios)
        except DataError as error:
            assert len(str(error).splitlines()) <= LINES
            TRIED[f"{suffix.split('.', 1)[1]} refused"] += 1
            return
    TRIED[f"{suffix.split('.', 1)[1]} read"] += 1
    if damage is None:
        assert [scenario.prompt for scenario in scenarios] == [row["prompt"] for row in rows]
        for scenario, row in zip(scenarios, rows, strict=True):
            held = {name: scenario.columns()[name] for name in row}
            assert as_text(held) == as_text(row)


class Odd:
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __float__(self) -> float:
        raise self.error("no number")

    def __repr__(self) -> str:
        raise self.error("no text")


RETURNS = (
    VALUES
    | st.floats()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.binary(max_size=3)
    | st.complex_numbers()
    | st.fixed_dictionaries({"score": VALUES}, optional={"why": VALUES})
    | st.tuples(VALUES, VALUES)
    | st.lists(VALUES, max_size=2)
    | st.fractions()
    | st.decimals()
    | st.builds(RewardResult, VALUES | st.floats(), VALUES)
    | st.builds(Odd, st.sampled_from([TypeError, ValueError, RuntimeError, KeyError, ZeroDivisionError]))
)


@quick(120)
@given(st.lists(RETURNS, min_size=1, max_size=4), st.booleans())
def test_rewards_that_return_anything(outputs, is_async):
    def blocking(turns, context):
        return outputs[int(turns[-1].content)]

    async def later(turns, context):
        return blocking(turns, context)

    with Scorer(later if is_async else blocking, max_failures=0.5) as scorer:
        session = scorer.start(len(outputs))
        for n in range(len(outputs)):
            session.submit(n, [Turn("assistant", str(n))])
        scores = session.collect()
    for n, value in enumerate(scores.values_NF[:, 0].tolist()):
        failed = [failure for failure in scores.failures if failure.completion == n]
        assert math.isfinite(value) or (bool(failed) and (math.isnan(value) or value == NOT_APPLICABLE))
        TRIED["returns failed" if failed else "returns scored"] += 1
    try:
        check_failures([scores], 0.5, Ranks())
    except RewardError as error:
        assert "max_reward_failures=0.5" in str(error)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    return [path] * bool(path) + [leaf for key, value in items for leaf in leaves(value, (*path, key))]


CONFIG = {
    key: value
    for key, value in yaml.safe_load((ROOT / "configs" / "single_turn.yaml").read_text()).items()
    if key in ("model", "data", "trainer")
}
BROKEN = st.sampled_from(
    [
        -1,
        0,
        1,
        0.5,
        -0.5,
        1e30,
        math.nan,
        math.inf,
        True,
        None,
        "",
        "text",
        "os.system",
        "1e-4",
        [],
        [1],
        {},
        {"a": 1},
        "../x",
        "\x00",
        "💥",
    ]
)


@pytest.fixture(scope="module")
def parser():
    from lightning.pytorch import Trainer

    from stateset_lightning.cli.config import Parser
    from stateset_lightning.datamodule import ScenarioDataModule
    from stateset_lightning.module import GRPOLightningModule

    parser = Parser(prog="stateset-lightning", default_env=False)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(GRPOLightningModule, "model")
    parser.add_lightning_class_args(ScenarioDataModule, "data")
    parser.parse_object(copy.deepcopy(CONFIG))
    return parser


@quick(60)
@given(st.sampled_from(leaves(CONFIG)), BROKEN | VALUES, st.sampled_from(["set", "rename", "add", "remove"]))
def test_configs_with_one_thing_wrong(parser, path, value, change):
    config = copy.deepcopy(CONFIG)
    parent: Any = config
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    if change == "set" or isinstance(parent, list):
        parent[key] = value
    elif change == "rename":
        parent[f"{key}x"] = parent.pop(key)
    elif change == "add":
        parent["unknown_key"] = value
    else:
        del parent[key]
    try:
        parser.parse_object(config)
        TRIED["configs accepted"] += 1
    except UserError as error:
        assert str(error).strip()
        assert len(str(error).splitlines()) <= 4, str(error)
        TRIED["configs refused"] += 1
    except ValueError as error:  # of the operating system, for the name of a file; the command makes a line of it
        assert str(error) == "embedded null byte"
