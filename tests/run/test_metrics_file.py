"""metrics.csv: whole rows, in one file over all attempts of a run."""

import csv
from types import SimpleNamespace

import pytest
import torch
import wandb
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from module_runs import fit, make_module
from test_files import full_disk
from wandb_files import history

from stateset_lightning.errors import DiskError
from stateset_lightning.files import read_table
from stateset_lightning.run.metrics_file import (
    MetricsFile,
    install_metrics_files,
    metrics_files,
    skip_known_rows,
    wandb_rows,
)


def log(writer, *steps, **metrics):
    for step in steps:
        writer.log_metrics({"a": step * 10, **metrics}, step)


def read(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_and_new_columns_filled_in(tmp_path):
    writer = MetricsFile(str(tmp_path))
    log(writer, 1, 2)
    log(writer, 3, b=7)
    log(writer, 4)
    assert read(tmp_path) == [
        {"a": "10", "b": "", "step": "1"},
        {"a": "20", "b": "", "step": "2"},
        {"a": "30", "b": "7", "step": "3"},
        {"a": "40", "b": "", "step": "4"},
    ]
    assert writer.num_rows == 4


def test_a_resumed_run_goes_on_behind_the_checkpoint(tmp_path):
    log(MetricsFile(str(tmp_path)), 1, 2, 3)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("40")  # a kill tore this row
    writer = MetricsFile(str(tmp_path))
    writer.resume(2)
    log(writer, 3, 4)
    assert [row["step"] for row in read(tmp_path)] == ["1", "2", "3", "4"]
    assert writer.num_rows == 4


def test_a_new_run_in_an_old_folder_starts_afresh_but_not_before_it_has_a_row(tmp_path):
    log(MetricsFile(str(tmp_path)), 1, 2)
    writer = MetricsFile(str(tmp_path))
    assert len(read(tmp_path)) == 2
    log(writer, 9)
    assert [row["step"] for row in read(tmp_path)] == ["9"]


def test_a_full_disk_leaves_whole_rows(tmp_path):
    writer = MetricsFile(str(tmp_path))
    with full_disk(1000), pytest.raises(DiskError, match=r"metrics.csv: cannot be written"):
        log(writer, *range(1, 300))
    rows = read(tmp_path)
    assert len(rows) > 50
    assert rows == [{"a": f"{step}0", "step": str(step)} for step in range(1, len(rows) + 1)]
    with full_disk(1000), pytest.raises(DiskError):
        log(writer, 2, b="x" * 2000)  # a new column rewrites the file
    assert read(tmp_path) == rows


@pytest.mark.parametrize("name", ["a\nb", "a\r", "\ud800", "\u2028", 'a"b', "a,b", "é"], ids=ascii)
def test_a_name_takes_one_line_whatever_is_in_it(tmp_path, name):
    for steps in ((1, 2), (3,)):
        writer = MetricsFile(str(tmp_path))
        writer.resume(2)
        log(writer, *steps, **{name: 7})
    rows = [row for _, row in read_table(tmp_path / "metrics.csv", "step")]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert {row[name if name.isprintable() else name.encode("unicode_escape").decode()] for row in rows} == {"7"}


DAMAGE = {
    "zeros": b"\0" * 9,
    "a cell too few": b"20",
    "a cell too many": b"20,2,2",
    "no number": b"20,two",
    "infinite": b"20,inf",
    "not UTF-8": b"\xff,2",
    "an open quote": b'"20,2',
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_row_costs_that_row_and_none_comes_twice(tmp_path, caplog, damage):
    log(MetricsFile(str(tmp_path)), 1, 2, 3, 4)
    file = tmp_path / "metrics.csv"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
    writer = MetricsFile(str(tmp_path))
    writer.resume(3)
    log(writer, 4, 5)
    log(writer, 6, b=1)
    assert [row["step"] for row in read(tmp_path)] == ["1", "3", "4", "5", "6"]
    assert writer.num_rows == 5
    assert caplog.messages == [f"{file}, line 3: damaged, left out (1 in all)"]


@pytest.mark.parametrize("header", [b"\0" * 6, b"a", b"\xff", b'"a,step'])
def test_a_file_with_a_damaged_header_is_kept_beside_the_new_one(tmp_path, header):
    log(MetricsFile(str(tmp_path)), 1, 2)
    file = tmp_path / "metrics.csv"
    damaged = header + file.read_bytes().removeprefix(b"a,step")
    file.write_bytes(damaged)
    writer = MetricsFile(str(tmp_path))
    writer.resume(2)
    log(writer, 3)
    assert [row["step"] for row in read(tmp_path)] == ["3"]
    assert (tmp_path / "metrics.damaged.csv").read_bytes() == damaged


def test_a_row_is_on_disk_when_its_step_ends(tmp_path):
    class Look(Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append([row["step"] for row in read(tmp_path / "run" / "version_0")])

    seen = []
    logger = CSVLogger(tmp_path, "run", flush_logs_every_n_steps=100)
    fit(tmp_path, callbacks=[Look()], logger=logger, log_every_n_steps=1, max_steps=2)
    assert seen == [["1"], ["1", "2"]]


def test_it_is_installed_in_stock_loggers_that_have_not_begun(tmp_path):
    loggers = [CSVLogger(tmp_path, "a"), CSVLogger(tmp_path, "b")]
    started = loggers[1].experiment
    trainer = Trainer(accelerator="cpu", logger=loggers, default_root_dir=tmp_path)
    install_metrics_files(trainer)
    assert [type(logger.experiment) for logger in loggers] == [MetricsFile, type(started)]
    assert metrics_files(trainer) == [loggers[0].experiment]


class StoredRun:
    """A W&B run as it is after a resume: it counts on behind the rows that it has stored."""

    def __init__(self, stored):
        self.rows = [{"trainer/global_step": step} for step in stored]

    @property
    def step(self):
        return len(self.rows)

    def log(self, row):
        self.rows.append(row)


@pytest.mark.parametrize("stored", [[1, 2], [1, 2, 3, 4]])
def test_rows_that_wandb_has_are_not_sent_again(tmp_path, stored):
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logger._experiment = StoredRun(stored)
    trainer = SimpleNamespace(loggers=[logger], is_global_zero=True)
    skip_known_rows(trainer, [2])  # the checkpoint was made after two rows
    for step in (3, 4, 5):
        logger.log_metrics({}, step)
    assert [row["trainer/global_step"] for row in logger.experiment.rows] == [1, 2, 3, 4, 5]
    assert wandb_rows(trainer) == [5]


@pytest.mark.slow  # starts the process of W&B
def test_a_wandb_run_stores_what_it_did_not_know(tmp_path, wandb_here):
    """With W&B itself: Lightning's logger calls the run's `log`, which can be replaced, and `step` counts its rows."""
    logger = WandbLogger(project="p", save_dir=tmp_path, offline=True)
    trainer = SimpleNamespace(loggers=[logger], is_global_zero=True)
    for step in (1, 2, 3):
        logger.log_metrics({"a": step}, step)
    assert wandb_rows(trainer) == [3]
    skip_known_rows(trainer, [1])  # the checkpoint was made after one row
    for step in (2, 3, 4):
        logger.log_metrics({"a": step}, step)
    assert wandb_rows(trainer) == [4]
    wandb.finish()
    (file,) = tmp_path.rglob("*.wandb")
    assert [row["a"] for row in history(file)] == [1, 2, 3, 4]


def test_the_learning_rate_is_monitored(tmp_path):
    module = make_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.25))
    options = {"logger": CSVLogger(tmp_path, "run"), "log_every_n_steps": 1}
    fit(tmp_path, module, callbacks=[LearningRateMonitor("step")], **options)
    text = (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    assert "lr-SGD" in text.splitlines()[0]
    assert "0.25" in text
