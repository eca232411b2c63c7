"""Every kind of file and of Python's tables gives the same rows; what is damaged says why."""

import gzip
import itertools
import json
import os
import re
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow
import pytest
from pyarrow import feather, parquet

from stateset_lightning import ScenarioDataModule
from stateset_lightning.data import content, read_split, tables
from stateset_lightning.data.reading import read_file
from stateset_lightning.data.sources import Source
from stateset_lightning.errors import ConfigError, DataError

ROWS = [{"prompt": "é; 1, 2", "target": "007"}, {"prompt": "b\nc", "target": None}]
TEXTS = [{"prompt": "é; 1, 2", "target": "007"}, {"prompt": "b\nc", "target": ""}]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
OTHER = [{"prompt": "another split"}]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(delimiter):
    return f'prompt{delimiter} target \r\n"é; 1, 2"{delimiter}007\r\n"b\nc"{delimiter}\r\n'


def zstd(text):
    return pyarrow.Codec("zstd").compress(text.encode(), asbytes=True)


TEXT_FILES = {
    "a.jsonl": lines(),
    "a.ndjson": lines(),
    "blank lines.jsonl": "\ufeff\n  \n\u00a0\n" + lines().replace("\n", "\r\n \r\n"),
    "a.json": json.dumps(ROWS),
    "data.json": json.dumps({"version": 1, "data": ROWS}),
    "splits.json": json.dumps({"train": ROWS, "test": OTHER}),
    "nested.json": json.dumps({"validation": {"data": OTHER}, "train": {"data": ROWS}}),
    "columns.json": json.dumps(COLUMNS),
    "pandas columns.json": json.dumps({name: {f"{i}": v for i, v in enumerate(c)} for name, c in COLUMNS.items()}),
    "pandas index.json": json.dumps({f"{i}": row for i, row in enumerate(ROWS)}),
    "pandas split.json": json.dumps(
        {"columns": [*ROWS[0]], "index": [0, 1], "data": [[*row.values()] for row in ROWS]}
    ),
    "a.yaml": json.dumps(ROWS, ensure_ascii=False),
    "splits.yaml": json.dumps({"train": ROWS, "test": OTHER}, ensure_ascii=False),
    "a.csv": table(","),
    "semicolons.csv": table(";"),
    "tabs.csv": table("\t"),
    "bars.csv": table("|"),
    "told.csv": "\ufeffsep=;\r\n" + table(";"),
    "told oddly.csv": "sep=^\n" + table("^"),
    "carets.csv": table("^"),
    "spaced.csv": table(",").replace('",', '", ').replace("prompt,", "prompt,      "),
    "a.tsv": table("\t"),
    "commas.tsv": table(","),
    "a.jsonl.gz": gzip.compress(lines(ROWS[:1]).encode()) + gzip.compress(lines(ROWS[1:]).encode()),
    "a.json.GZ": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv.gz": gzip.compress(table(";").encode()),
    "a.jsonl.zst": zstd(lines()),
    "a.tsv.zst": zstd(table("\t")),
}
ARROW = pyarrow.table(COLUMNS)


def write_ipc(path, make):
    with make(str(path), ARROW.schema) as writer:
        writer.write_table(ARROW)


def save(path, splits=False):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    (DatasetDict({"train": data, "test": Dataset.from_list(OTHER)}) if splits else data).save_to_disk(str(path))


TABLE_FILES = {
    "a.parquet": lambda path: parquet.write_table(ARROW, path),
    "a.feather": lambda path: feather.write_feather(ARROW, str(path)),
    "packed.arrow": lambda path: feather.write_feather(ARROW, str(path), compression="zstd"),
    "a.arrow": lambda path: write_ipc(path, pyarrow.ipc.new_file),
    "stream.arrow": lambda path: write_ipc(path, pyarrow.ipc.new_stream),
    "saved": save,
    "saved.splits": lambda path: save(path, splits=True),
}


@pytest.mark.parametrize("name", [*TEXT_FILES, *TABLE_FILES])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, write, name):
    path = tmp_path / name
    if name in TEXT_FILES:
        write(name, TEXT_FILES[name])
    else:
        TABLE_FILES[name](path)
    found = read_split(str(path), "train")
    expected = TEXTS if ".csv" in name or ".tsv" in name else ROWS
    assert [{"prompt": s.prompt, "target": s.target} for s in found.scenarios] == expected
    stem = name.partition(".")[0] if name != "saved.splits" else "saved"
    assert [s.id for s in found.scenarios] == [f"{stem}:1", f"{stem}:2"]


PYTHON = {
    "a list": lambda datasets, pandas: ROWS,
    "a Dataset": lambda datasets, pandas: datasets.Dataset.from_list(ROWS),
    "of another format": lambda datasets, pandas: datasets.Dataset.from_list(ROWS).with_format("pandas"),
    "a part of it": lambda datasets, pandas: datasets.Dataset.from_list(ROWS + OTHER * 3).select([0, 1]),
    "a DatasetDict": lambda datasets, pandas: datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(OTHER)
    ),
    "a DataFrame": lambda datasets, pandas: pandas.DataFrame(ROWS),
    "splits of them": lambda datasets, pandas: {"test": OTHER, "train": pandas.DataFrame(ROWS)},
    "an Arrow table": lambda datasets, pandas: ARROW,
    "columns": lambda datasets, pandas: COLUMNS,
    "a source": lambda datasets, pandas: [Source(rows=pandas.DataFrame(ROWS), name="train")],
}


@pytest.mark.parametrize("make", PYTHON.values(), ids=PYTHON.keys())
def test_every_table_of_python_gives_the_same_rows(make):
    found = read_split(make(pytest.importorskip("datasets"), pytest.importorskip("pandas")), "train")
    assert [(s.id, s.prompt, s.target) for s in found.scenarios] == [
        ("train:1", "é; 1, 2", "007"),
        ("train:2", "b\nc", None),
    ]


def test_a_list_of_paths_is_all_their_rows(write):
    paths = [write("b.jsonl", lines()), write("a.csv", "prompt\nx\n")]
    for spec in (paths, [str(path) for path in paths]):
        found = read_split(spec, "train")
        assert [s.id for s in found.scenarios] == ["b:1", "b:2", "a:1"]
        assert found.source_of.tolist() == [0, 0, 1]


def test_missing_cells_are_none_and_integers_stay_integers(tmp_path):
    pandas = pytest.importorskip("pandas")
    import numpy as np

    cells = {"prompt": ["a", "b"], "target": [5, None], "x": [[1, 2], None], "y": [0.5, None]}
    parquet.write_table(pyarrow.table(cells), tmp_path / "a.parquet")
    frame = pandas.DataFrame(
        {"prompt": ["a", "b"], "target": ["5", np.nan], "x": [np.array([1, 2]), None], "y": [0.5, np.nan]}
    )
    frame["z"] = [{"answers": np.array(["1"], dtype=object)}, None]
    read = [
        tuple(s.columns()[k] for k in ("target", "x", "y"))
        for s in read_split(tmp_path / "a.parquet", "train").scenarios
    ]
    assert repr(read) == "[(5, [1, 2], 0.5), (None, None, None)]"
    first, second = read_split(frame, "train").scenarios
    assert (first.target, first.x, first.y, first.z) == ("5", [1, 2], 0.5, {"answers": ["1"]})
    assert (second.target, second.x, second.y, second.z) == (None, None, None, None)


def test_a_data_frame_whose_column_mixes_types_says_which():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match=r"data.train: .*column target .*; give the column one type, text for example"):
        read_split(pandas.DataFrame({"prompt": ["a", "b"], "target": [1, "b"]}), "train")


def test_a_replaced_parquet_file_is_read_anew(tmp_path):
    path = tmp_path / "a.parquet"
    for prompt in ("old", "new"):
        parquet.write_table(pyarrow.table({"prompt": [prompt]}), path)
        os.utime(path, (1, 1))
        assert read_split(path, "train").scenarios[0].prompt == prompt


@pytest.mark.parametrize(
    "name", [name for name in [*TEXT_FILES, *TABLE_FILES] if "." in name and name != "saved.splits"]
)
@pytest.mark.parametrize("damage", ["cut", "other bytes", "empty"])
def test_a_damaged_file_says_so_in_a_line(tmp_path, write, name, damage):
    path = tmp_path / name
    if name in TEXT_FILES:
        write(name, TEXT_FILES[name])
    else:
        TABLE_FILES[name](path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) * 2 // 3], "other bytes": b"\xff\xfe\x00ab", "empty": b""}[damage])
    with pytest.raises(DataError, match=re.escape(str(path))) as refused:
        read_split(str(path), "train")
    assert len(str(refused.value).splitlines()) <= 4


@pytest.mark.parametrize("name", ["a.arrow", "stream.arrow"])
def test_offsets_that_point_out_of_a_file_do_not_end_the_process(tmp_path, name):
    path = tmp_path / name
    TABLE_FILES[name](path)
    ends = [0, *itertools.accumulate(len(row["prompt"].encode()) for row in ROWS)]
    offsets = b"".join(end.to_bytes(4, "little") for end in ends)
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(path.read_bytes().replace(offsets, offsets[:4] + (2**30).to_bytes(4, "little") + offsets[8:]))
    with pytest.raises(DataError, match=r"a cell cannot be read .*write the table again"):
        read_split(str(path), "train")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda datasets, pandas: datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)),
            "has the splits test, and",
        ),
        (
            lambda datasets, pandas: datasets.DatasetDict(fold=datasets.Dataset.from_list(ROWS)),
            "must hold .*, not DatasetDict with",
        ),
        (lambda datasets, pandas: datasets.DatasetDict(), "must hold a list of rows, not DatasetDict"),
        (lambda datasets, pandas: pandas.Series(["a", "b"], name="prompt"), "must hold a list of rows, not Series"),
    ],
)
def test_what_holds_no_rows_of_this_split_is_an_error_in_a_line(made, message):
    value = made(pytest.importorskip("datasets"), pytest.importorskip("pandas"))
    with pytest.raises(DataError, match=f"data.train: {message}"):
        read_split(value, "train")


def test_what_cannot_be_read_says_what_to_do(tmp_path, write, monkeypatch):
    save(tmp_path / "saved", splits=True)
    write("splits.json", json.dumps({"train": ROWS, "test": OTHER}))
    for name in ("saved", "splits.json"):
        with pytest.raises(
            DataError, match=rf"{name}: has the splits train, test, and none for data.validation; give a file"
        ):
            read_split(str(tmp_path / name), "validation")
        assert read_split(str(tmp_path / name), "predict").scenarios[0].prompt == "another split"
    next((tmp_path / "saved" / "test").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="saved: cannot be read as Arrow"):
        read_split(str(tmp_path / "saved"), "test")
    shutil.rmtree(tmp_path / "saved" / "train")
    with pytest.raises(DataError, match="saved: cannot be read as Arrow"):
        read_split(str(tmp_path / "saved"), "train")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ConfigError, match=r"an Excel sheet needs the library openpyxl: pip install .*\[xlsx\]"):
        read_split(write("a.xlsx", b"PK"), "train")


def test_an_excel_sheet_by_a_stand_in_for_openpyxl(write, monkeypatch):
    cells = [("prompt", "target", None), (None, None, None), ("a", 5, None), ("b", None, "x")]
    module = ModuleType("openpyxl")
    module.__spec__ = ModuleSpec("openpyxl", loader=None)
    sheet = SimpleNamespace(iter_rows=lambda values_only: iter(cells))
    module.load_workbook = lambda path, read_only, data_only: SimpleNamespace(worksheets=[sheet])
    monkeypatch.setitem(sys.modules, "openpyxl", module)
    first, second = read_split(write("a.xlsx", b"PK"), "train").scenarios
    assert (first.prompt, first.target, second.prompt, second.target) == ("a", 5, "b", None)
    assert second.columns()["column 3"] == "x"
    cells[0] = ("prompt", "prompt", None)
    with pytest.raises(DataError, match="names the column 'prompt' twice"):
        read_split(write("a.xlsx", b"PK"), "train")


def test_a_large_parquet_file_is_unpacked_beside_its_rows(tmp_path, monkeypatch):
    rows = {"prompt": [f"p{i}" for i in range(2500)], "target": list(range(2500))}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet", row_group_size=700)
    small = list(tables.read_table(tmp_path / "a.parquet"))
    monkeypatch.setattr(content, "LARGE_BYTES", 100)
    large = tables.read_table(tmp_path / "a.parquet")
    assert list(large) == small == [large[i] for i in range(2500)]


REMEDIES = [
    (
        "a.jsonl",
        json.dumps(ROWS, indent=1),
        r"holds one JSON value, a list, not an object on each line; name the file .json",
    ),
    ("a.jsonl", json.dumps(ROWS), "name the file .json"),
    ("a.jsonl", json.dumps({"data": ROWS}), "holds one JSON value, a mapping, .* name the file .json"),
    ("a.jsonl", json.dumps({"train": ROWS}, indent=1), "name the file .json"),
    ("a.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS), "several lines; write each on one, .*jq -c"),
    ("a.jsonl", json.dumps(ROWS[0], indent=1), "several lines; write each on one, .*jq -c"),
    ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS), "several lines; write each on one, .*jq -c"),
    ("a.json", lines(), "name the file .jsonl"),
    ("a.json", json.dumps(ROWS[0]), "not a mapping with the keys prompt, target; put the rows in a list"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "x": 1, "x": 2}\n', r"a.jsonl:2: the key 'x' stands twice in"),
    ("a.json", '[{"prompt": "b", "x": {"y": 1, "y": 2}}]', r"a.json: the key 'y' stands twice in"),
    ("a.jsonl", json.dumps({"data": [{"x": 1}], "numbers": [1], "text": "a"}), "no column|name the file .json"),
    ("a.csv.gz", b"prompt\na\n", "it is no whole file of gzip"),
    ("a.parquet.gz", gzip.compress(b"x", mtime=0), "unknown suffix '.gz'"),
    ("a.csv", "prompt;target\na;1\nb\n", "1 cells, but the header has 2"),
    ("a.csv", "prompt;target\na;1\nb;c;2\n", "put cells that contain semicolons in quotes"),
    ("a.csv", "prompt\nWhat, then?\n", "put cells that contain commas in quotes"),
]


@pytest.mark.parametrize(("name", "text", "said"), REMEDIES)
def test_what_has_another_form_than_its_name_says_is_told_what_to_do(write, name, text, said):
    with pytest.raises(DataError, match=said):
        read_split(str(write(name, text)), "train")


def test_another_delimiter_and_columns_without_name_are_told(write):
    found = read_split(write("a.csv", ";prompt;\n1;a, b;\n2;c;d\n"), "train")
    assert found.notes == [f"{found.names[0]}: its cells are divided by semicolons"]
    assert found.scenarios[1].columns()["column 3"] == "d"
    assert read_split(write("b.csv", 'prompt\n"a; b"\n'), "train").notes == []


def test_a_file_that_unpacks_to_too_much_is_refused(write, monkeypatch):
    monkeypatch.setattr(content, "LARGE_BYTES", 1000)
    path = write("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 1000))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: unpacks to more than .* give the unpacked file"):
        read_split(path, "train")


def test_the_data_module_takes_them_too(tokenizer):
    data = ScenarioDataModule(
        pytest.importorskip("datasets").Dataset.from_list(ROWS), tokenizer=tokenizer, batch_size=2
    )
    data.setup("fit")
    assert {s.target for s in next(iter(data.train_dataloader())).scenarios} == {"007", None}


ONE_ROW = [
    {"prompt": "a", "test": {"code": "assert f(1)"}},
    {"prompt": "a", "data": [{"x": 1}], "rows": [{"y": 2}]},
    {"prompt": "a", "numbers": [1, 2]},
    {"messages": [{"role": "user", "content": "a"}], "train": ["b"]},
]


@pytest.mark.parametrize("row", ONE_ROW)
def test_a_row_alone_in_a_file_is_a_row_whatever_its_columns_are_called(write, row):
    (scenario,) = read_split(write("a.jsonl", json.dumps(row)), "train").scenarios
    assert {name: scenario.columns()[name] for name in {*row} - {"messages"}} == {
        name: value for name, value in row.items() if name != "messages"
    }


def test_places_are_lines_also_behind_blank_ones(write):
    path = Path(write("a.jsonl", '\n{"prompt": 1}\n\n \n{"prompt": 2}'))
    assert [(row.place, row.number) for row in read_file(path)] == [(f"{path}:2", 1), (f"{path}:5", 2)]


def test_a_transform_of_a_data_set_counts():
    data = pytest.importorskip("datasets").Dataset.from_list([{"x": "2 + 2"}] * 2)
    shown = data.with_transform(lambda batch: {"prompt": [f"{x}?" for x in batch["x"]]})
    assert [scenario.prompt for scenario in read_split(shown, "train").scenarios] == ["2 + 2?"] * 2


def test_columns_of_mappings_are_columns():
    """As `Dataset.to_dict()` gives them."""
    columns = {"prompt": ["a", "b"], "reward_model": [{"ground_truth": "1"}, {"ground_truth": "2"}]}
    assert [scenario.target for scenario in read_split(columns, "train").scenarios] == ["1", "2"]
