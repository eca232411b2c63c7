"""Resuming: which checkpoint is the last, in which folder the run goes on, which options may differ, and exit codes of the program."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from module_runs import fit, make_data, make_module, weights

from stateset_lightning.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.cli import main
from stateset_lightning.errors import CheckpointError, ConfigError, DiskError
from stateset_lightning.policy.schedule import Schedule
from stateset_lightning.resume import continue_run, find_checkpoint
from stateset_lightning.rollout import RolloutConfig

CONFIG = {
    "seed_everything": 3,
    "model": {
        "policy": {"model_name": "tiny"},
        "reward": [{"class_path": "stateset_lightning.rewards.ExactMatch"}],
        "rollout": {"num_generations": 4, "max_new_tokens": 4},
        "algorithm": {"class_path": "stateset_lightning.algorithm.DrGRPO"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
    },
    "data": {"train": "rows.jsonl", "validation": "rows.jsonl", "batch_size": 2},
    "trainer": {
        "max_steps": 3,
        "max_epochs": -1,
        "accelerator": "cpu",
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "r"}},
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_last": True}}
        ],
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a config and rows."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": f"What is {i} + 1?", "target": str(i + 1)}) + "\n" for i in range(4)))
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def logged(folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith(("time/", "memory/", "work/tokens_per_s"))} for row in rows]


def test_last_goes_on_in_the_folder_of_the_run_without_lost_or_double_rows(folder, capsys):
    main(["fit", "--config", "config.yaml", "--trainer.max_steps=5", "--trainer.logger.init_args.name=straight"])
    main(["fit", "--config", "config.yaml"])
    capsys.readouterr()
    main(["fit", "--config", "config.yaml", "--trainer.max_steps=5", "--ckpt_path=last"])
    said = capsys.readouterr().out
    assert "trainer.max_steps=5, and 3 in the checkpoint: the new value is used" in said
    assert [path.name for path in (folder / "runs" / "r").iterdir()] == ["version_0"]
    assert logged(folder / "runs" / "r" / "version_0") == logged(folder / "runs" / "straight" / "version_0")
    mine, other = ((folder / "runs" / name / "version_0" / "samples.jsonl").read_text() for name in ("r", "straight"))
    assert mine == other


def test_a_learning_rate_on_the_command_line_wins_and_the_log_says_so(folder, capsys):
    main(["fit", "--config", "config.yaml"])
    capsys.readouterr()
    cli = main(["fit", "--config", "config.yaml", "--trainer.max_steps=4", "--ckpt_path=last", "--model.optimizer.init_args.lr=0.5"])
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.5
    assert "model.optimizer lr=0.5, and 0.001 in the checkpoint: the new value is used" in capsys.readouterr().out
    rates = [float(row["lr"]) for row in logged(folder / "runs" / "r" / "version_0") if row["lr"]]
    assert rates == [0.001, 0.001, 0.001, 0.5]


def test_without_a_checkpoint_last_starts_a_new_run_and_says_so(folder, capsys):
    main(["fit", "--config", "config.yaml", "--ckpt_path=last"])
    assert "--ckpt_path last: there is no checkpoint in runs/r/*/checkpoints/ yet; a new run starts" in capsys.readouterr().out
    assert len(logged(folder / "runs" / "r" / "version_0")) == 4  # three steps and a validation


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_offered(folder, capsys):
    main(["fit", "--config", "config.yaml"])
    checkpoints = folder / "runs" / "r" / "version_0" / "checkpoints"
    last = checkpoints / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "config.yaml", "--ckpt_path=last"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "last.ckpt: the file is damaged" in said
    assert "the one before it is whole: --ckpt_path" in said
    offered = said.split("--ckpt_path ")[1].strip()
    cli = main(["fit", "--config", "config.yaml", f"--ckpt_path={offered}", "--trainer.max_steps=4"])
    assert cli.trainer.global_step == 4
    assert [path.name for path in (folder / "runs" / "r").iterdir()] == ["version_0"]


def save(*callbacks):
    """Flags of `fit` with ModelCheckpoints of these options."""
    # A list of the same class in a later file would inherit what it does not say.
    options = [{"every_n_train_steps": None, "save_last": None, **given} for given in callbacks]
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": given} for given in options]
    Path("save.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return ["--config", "config.yaml", "--config", "save.yaml"]


def stopped_with(capsys, *args):
    """The message of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == 2
    return capsys.readouterr().err


BY_STEPS = {"every_n_train_steps": 1}
IN_FOLDERS = {"every_n_train_steps": 1, "filename": "{step}-{val/reward:.2f}"}  # a slash of a metric's name makes a folder


@pytest.mark.parametrize(
    "options",
    [
        BY_STEPS,
        {"train_time_interval": "0:00:00"},
        {**BY_STEPS, "save_last": "link", "save_top_k": -1},
        IN_FOLDERS,
        {**BY_STEPS, "dirpath": "elsewhere"},
        {**IN_FOLDERS, "dirpath": "elsewhere"},
    ],
    ids=["by steps", "by time", "dangling link", "metric with a slash", "dirpath", "dirpath and slash"],
)
def test_last_goes_on_whatever_the_checkpoints_are_called(folder, capsys, options):
    main(["fit", "--config", "config.yaml", "--trainer.max_steps=5", "--trainer.logger.init_args.name=straight"])
    flags = save(options)
    main(["fit", *flags])
    last = folder / "runs" / "r" / "version_0" / "checkpoints" / "last.ckpt"
    if options.get("save_last"):
        last.resolve().unlink()
        assert last.is_symlink()
    assert not last.exists()
    capsys.readouterr()
    main(["fit", *flags, "--trainer.max_steps=5", "--ckpt_path=last"])
    said = capsys.readouterr().out
    assert "resuming " in said
    assert "trainer.max_steps=5, and 3 in the checkpoint" in said  # read, not only found
    assert [path.name for path in (folder / "runs" / "r").iterdir()] == ["version_0"]
    assert logged(folder / "runs" / "r" / "version_0") == logged(folder / "runs" / "straight" / "version_0")


def test_a_dirpath_that_holds_other_runs_too_is_not_searched_below(folder, capsys):
    main(["fit", "--config", "config.yaml"])
    capsys.readouterr()
    main(["fit", *save({**BY_STEPS, "dirpath": "."}), "--trainer.logger.init_args.name=new", "--ckpt_path=last"])
    assert "a new run starts" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_last_and_best_name_the_same_checkpoints_wherever_they_are_evaluated(folder, command):
    first = {"monitor": "step", "mode": "min", "filename": "first"}  # the lowest step is the best one
    flags = save({**BY_STEPS, **first}, BY_STEPS)
    main(["fit", *flags])
    files = list((folder / "runs" / "r" / "version_0").rglob("*"))
    written = {path: path.stat().st_mtime_ns for path in files}
    for name, step in (("last", 3), ("best", 1)):
        cli = main([command, *flags, "--data.test=rows.jsonl", "--data.predict=rows.jsonl", f"--ckpt_path={name}"])
        saved = torch.load(cli.trainer.ckpt_path, weights_only=True)
        assert saved["global_step"] == step
        assert all(torch.equal(weight, saved["state_dict"][key]) for key, weight in cli.model.state_dict().items())
    assert {path: path.stat().st_mtime_ns for path in files} == written  # evaluations write beside the run, not into it


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_that_is_not_there_yet_is_no_untrained_model(folder, capsys, command, name):
    said = stopped_with(
        capsys, command, "--config", "config.yaml", "--data.test=rows.jsonl", "--data.predict=rows.jsonl", f"--ckpt_path={name}"
    )
    assert f"ckpt_path={name}: there is no checkpoint in runs/r/*/checkpoints/ yet" in said
    assert said.count("\n") == 1
    assert not (folder / "runs").exists()


def test_what_is_no_best_checkpoint_is_said(folder, capsys):
    main(["fit", *save({"monitor": "val/reward", "mode": "max", "filename": "{step}", "save_last": True})])
    best = next((folder / "runs" / "r" / "version_0" / "checkpoints").glob("step=*.ckpt"))
    moved = best.rename(folder / best.name)
    said = stopped_with(capsys, "fit", "--config", "config.yaml", "--ckpt_path=best")
    assert f"{best.relative_to(folder)}, the best by val/reward, is gone: give `last` or a .ckpt file" in said
    moved.rename(best)
    (folder / "runs" / "r").rename(folder / "runs" / "renamed")
    cli = main(["fit", "--config", "config.yaml", "--trainer.logger.init_args.name=renamed", "--trainer.max_steps=4", "--ckpt_path=best"])
    assert cli.trainer.global_step == 4
    assert [path.name for path in (folder / "runs" / "renamed").iterdir()] == ["version_0"]  # it goes on there
    main(["fit", "--config", "config.yaml"])
    said = stopped_with(capsys, "fit", "--config", "config.yaml", "--ckpt_path=best")
    assert "knows no best checkpoint: its run had no ModelCheckpoint with a `monitor`" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_an_empty_checkpoint_path_is_refused(folder, capsys, command):
    said = stopped_with(capsys, command, "--config", "config.yaml", "--data.test=rows.jsonl", "--data.predict=rows.jsonl", "--ckpt_path=")
    assert "ckpt_path is empty: give a .ckpt file, `last` or `best`" in said
    assert said.count("\n") == 1


def run_program(*args):
    command = [sys.executable, "-m", "stateset_lightning", "fit", "--config", "config.yaml", "--trainer.max_steps=100000", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow  # starts a process that imports torch and lightning, twice
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_program_with_a_checkpoint_and_their_exit_code(folder, sent, code):
    program = run_program()
    while not (line := program.stdout.readline()).startswith("step 1/"):
        assert program.poll() is None, line
    time.sleep(0.3)
    program.send_signal(sent)
    said = program.communicate(timeout=60)[0]
    assert program.returncode == code, said
    assert "resume with --ckpt_path" in said
    state = torch.load(folder / "runs" / "r" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert f"after optimizer step {state['global_step']};" in said
    assert [int(row["step"]) for row in logged(folder / "runs" / "r" / "version_0") if row["lr"]][-1] == state["global_step"]


def checkpoint_file(path, age):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "stateset": {}}, path)
    os.utime(path, (time.time() - age,) * 2)
    return path


def make(tmp_path, logger, *callbacks):
    return Trainer(accelerator="cpu", logger=logger, default_root_dir=tmp_path, callbacks=list(callbacks))


def test_the_newest_checkpoint_of_all_runs_of_the_name_is_the_last(tmp_path):
    checkpoint_file(tmp_path / "a" / "version_0" / "checkpoints" / "last.ckpt", age=30)
    newest = checkpoint_file(tmp_path / "a" / "version_1" / "checkpoints" / "step=7.ckpt", age=10)
    checkpoint_file(tmp_path / "other" / "version_0" / "checkpoints" / "last.ckpt", age=0)
    trainer = make(tmp_path, CSVLogger(tmp_path, "a"))
    assert continue_run(trainer, "last") == str(newest)
    assert trainer.logger.version == 1


def test_a_folder_of_ones_own_and_a_given_version_are_kept(tmp_path):
    mine = checkpoint_file(tmp_path / "mine" / "last.ckpt", age=0)
    checkpoint_file(tmp_path / "a" / "version_0" / "checkpoints" / "last.ckpt", age=0)
    trainer = make(tmp_path, CSVLogger(tmp_path, "a", version=5), ModelCheckpoint(tmp_path / "mine"))
    assert continue_run(trainer, "last") == str(mine)
    given = tmp_path / "a" / "version_0" / "checkpoints" / "last.ckpt"
    assert continue_run(trainer, str(given)) == str(given)
    assert trainer.logger.version == 5


def test_without_a_logger_last_is_in_the_root_folder(tmp_path):
    file = checkpoint_file(tmp_path / "checkpoints" / "last.ckpt", age=0)
    assert continue_run(make(tmp_path, False), "last") == str(file)


def test_last_is_also_found_where_checkpoints_are_remote(tmp_path):
    folder = f"memory://{tmp_path.name}/checkpoints"
    trainer = make(tmp_path, False, ModelCheckpoint(folder))
    assert continue_run(trainer, "last") is None
    system = fsspec.filesystem("memory")
    for name in ("last.ckpt", "step=2.ckpt"):
        system.pipe_file(f"{folder}/{name}", b"")
    assert continue_run(trainer, "last") == f"memory:///{tmp_path.name}/checkpoints/step=2.ckpt"


def test_several_bests_are_named(tmp_path):
    states = {name: {"monitor": name, "best_model_path": f"{name}.ckpt"} for name in ("val/reward", "val/solved")}
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {}, "stateset": {}, "callbacks": {**states, "Mine": 3}}, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"give one of val/reward.ckpt \(val/reward\), val/solved.ckpt \(val/solved\)"):
        find_checkpoint(make(tmp_path, False), "best")


def test_a_wandb_run_goes_on_under_its_id(tmp_path):
    file = checkpoint_file(tmp_path / "project" / "x1y2z3" / "checkpoints" / "last.ckpt", age=0)
    logger = WandbLogger(project="project", save_dir=tmp_path, offline=True)
    assert continue_run(make(tmp_path, logger), "last") == str(file)
    assert logger.version == "x1y2z3"
    assert (logger._wandb_init["id"], logger._wandb_init["resume"]) == ("x1y2z3", "allow")


def test_an_absent_or_foreign_checkpoint_is_refused(tmp_path):
    trainer = make(tmp_path, False)
    with pytest.raises(CheckpointError, match="there is no such file"):
        continue_run(trainer, str(tmp_path / "absent.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint of stateset-lightning"):
        continue_run(trainer, str(tmp_path / "foreign.ckpt"))


def test_a_checkpoint_writer_that_the_user_chose_is_kept(tmp_path):
    assert type(fit(tmp_path, max_steps=1).strategy.checkpoint_io) is AtomicCheckpointIO
    chosen = fit(tmp_path, max_steps=1, plugins=[AsyncCheckpointIO()])
    assert type(chosen.strategy.checkpoint_io) is AsyncCheckpointIO


def test_a_full_disk_stops_a_run_and_the_last_good_checkpoint_resumes(tmp_path, monkeypatch):
    from test_files import full_disk

    class Fills(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            with full_disk(10**9 if trainer.global_step < 3 else 100_000):
                super()._save_checkpoint(trainer, filepath)

    options = {"enable_checkpointing": True, "max_steps": 4}
    with pytest.raises(DiskError, match="cannot be written"):
        fit(tmp_path, callbacks=[Fills(tmp_path / "c", every_n_train_steps=1, filename="{step}")], **options)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step=2.ckpt"]
    resumed = fit(tmp_path, ckpt_path=tmp_path / "c" / "step=2.ckpt", max_steps=4)
    straight = fit(tmp_path, max_steps=4)
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(resumed).items())


def test_changed_options_of_rollout_and_schedule_are_announced(tmp_path, caplog):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    fit(tmp_path, callbacks=[keep], enable_checkpointing=True, max_steps=1)
    module = make_module(rollout=RolloutConfig(num_generations=4, max_new_tokens=5, temperature=0.5), lr_scheduler=None)
    with caplog.at_level(logging.INFO, "stateset_lightning"):
        fit(tmp_path, module, ckpt_path=tmp_path / "step=1.ckpt", max_steps=2)
    said = [record.getMessage() for record in caplog.records]
    assert "model.rollout.temperature=0.5, and 1.0 in the checkpoint: the new value is used" in said
    assert not any("model.algorithm" in line or "lr=" in line for line in said)


def test_another_number_of_ranks_is_refused(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    fit(tmp_path, callbacks=[keep], enable_checkpointing=True, max_steps=1)
    state = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    state["ScenarioDataModule"]["train"]["world_size"] = 2  # at an episode's end, where no episode of the ranks is left
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(ConfigError, match=r"number of processes .* is 1, but 2 in the checkpoint"):
        fit(tmp_path, make_module(), make_data(), ckpt_path=tmp_path / "two.ckpt", max_steps=2)


def test_a_schedule_survives_the_resume(tmp_path):
    def run(**options):
        return fit(tmp_path, make_module(lr_scheduler=Schedule(decay="linear")), max_steps=4, **options).optimizers[0].param_groups[0]["lr"]

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    straight = run(callbacks=[keep], enable_checkpointing=True)
    assert run(ckpt_path=tmp_path / "step=2.ckpt") == straight
