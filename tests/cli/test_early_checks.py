"""Mistakes in YAML, words, files and rows are told within two seconds, before Lightning, torch and transformers."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import overlay, printed_config

from stateset_lightning.cli import early_checks
from stateset_lightning.cli.early_checks import checked_words
from stateset_lightning.data import sources
from stateset_lightning.errors import DataError

FILES = {
    "column.jsonl": '{"x1": "a"}\n',
    "row.jsonl": '{"prompt": "a"}\n{"prompt": \n',
    "type.yaml": "- prompt: a\n- prompt: [a]\n",
    "syntax.yaml": "model: {policy: tiny\ndata: x",
    "twice.yaml": "data: {train: rows.jsonl}\ntrainer: {max_steps: 1}\ndata: {batch_size: 2}\n",
    "documents.yaml": "data: {train: rows.jsonl}\n---\ntrainer: {max_steps: 1}\n",
}
BASE = ["--config", "config.yaml"]


@pytest.fixture
def files(config):
    for name, content in FILES.items():
        Path(name).write_text(content)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "--config", "none.yaml"], "--config none.yaml: cannot be read"),
        (["fit", *BASE, "--config", "syntax.yaml"], "syntax.yaml:2: malformed YAML"),
        (["fit", "--config", "twice.yaml"], "twice.yaml:3: the key data stands in line 1 already"),
        (["fit", "--config", "documents.yaml"], "documents.yaml:2: malformed YAML: but found another document"),
        (["fit", "config.yaml"], "config.yaml belongs to no option; give a config as --config FILE"),
        (["config.yaml"], "there is no command config.yaml; it comes first: fit, validate"),
        (["fit", *BASE, "--data.train", "none.jsonl"], "data.train=none.jsonl: there is no such file"),
        (["fit", *BASE, "--data.validation", "*.nothing"], "data.validation=*.nothing: no file matches"),
        (["test", *BASE, "--data.test", "column.jsonl"], "column.jsonl: there is no column 'prompt'"),
        (["validate", *BASE, "--data.validation_fraction=0.5", "--data.train=row.jsonl"], "row.jsonl:2: malformed"),
        (["doctor", *BASE, "--data.train", "type.yaml"], "type.yaml item 2: "),
    ],
)
def test_it_is_told_within_two_seconds_of_work(files, monkeypatch, tmp_path, words, said):
    for name in ("torch", "lightning", "transformers"):  # each takes seconds to import
        stub = tmp_path / "stubs" / f"{name}.py"
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"raise RuntimeError('{name} is imported')\n")
    path = os.pathsep.join([str(tmp_path / "stubs"), *filter(None, [os.environ.get("PYTHONPATH")])])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = [sys.executable, "-m", "stateset_lightning", *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (1 if words[0] == "doctor" else 2), done.stderr
    assert done.stderr.startswith("stateset-lightning: error: ")
    assert said in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize(
    "words",
    [
        ["--data.validation", "null"],
        ["--data.train", "owner/name:config"],  # of the hub, which takes a while
        ["--data.train", '[{"path": "rows.jsonl"}]', "--data.train.weight", "2"],
        ["--data.fields", "3"],
        ["--model.optimizer.help", "AdamW"],
        ["--print_config=skip_null", "--data.train", "none.jsonl"],
        ["--config", "column_is_mapped.yaml"],
    ],
)
def test_what_is_right_or_left_to_the_parser_passes(files, words):
    overlay("column_is_mapped.yaml", {"data": {"train": "column.jsonl", "fields": {"prompt": "x1"}}})
    checked_words("fit", [*BASE, *words])


def test_a_config_is_printed_without_its_data(config):
    assert printed_config("fit", *BASE, "--data.train", "later.jsonl")["data"]["train"] == "later.jsonl"


def test_the_first_rows_of_each_file_are_looked_at(config, monkeypatch):
    Path("many.csv").write_text("prompt\n" + "a\n" * 5 + " \n" * 5)
    monkeypatch.setattr(early_checks, "FIRST", 5)
    checked_words("fit", [*BASE, "--data.train", "many.csv"])
    monkeypatch.setattr(early_checks, "FIRST", 8)
    with pytest.raises(DataError, match=r"^data.train, the first 8 rows of each file: 3 rows cannot be used"):
        checked_words("fit", [*BASE, "--data.train", "many.csv"])
    with pytest.raises(DataError, match=r"^data.train: 5 rows cannot be used"):
        sources.read_split("many.csv", "train")
