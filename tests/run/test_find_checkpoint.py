"""Which checkpoint `last`, `best` and a path name, and in which folder a resumed run goes on."""

import os
import time
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from cli_runs import logged
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from stateset_lightning.cli.main import main
from stateset_lightning.errors import CheckpointError, ConfigError
from stateset_lightning.run.find_checkpoint import check_checkpoint, continue_run, find_checkpoint


def save(*callbacks):
    """Flags of `fit` with ModelCheckpoints of these options."""
    # A list of the same class in a later file would inherit what it does not say.
    options = [{"every_n_train_steps": None, "save_last": None, **given} for given in callbacks]
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": given} for given in options]
    Path("save.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return ["--config", "config.yaml", "--config", "save.yaml"]


ON_ROWS = ["--config", "config.yaml", "--data.test=rows.jsonl", "--data.predict=rows.jsonl"]


def stopped_with(capsys, *args):
    """The message of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == 2
    return capsys.readouterr().err


BY_STEPS = {"every_n_train_steps": 1}


# a slash of a metric's name makes a folder
IN_FOLDERS = {"every_n_train_steps": 1, "filename": "{step}-{val/reward:.2f}"}


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
        cli = main([command, *flags, *ON_ROWS[2:], f"--ckpt_path={name}"])
        saved = torch.load(cli.trainer.ckpt_path, weights_only=True)
        assert saved["global_step"] == step
        assert all(torch.equal(weight, saved["state_dict"][key]) for key, weight in cli.model.state_dict().items())
    assert {path: path.stat().st_mtime_ns for path in files} == written  # evaluations write beside the run, not into it


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_that_is_not_there_yet_is_no_untrained_model(folder, capsys, command, name):
    said = stopped_with(capsys, command, *ON_ROWS, f"--ckpt_path={name}")
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
    cli = main(
        [
            "fit",
            "--config",
            "config.yaml",
            "--trainer.logger.init_args.name=renamed",
            "--trainer.max_steps=4",
            "--ckpt_path=best",
        ]
    )
    assert cli.trainer.global_step == 4
    assert [path.name for path in (folder / "runs" / "renamed").iterdir()] == ["version_0"]  # it goes on there
    main(["fit", "--config", "config.yaml"])
    said = stopped_with(capsys, "fit", "--config", "config.yaml", "--ckpt_path=best")
    assert "knows no best checkpoint: its run had no ModelCheckpoint with a `monitor`" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_an_empty_checkpoint_path_is_refused(folder, capsys, command):
    said = stopped_with(capsys, command, *ON_ROWS, "--ckpt_path=")
    assert "ckpt_path is empty: give a .ckpt file, `last` or `best`" in said
    assert said.count("\n") == 1


def test_without_a_checkpoint_last_starts_a_new_run_and_says_so(folder, capsys):
    main(["fit", "--config", "config.yaml", "--ckpt_path=last"])
    assert (
        "--ckpt_path last: there is no checkpoint in runs/r/*/checkpoints/ yet; a new run starts"
        in capsys.readouterr().out
    )
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
    torch.save(
        {"state_dict": {}, "stateset": {}, "callbacks": {**states, "Mine": 3}}, tmp_path / "checkpoints" / "last.ckpt"
    )
    with pytest.raises(
        CheckpointError, match=r"give one of val/reward.ckpt \(val/reward\), val/solved.ckpt \(val/solved\)"
    ):
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


def test_checkpoints_are_told_from_other_files(tmp_path):
    for name in ("hpc", "registry:model", "s3://bucket/x.ckpt", str(tmp_path)):
        check_checkpoint(name)
    good = tmp_path / "good.ckpt"
    torch.save({"state_dict": {}, "stateset": {}}, good)
    check_checkpoint(str(good))
    good.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged"):
        check_checkpoint(str(good))
