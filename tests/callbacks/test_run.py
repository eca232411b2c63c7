"""Console lines, the summary, the run's folder, and Lightning's own callbacks on this module's metrics."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.callbacks import ConsoleProgress, RunSummary
from stateset_lightning.callbacks.run_folder import config_file, metrics_place, run_folder

ROWS = [{"prompt": f"What is {i} + 1?", "target": str(i + 1)} for i in range(4)]


def fit(tmp_path, callbacks=(), *, logger=False, ckpt_path=None, validation=None, checkpointing=False, lr=1e-3, **options):
    module = GRPOLightningModule(
        "tiny",
        reward=lambda turns, context: float(len(turns[-1].content)),
        rollout=RolloutConfig(2, 3),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        seed=1,
    )
    trainer = Trainer(
        accelerator="cpu", logger=logger, enable_checkpointing=checkpointing, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=list(callbacks), num_sanity_val_steps=0, **{"max_steps": 4, "max_epochs": -1, **options},
    )  # fmt: skip
    data = ScenarioDataModule(ROWS, validation=validation, batch_size=2, seed=0)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def test_console_lines_show_the_reward_and_the_time_left(tmp_path, capsys):
    fit(tmp_path, [ConsoleProgress(every_n_steps=2)], validation=ROWS, val_check_interval=2)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    form = r"step \d/4  reward -?\d+\.\d{3}  mixed groups \d\.\d\d  tokens \d+\.\d  tokens/s \d+  \d+:\d\d left"
    assert [line[:8] for line in steps] == ["step 1/4", "step 2/4", "step 4/4"]
    assert all(re.fullmatch(form, line) for line in steps), steps
    assert steps[-1].endswith("0:00 left")
    assert [line for line in lines if re.fullmatch(r"validation after step \d: reward \d+\.\d{3}", line)]


def test_the_summary_names_first_and_last_validation_and_places(tmp_path, capsys):
    checkpoints = ModelCheckpoint(save_last=True, every_n_train_steps=2)
    options = {"logger": CSVLogger(tmp_path, "run"), "checkpointing": True, "validation": ROWS, "val_check_interval": 2}
    trainer = fit(tmp_path, [RunSummary(), checkpoints], **options)
    said = capsys.readouterr().out
    assert "trained for 4 optimizer steps" in said
    assert re.search(r"validation reward: \d\.\d{3} after step 2 -> \d\.\d{3} after step 4 \([+-]\d\.\d{3}\)", said)
    folder = tmp_path / "run" / "version_0"
    assert f"checkpoint: {checkpoints.best_model_path}" in said
    assert f"metrics: {folder / 'metrics.csv'}" in said
    assert run_folder(trainer) == folder
    assert Path(checkpoints.best_model_path).is_relative_to(folder)


def test_the_summary_finds_best_and_last_of_two_that_keep_one_each(tmp_path, capsys):
    best = ModelCheckpoint(tmp_path, monitor="val/reward", mode="max", filename="best")
    last = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=0, save_last=True)
    fit(tmp_path, [RunSummary(), best, last], checkpointing=True, validation=ROWS, val_check_interval=2)
    said = capsys.readouterr().out
    assert f"\ncheckpoint: {tmp_path / 'best.ckpt'}\nlast checkpoint: {tmp_path / 'last.ckpt'}\n" in said


def test_the_summary_remembers_validations_across_a_resume(tmp_path, capsys):
    def callbacks():
        return [RunSummary(), ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=4, save_top_k=-1, save_last=True)]

    options = {"checkpointing": True, "validation": ROWS, "val_check_interval": 2}
    fit(tmp_path, callbacks(), **options)
    capsys.readouterr()
    fit(tmp_path, callbacks(), ckpt_path=tmp_path / "last.ckpt", **{**options, "max_steps": 6})
    assert re.search(r"validation reward: \S+ after step 2 -> \S+ after step 6", capsys.readouterr().out)


def test_a_single_validation_is_no_comparison():
    summary = RunSummary()
    summary.load_state_dict({"validations": [[7, {"reward": 0.5, "reward/right": 0.5, "solved": 0.25}]]})
    trainer = SimpleNamespace(global_step=7, loggers=[], default_root_dir="/nowhere", checkpoint_callbacks=[])
    assert summary.lines(trainer) == ["trained for 7 optimizer steps", "validation reward: 0.500 after step 7"]
    assert summary.state_dict() == {"validations": [[7, {"reward": 0.5, "reward/right": 0.5, "solved": 0.25}]]}


def test_a_held_out_reward_stands_beside_the_trained_one_at_the_end():
    summary = RunSummary()
    trained, held_out = "reward/contains", "reward/exact_match"
    summary.validations = [
        (0, {"reward": 0.2, trained: 0.2, held_out: 0.1}),
        (9, {"reward": 0.9, trained: 0.9, held_out: 0.0, "pass@4": 0.5}),
    ]
    trainer = SimpleNamespace(global_step=9, loggers=[], default_root_dir="/nowhere", checkpoint_callbacks=[])
    assert summary.lines(trainer)[1:] == [
        "validation reward: 0.200 after step 0 -> 0.900 after step 9 (+0.700)",
        "validation reward/contains: 0.200 after step 0 -> 0.900 after step 9 (+0.700)",
        "validation reward/exact_match: 0.100 after step 0 -> 0.000 after step 9 (-0.100)",
        "validation pass@4: 0.500 after step 9",
    ]


def test_the_folder_of_a_run(tmp_path):
    bare = SimpleNamespace(loggers=[], default_root_dir=str(tmp_path))
    assert (run_folder(bare), config_file(bare), metrics_place(bare)) == (tmp_path, tmp_path / "resolved_config.yaml", "")
    csv = SimpleNamespace(loggers=[CSVLogger(tmp_path, "a", version=3)], default_root_dir="x")
    assert config_file(csv) == tmp_path / "a" / "version_3" / "config.yaml"
    pytest.importorskip("tensorboard")
    board = SimpleNamespace(loggers=[TensorBoardLogger(tmp_path, "b", version="v"), CSVLogger(tmp_path)], default_root_dir="x")
    assert run_folder(board) == tmp_path / "b" / "v"
    assert metrics_place(board) == str(tmp_path / "b" / "v")


def test_checkpoints_of_the_best_validations_are_kept(tmp_path):
    best = ModelCheckpoint(tmp_path / "c", monitor="val/reward", mode="max", save_top_k=2, filename="{step}")
    fit(tmp_path, [best], checkpointing=True, validation=ROWS, val_check_interval=1)
    assert len(list((tmp_path / "c").glob("*.ckpt"))) == 2
    assert best.best_model_score == max(best.best_k_models.values())


def test_checkpoints_by_steps_and_by_time(tmp_path):
    from datetime import timedelta

    by_steps = ModelCheckpoint(tmp_path / "s", every_n_train_steps=2, save_top_k=-1, save_last=True, filename="{step}")
    by_time = ModelCheckpoint(tmp_path / "t", train_time_interval=timedelta(microseconds=1), save_top_k=-1, filename="{step}")
    fit(tmp_path, [by_steps, by_time], checkpointing=True)
    assert sorted(path.name for path in (tmp_path / "s").glob("*.ckpt")) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    assert len(list((tmp_path / "t").glob("*.ckpt"))) >= 3


def test_early_stopping_on_validation(tmp_path):
    stopping = EarlyStopping("val/reward", mode="max", patience=1, min_delta=1000.0)
    trainer = fit(tmp_path, [stopping], validation=ROWS, val_check_interval=2, max_steps=20)
    assert trainer.global_step == 4  # the second validation is no better by 1000


def test_the_learning_rate_is_monitored(tmp_path):
    fit(tmp_path, [LearningRateMonitor("step")], logger=CSVLogger(tmp_path, "run"), lr=0.25, log_every_n_steps=1)
    text = (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    assert "lr-SGD" in text.splitlines()[0]
    assert "0.25" in text


def test_max_epochs_and_max_time_end_a_run(tmp_path):
    assert fit(tmp_path, max_steps=-1, max_epochs=3).global_step == 6  # two episodes of two prompts make an epoch
    assert fit(tmp_path, max_steps=-1, max_time={"seconds": 1}).global_step > 0
