"""Parquet files, and hub data sets by a small stand-in for `datasets`, since the hub needs a network."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from stateset_lightning.data.hub import is_hub_id, read_hub
from stateset_lightning.data.shapes import RowOptions
from stateset_lightning.data.sources import read_split
from stateset_lightning.errors import ConfigError, DataError


class NotFound(Exception):
    pass


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the `datasets` library and records what was asked of it."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "owner/missing":
            raise NotFound("Dataset 'owner/missing' doesn't exist\nand more")
        return [] if name == "owner/empty" else [{"question": "a"}, {"question": "b"}]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    module.__spec__ = ModuleSpec("datasets", loader=None)
    module.exceptions = SimpleNamespace(DatasetsError=NotFound)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("openai/gsm8k", True),
        ("openai/gsm8k:main", True),
        ("openai/gsm8k:main:train", True),
        ("gsm8k", False),
        ("a/b/c", False),
        ("a/b c", False),
    ],
)
def test_what_looks_like_a_hub_id(text, expected):
    assert is_hub_id(text) is expected


@pytest.mark.parametrize(
    ("hub_id", "split", "asked"),
    [
        ("openai/gsm8k", "train", ("openai/gsm8k", None, "train")),
        ("openai/gsm8k:main", "predict", ("openai/gsm8k", "main", "test")),
        ("openai/gsm8k:main:dev", "validation", ("openai/gsm8k", "main", "dev")),
    ],
)
def test_a_hub_id_says_name_configuration_and_split(calls, hub_id, split, asked):
    found = read_split(hub_id, split, RowOptions(fields={"prompt": "question"}))
    assert calls == [asked]
    assert [(s.id, s.prompt) for s in found.scenarios] == [(f"{hub_id}:1", "a"), (f"{hub_id}:2", "b")]


def test_a_parquet_file(tmp_path, write):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"question": ["a", "b"], "answer": ["1", None]}), tmp_path / "a.parquet")
    options = RowOptions(fields={"prompt": "question", "target": "answer"})
    found = read_split(tmp_path / "a.parquet", "train", options).scenarios
    assert [(s.id, s.prompt, s.target) for s in found] == [("a:1", "a", "1"), ("a:2", "b", None)]
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read as Parquet"):
        read_split(write("broken.parquet", b"PAR1"), "train")


def test_a_folder_that_is_called_parquet_is_no_file(tmp_path):
    (tmp_path / "a.parquet").mkdir()
    with pytest.raises(DataError, match=r"a\.parquet is a directory; give a file, or a glob such as"):
        read_split(tmp_path / "a.parquet", "train")


def test_failures_name_the_data_set(calls):
    with pytest.raises(
        DataError,
        match=r"'owner/missing' is no file here and no data set of the hub: .* doesn't exist; write",
    ):
        read_split("owner/missing", "train")
    with pytest.raises(DataError, match="owner/empty has no rows"):
        read_split("owner/empty", "train")


def test_without_the_library_the_message_says_what_to_install(monkeypatch, write):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for spec in ("openai/gsm8k",):
        with pytest.raises(ConfigError, match=r'pip install "stateset-lightning\[hub\]"'):
            read_split(spec, "train")


def test_a_hub_data_set_runs_no_script(tmp_path, monkeypatch):
    """A folder stands in for the hub: the library looks for `name/name.py` in both."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner/name/name.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(DataError, match="scripts are no longer supported"):
        read_hub("owner/name", "train")
    assert not (tmp_path / "executed").exists()
