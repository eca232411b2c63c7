"""`last` is the newest state after every opportunity to save and at the run's end, and a run goes on from it exactly."""

import csv
from collections import Counter
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from module_runs import accumulating_run as run
from module_runs import assert_same_end, end_state, fit, make_data, make_module

from stateset_lightning.checkpoint_io import AtomicCheckpointIO

VALIDATING = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
MONITORED = {"monitor": "val/reward", "save_last": True, "filename": "{step}"}


class Records(AtomicCheckpointIO):
    """Keeps which file was written after which optimizer step."""

    def __init__(self):
        self.written = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written.append((str(path), checkpoint["global_step"]))


class Looks(Callback):
    """Keeps the step that `last.ckpt` holds as each optimizer step begins; None without one."""

    def __init__(self, folder):
        self.file, self.seen = folder / "last.ckpt", []

    def on_train_batch_start(self, *args):
        self.seen.append(step_of(self.file) if self.file.exists() else None)


def step_of(file):
    return torch.load(file, weights_only=True)["global_step"]


def unchanging_run(folder, *callbacks, **options):
    """A run of seven optimizer steps in which no validation after the first is better; two steps are an epoch."""
    records = Records()
    module = make_module(reward=lambda turns, context: 1.0)
    options = {"max_steps": 7, "enable_checkpointing": True, "plugins": [records], **options}
    return fit(folder, module, make_data(), callbacks=list(callbacks), **options), records.written


@pytest.mark.parametrize(
    ("saves", "validation", "expected"),
    [
        ({}, VALIDATING, [None, None, 2, 2, 4, 4, 6]),
        ({"save_last": "link"}, VALIDATING, [None, None, 2, 2, 4, 4, 6]),
        ({"save_top_k": 2}, VALIDATING, [None, None, 2, 2, 4, 4, 6]),
        ({"save_top_k": 0}, VALIDATING, [None, None, 2, 2, 4, 4, 6]),
        ({}, {"limit_val_batches": 1.0}, [None, None, 2, 2, 4, 4, 6]),
        ({"monitor": "train/reward"}, {}, [None, None, 2, 2, 4, 4, 6]),
        ({"every_n_epochs": 2}, VALIDATING, [None, None, None, None, 4, 4, 4]),
        ({"every_n_train_steps": 1}, VALIDATING, [None, 1, 2, 3, 4, 5, 6]),
        ({"every_n_train_steps": 1, "save_last": "link"}, VALIDATING, [None, 1, 2, 3, 4, 5, 6]),
        ({"every_n_train_steps": 3}, {"limit_val_batches": 1.0}, [None, None, None, 3, 3, 3, 6]),
        ({"train_time_interval": timedelta(0)}, VALIDATING, [None, 1, 2, 3, 4, 5, 6]),
        ({"train_time_interval": timedelta(days=1)}, VALIDATING, [None] * 7),
    ],
    ids=str,
)
def test_last_is_the_newest_state_after_every_opportunity_and_at_the_end(tmp_path, saves, validation, expected):
    looks, keeps = Looks(tmp_path / "c"), ModelCheckpoint(tmp_path / "c", **{**MONITORED, **saves})
    _, written = unchanging_run(tmp_path, looks, keeps, **validation)
    assert looks.seen == expected
    assert step_of(looks.file) == 7
    assert keeps.last_model_path == str(looks.file)
    assert not (tmp_path / "c" / "last-v1.ckpt").exists()
    assert max(Counter(written).values()) == 1  # no file twice in a step


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_best_stays_what_it_was(tmp_path, save_last):
    keeps = ModelCheckpoint(tmp_path / "c", **{**MONITORED, "save_last": save_last})
    unchanging_run(tmp_path, keeps, **VALIDATING)
    assert keeps.best_model_path == str(tmp_path / "c" / "step=2.ckpt")
    assert step_of(keeps.best_model_path) == 2
    assert step_of(keeps.last_model_path) == 7


def test_a_link_is_not_written_through(tmp_path):
    """By Lightning's own writer, which opens the file that it is given."""
    from lightning.fabric.plugins import TorchCheckpointIO

    class Plain(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            torch.save(checkpoint, path)

    (tmp_path / "c").mkdir()
    keeps = ModelCheckpoint(tmp_path / "c", **{**MONITORED, "save_last": "link"})
    unchanging_run(tmp_path, keeps, plugins=[Plain()], **VALIDATING)
    assert (step_of(keeps.best_model_path), step_of(keeps.last_model_path)) == (2, 7)


def test_one_keeps_the_best_and_another_the_last(tmp_path):
    best = ModelCheckpoint(tmp_path / "c", monitor="val/reward", filename="{step}")
    last = ModelCheckpoint(tmp_path / "c", train_time_interval=timedelta(0), save_top_k=0, save_last=True)
    unchanging_run(tmp_path, best, last, **VALIDATING)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["last.ckpt", "step=2.ckpt"]
    assert step_of(tmp_path / "c" / "last.ckpt") == 7


def test_a_run_that_stops_early_keeps_its_last_state(tmp_path):
    keeps = ModelCheckpoint(tmp_path / "c", **MONITORED)
    trainer, _ = unchanging_run(tmp_path, EarlyStopping("val/reward", patience=1), keeps, **VALIDATING)
    assert trainer.global_step == 4
    assert step_of(keeps.last_model_path) == 4


def test_without_save_last_there_is_no_last(tmp_path):
    unchanging_run(tmp_path, ModelCheckpoint(tmp_path / "c", **{**MONITORED, "save_last": None}), **VALIDATING)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step=2.ckpt"]


@pytest.mark.parametrize("validation", [{"limit_val_batches": 1.0}, {**VALIDATING, "val_check_interval": 3}], ids=["epochs", "interval"])
@pytest.mark.parametrize("steps", [8, 9], ids=["the epoch's end", "mid-epoch"])
def test_a_longer_run_goes_on_exactly_from_the_last_state_of_a_shorter_one(tmp_path, validation, steps):
    straight = end_state(tmp_path / "a", run(tmp_path / "a", max_steps=12, **validation))
    keeps = ModelCheckpoint(tmp_path / "c", save_top_k=0, **MONITORED)
    run(tmp_path / "b", keeps, max_steps=steps, enable_checkpointing=True, **validation)
    assert step_of(keeps.last_model_path) == steps
    assert_same_end(straight, end_state(tmp_path / "b", run(tmp_path / "b", ckpt_path=keeps.last_model_path, max_steps=12, **validation)))


@pytest.mark.parametrize("validation", [{"limit_val_batches": 1.0}, {}], ids=["validation", "no validation"])
def test_a_run_goes_on_exactly_from_a_save_at_an_epochs_end(tmp_path, validation):
    options = {"max_steps": 20, "max_epochs": 2, **validation}  # 16 steps: a second end of the first epoch would make it the last
    straight = end_state(tmp_path / "a", run(tmp_path / "a", **options))
    keeps = ModelCheckpoint(tmp_path / "c", filename="{step}", save_top_k=-1)
    run(tmp_path / "b", keeps, enable_checkpointing=True, **{**options, "max_steps": 9})
    file = tmp_path / "c" / "step=8.ckpt"
    assert_same_end(straight, end_state(tmp_path / "b", run(tmp_path / "b", ckpt_path=file, **options)))


def test_files_are_named_by_the_step_that_they_hold(tmp_path):
    """Also after a validation, which logs a `step` of its own as its place on the x-axis."""
    by_step = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    best = ModelCheckpoint(tmp_path / "best", filename="{step}", monitor="val/reward", save_top_k=-1)
    run(tmp_path, by_step, best, max_steps=7, enable_checkpointing=True, **{**VALIDATING, "val_check_interval": 3})
    named = {path.stem: step_of(path) for folder in ("c", "best") for path in (tmp_path / folder).iterdir()}
    assert named == {f"step={step}": step for step in range(1, 8)}
    with (tmp_path / "run" / "version_0" / "metrics.csv").open(newline="") as lines:
        validated = [int(row["step"]) for row in csv.DictReader(lines) if row["val/reward"]]
    assert validated == [1, 3, 4, 6]  # steps done as micro-steps 3, 6, 9 and 12 ended
