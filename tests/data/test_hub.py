"""Parquet and hub data sets: through `datasets`, here replaced by a small stand-in, since the real ones need a network."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from stateset_lightning.data.hub import is_hub_id
from stateset_lightning.data.sources import read_split
from stateset_lightning.errors import DataError


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

    def from_parquet(path):
        asked.append(path)
        return [{"question": "a"}]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    module.Dataset = SimpleNamespace(from_parquet=from_parquet)
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
    found = read_split(hub_id, split, {"prompt": "question"})
    assert calls == [asked]
    assert [(s.id, s.prompt) for s in found.scenarios] == [(f"{hub_id}:1", "a"), (f"{hub_id}:2", "b")]


def test_a_parquet_file(calls, write):
    path = write("a.parquet", b"PAR1")
    assert [s.id for s in read_split(path, "train", {"prompt": "question"}).scenarios] == ["a:1"]
    assert calls == [str(path)]


def test_failures_name_the_data_set(calls):
    with pytest.raises(
        DataError, match=r"'owner/missing' is no file here and cannot be loaded .*: Dataset 'owner/missing' doesn't exist; check"
    ):
        read_split("owner/missing", "train")
    with pytest.raises(DataError, match="owner/empty: has no rows"):
        read_split("owner/empty", "train")


def test_without_the_library_the_message_says_what_to_install(monkeypatch, write):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for spec in ("openai/gsm8k", write("a.parquet", b"PAR1")):
        with pytest.raises(DataError, match=r'pip install "stateset-lightning\[hub\]"'):
            read_split(spec, "train")
