"""Users' own files are never overwritten: what a command reads it does not write, by whatever name it is given."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import RUN, RUN_CONFIG, run_model_folder, start_in

from stateset_lightning.cli.main import main

CHECKPOINT = RUN / "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    """The folder of a run of the model in `model`, with links to what it reads, and an adapter."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        run_model_folder(folder, patch, model_folder("llama"), "--data.validation", "null")
    guide = {"agent": {"model_name": "tiny"}, "training": {"num_episodes": 1}}
    (folder / "guide.yaml").write_text(
        yaml.safe_dump(guide | {"environment": {"scenarios": [{"user_responses": ["a"]}]}})
    )
    return folder


@pytest.fixture
def here(run, tmp_path, monkeypatch):
    """A copy of it, with links to what is read."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    checkpoint["stateset"]["run_folder"] = str(tmp_path / RUN)
    torch.save(checkpoint, "moved.ckpt")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/samples.jsonl").symlink_to("../rows.jsonl")
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to("rows.jsonl")
    (tmp_path / "linked").symlink_to("model")


def content():
    """Every file with its bytes, but for those of new runs and locks."""
    files = [path for path in Path().rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files if not {"version_1", "evaluation_0"} & {*path.parts}}


PREDICT = ["predict", "--config", "config.yaml", "--data.predict", "rows.jsonl", "--predictions.path"]
EXPORT = ["export", "--overwrite", str(CHECKPOINT)]
REPORT = ["report", str(RUN), "-o"]
FIT = ["fit", "--config", "config.yaml", "--data.validation", "null"]
ROOT = ["--trainer.logger", "false", "--trainer.default_root_dir", "data", "--samples.every_n_episodes", "1"]
HERE = [f"--trainer.logger.{key}={value}" for key, value in {"save_dir": ".", "name": "", "version": ""}.items()]


@pytest.mark.parametrize(
    "words",
    [
        *([*PREDICT, path] for path in ("model/../rows.jsonl", "link.jsonl", "hard.jsonl", "config.yaml")),
        [*PREDICT, "linked/config.json"],
        [*PREDICT, str(CHECKPOINT), "--ckpt_path", str(CHECKPOINT)],
        [*PREDICT, "adapter/adapter_config.json", "--model.policy.adapter", "adapter"],
        [*PREDICT, "s3://bucket/rows.jsonl"],
        *([*EXPORT, out] for out in (".", "runs", str(RUN), str(RUN / "checkpoints"), "model", "linked")),
        ["export", "--overwrite", "model", "model"],
        ["export", "--overwrite", "tiny", "."],
        ["export", "--overwrite", "moved.ckpt", str(RUN)],
        ["export", "--overwrite", "linked", "model/../model"],
        [*EXPORT, "s3://bucket/model"],
        *([*REPORT, str(RUN / name)] for name in ("metrics.csv", "samples.jsonl", "config.yaml", "../version_0/.lock")),
        [*REPORT, str(CHECKPOINT)],
        [*REPORT, "https://host/page.html"],
        [*FIT, *ROOT, "--data.train", "data/samples.jsonl"],
        [*FIT, *HERE],
        *(["convert", "guide.yaml", "-o", out] for out in ("guide.yaml", "model/../guide.yaml", "rows.jsonl")),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("here")
def test_what_a_command_reads_it_does_not_write(words, capsys):
    before = content()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert any(part in said for part in ("is not overwritten", "is an address", "the file is there already")), said
    assert content() == before


def test_a_path_with_double_colons_is_a_path(tmp_path, monkeypatch):
    """To fsspec, by which Lightning writes, they are a chain of file systems, and what stands behind them is lost."""
    start_in(tmp_path, monkeypatch, RUN_CONFIG, 4)
    paths = ["--trainer.logger.save_dir", "runs/a::b", "--trainer.callbacks.dirpath", "c/d::e"]
    for words in ([], ["--ckpt_path", "last", "--trainer.max_steps", "2"]):
        main([*FIT, *paths, "--trainer.max_steps", "1", *words])
    main(["export", "c/d::e/last.ckpt", "m::n"])
    main(["report", "runs/a::b/r/version_0", "-o", "r::s.html"])
    assert {path.name for path in Path().iterdir()} == {
        *("config.yaml", "rows.jsonl", "runs", "c", "m::n", "r::s.html")
    }
    assert [path.name for path in Path("runs").iterdir()] == ["a::b"]
    assert {path.name for path in Path("c").rglob("*")} == {"d::e", "last.ckpt", "epoch=0-step=2.ckpt"}


@pytest.mark.parametrize("name", ["samples.jsonl", "hparams.yaml"])
def test_a_pipe_in_the_place_of_a_runs_file_is_not_waited_for(here, capsys, name):
    (RUN / name).unlink(missing_ok=True)
    os.mkfifo(RUN / name)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "config.yaml", "--ckpt_path", str(CHECKPOINT), "--trainer.max_steps", "2"])
    assert end.value.code == 2
    assert f"{name} is not written: it is a device, a pipe or a socket" in capsys.readouterr().err
