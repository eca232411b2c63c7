"""The folder of a run, and the names of its files."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from module_runs import fit

import stateset_lightning
from stateset_lightning.run import folder
from stateset_lightning.run.folder import config_file, continues, of_rank, run_folder


def test_the_folder_of_a_run(tmp_path, monkeypatch):
    bare = SimpleNamespace(loggers=[], default_root_dir=str(tmp_path))
    assert (run_folder(bare), config_file(bare)) == (tmp_path, tmp_path / "resolved_config.yaml")
    monkeypatch.chdir(tmp_path)  # whose files are the user's own
    assert run_folder(bare) == tmp_path / folder.UNLOGGED
    csv = SimpleNamespace(loggers=[CSVLogger(tmp_path, "a", version=3)], default_root_dir="x")
    assert config_file(csv) == tmp_path / "a" / "version_3" / "config.yaml"
    pytest.importorskip("tensorboard")
    board = SimpleNamespace(
        loggers=[TensorBoardLogger(tmp_path, "b", version="v"), CSVLogger(tmp_path)], default_root_dir="x"
    )
    assert run_folder(board) == tmp_path / "b" / "v"


def test_lightning_writes_where_the_names_say(tmp_path):
    keeps = ModelCheckpoint(save_last=True, every_n_train_steps=1)
    options = {"logger": CSVLogger(tmp_path, "run"), "enable_checkpointing": True, "max_steps": 1}
    trainer = fit(tmp_path, callbacks=[keeps], **options)
    assert Path(keeps.last_model_path) == run_folder(trainer) / folder.CHECKPOINTS / "last.ckpt"
    assert (run_folder(trainer) / folder.METRICS).is_file()
    assert ExperimentWriter.NAME_METRICS_FILE == folder.METRICS


def test_no_other_file_of_the_package_spells_a_name(tmp_path):
    names = [value for value in vars(folder).values() if isinstance(value, str) and value.endswith((".jsonl", ".csv"))]
    assert len(names) == 4
    package = Path(stateset_lightning.__file__).parent
    spelt = [
        (path.relative_to(package), name)
        for path in package.rglob("*.py")
        for name in [*names, folder.ENVIRONMENT, "last.ckpt", folder.REPORT, *folder.CONFIGS]
        if path.name != "folder.py" and f'"{name}"' in path.read_text()
    ]
    assert spelt == []


def test_a_run_goes_on_in_its_folder_also_when_that_has_been_moved(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "mine")
    assert continues(trainer, str(tmp_path / "mine"))
    assert not continues(trainer, str(tmp_path / "other"))
    trainer.ckpt_path = tmp_path / "mine" / "checkpoints" / "last.ckpt"
    assert continues(trainer, str(tmp_path / "before_the_move"))


def test_ranks_after_the_first_have_a_file_of_their_own(tmp_path):
    path = tmp_path / "rows.jsonl"
    names = [of_rank(SimpleNamespace(global_rank=rank), path).name for rank in range(3)]
    assert names == ["rows.jsonl", "rows-rank1.jsonl", "rows-rank2.jsonl"]
