"""Which checkpoint `last`, `best` and a path name, and in which folder a resumed run goes on."""

import logging
import os
import shutil
import socket
import sys
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
from module_runs import DigitReward, fit, make_data, make_module, make_trainer

from stateset_lightning.cli.main import main
from stateset_lightning.errors import CheckpointError, ConfigError
from stateset_lightning.policy import LoRAConfig, Policy, PolicyConfig, load_model, save_adapter
from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.run.find_checkpoint import continue_run, find_among, find_checkpoint
from stateset_lightning.run.folder import run_folder


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
    assert "has no best one by a `monitor`" in said
    assert said.count("\n") == 1


def test_a_refused_resume_leaves_the_run_as_it_was(folder, capsys):
    """Its config above all: `generate` and `export` make prompts by it."""
    main(["fit", "--config", "config.yaml"])
    (run,) = Path("runs/r").glob("version_*")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    other = ["--data.system_prompt=Be brief", "--trainer.max_steps=5", "--ckpt_path=last"]
    said = stopped_with(capsys, "fit", "--config", "config.yaml", *other)
    assert "made of something else" in said
    assert {file: file.read_bytes() for file in before} == before


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
    with pytest.raises(CheckpointError, match="no checkpoint of ours"):
        continue_run(trainer, str(tmp_path / "foreign.ckpt"))


def test_checkpoints_are_told_from_other_files(tmp_path):
    for name in ("hpc", "registry:model", "s3://bucket/x.ckpt"):
        find_among([], name)
    good = tmp_path / "good.ckpt"
    torch.save({"state_dict": {}, "stateset": {}}, good)
    find_among([], str(good))
    good.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged"):
        find_among([], str(good))


# What files say of themselves -----------------------------------------------------------------------------------------


def saved(path, step, **more):
    """A checkpoint as a run writes it, saved `step` seconds after the first."""
    state = {"format": 1, "saved_at": 1.7e9 + step}
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "stateset": state, "lr_schedulers": [], **more}, path)
    return path


def touch(run):
    os.utime(run / "checkpoints" / "step=3.ckpt", (1.6e9,) * 2)
    os.utime(run / "checkpoints" / "step=1.ckpt")
    return run / "checkpoints" / "step=3.ckpt"


def copy_an_older_one(run):
    for place in (run / "checkpoints" / "last.ckpt", run.with_name("version_9") / "checkpoints" / "last.ckpt"):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / "checkpoints" / "step=1.ckpt", place)
    return run / "checkpoints" / "step=3.ckpt"


def move(run):
    for path in (run / "checkpoints").iterdir():
        os.utime(path, (1.6e9 - int(path.stem[-1]),) * 2)
    return run.rename(run.with_name("moved")) / "checkpoints" / "step=3.ckpt"


def another_clock(run):
    """A file of version 0.1 says nothing: its time counts."""
    return checkpoint_file(run / "checkpoints" / "old.ckpt", age=0)


def foreign(run):
    (run / "checkpoints" / "notes.ckpt").write_text("not a checkpoint")
    (run / "checkpoints" / "empty.ckpt").touch()
    torch.save({"weight": torch.zeros(2)}, run / "checkpoints" / "weights.ckpt")
    return run / "checkpoints" / "step=3.ckpt"


def half_an_older_one(run):
    content = (run / "checkpoints" / "step=1.ckpt").read_bytes()
    half = run / "checkpoints" / "half.ckpt"
    half.write_bytes(content[: len(content) // 2])
    os.utime(half, (1.6e9,) * 2)
    return run / "checkpoints" / "step=3.ckpt"


def weights_alone(run):
    saved(run / "checkpoints" / "weights.ckpt", 4)
    path = run / "checkpoints" / "weights.ckpt"
    content = torch.load(path, weights_only=True)
    del content["lr_schedulers"]
    AtomicCheckpointIO().save_checkpoint(content, path)
    return run / "checkpoints" / "step=3.ckpt"


@pytest.mark.parametrize(
    "change", [touch, copy_an_older_one, move, another_clock, foreign, half_an_older_one, weights_alone]
)
def test_last_is_what_the_files_say_of_themselves(tmp_path, caplog, change):
    run = tmp_path / "a" / "version_0"
    for step in (3, 1, 2):
        saved(run / "checkpoints" / f"step={step}.ckpt", step)
    expected = change(run)
    trainer = make(tmp_path, CSVLogger(tmp_path, "a"))
    with caplog.at_level(logging.INFO, "stateset_lightning"):
        assert find_checkpoint(trainer, "last") == str(expected)
    passed = ["empty.ckpt", "notes.ckpt", "weights.ckpt"] if change is foreign else []
    assert sorted(m.split(" is passed over")[0].rpartition("/")[2] for m in caplog.messages) == passed


def test_a_damaged_newest_is_no_reason_to_take_an_older_one(tmp_path):
    saved(tmp_path / "checkpoints" / "step=1.ckpt", 1)
    newest = saved(tmp_path / "checkpoints" / "step=2.ckpt", 2)
    newest.write_bytes(newest.read_bytes()[:-150])
    with pytest.raises(CheckpointError, match=r"step=2.ckpt: the file is damaged.*whole: --ckpt_path .*step=1.ckpt"):
        find_checkpoint(make(tmp_path, False), "last")


def test_a_clock_that_goes_back_does_not_hide_what_a_resumed_run_saves(tmp_path, monkeypatch):
    fit(tmp_path, max_steps=1).save_checkpoint(tmp_path / "checkpoints" / "a.ckpt")
    monkeypatch.setattr(time, "time", lambda: 1e9)
    resumed = fit(tmp_path, max_steps=2, ckpt_path="last")
    resumed.save_checkpoint(tmp_path / "checkpoints" / "0.ckpt")
    assert find_checkpoint(resumed, "last") == str(tmp_path / "checkpoints" / "0.ckpt")


# Everywhere alike -----------------------------------------------------------------------------------------------------


NAMES = {"last": 3, "best": 1, "runs": 3, "runs/r/version_0": 3, "runs/r/version_0/checkpoints": 3}


def test_generate_and_export_take_what_the_other_commands_take(folder, capsys):
    first = {"monitor": "step", "mode": "min", "filename": "first"}
    main(["fit", *save({**BY_STEPS, **first}, BY_STEPS)])
    for name, step in NAMES.items():
        capsys.readouterr()
        main(["generate", f"--ckpt_path={name}", "--prompt=What is 1 + 1?", "--device=cpu"])
        meant = capsys.readouterr().out.splitlines()[0].removeprefix(f"{name}: ")
        assert torch.load(meant, weights_only=True)["global_step"] == step
        main(["export", name, "exported", "--overwrite"])
        assert f"{name}: {meant}" in capsys.readouterr().out
        assert f"for {step} optimizer step" in Path("exported/README.md").read_text()
    cli = main(["validate", "--config=config.yaml", "--ckpt_path=runs"])
    assert torch.load(cli.trainer.ckpt_path, weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("words", [["generate", "--prompt=Hi", "--ckpt_path"], ["export"]], ids=lambda words: words[0])
def test_generate_and_export_say_where_there_is_no_checkpoint(folder, capsys, words, name):
    said = stopped_with(capsys, *words, name, *(["exported"] if words == ["export"] else []))
    assert f"ckpt_path={name}: there is no checkpoint in runs/ yet" in said
    assert said.count("\n") == 1


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"ckpt_path=.*empty: there is no checkpoint in .*empty/ yet"):
        find_checkpoint(make(tmp_path, False), str(tmp_path / "empty"))


EVALUATIONS = pytest.mark.parametrize("evaluate", ["validate", "test", "predict"])


@EVALUATIONS
@pytest.mark.parametrize("name", ["last", "best", "", "absent.ckpt"])
def test_from_python_no_untrained_model_is_evaluated(tmp_path, evaluate, name):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigError, match=r"ckpt_path.*: .*give a .ckpt file"):
        getattr(trainer, evaluate)(make_module(), make_data(test=[], predict=[]), ckpt_path=name)


def test_from_python_names_mean_the_same_after_a_fit_and_without_one(tmp_path):
    def trainer(max_steps=3):
        callbacks = [ModelCheckpoint(every_n_train_steps=1, monitor="step", mode="min", save_top_k=1, filename="first")]
        return make_trainer(tmp_path, max_steps=max_steps, callbacks=callbacks, enable_checkpointing=True)

    data = make_data(test=[{"prompt": "What is 3 + 4?", "target": "7"}])
    fitted = trainer()
    assert fitted.fit(make_module(), data, ckpt_path="last") is None  # nothing was saved yet: a new run
    fitted.save_checkpoint(tmp_path / "checkpoints" / "end.ckpt")
    for each in (fitted, trainer()):
        for name, step in (("last", 3), ("best", 1), (str(tmp_path), 3)):
            each.test(module := make_module(), data, ckpt_path=name, verbose=False)
            content = torch.load(each.ckpt_path, weights_only=True)
            assert content["global_step"] == step
            assert all(torch.equal(content["state_dict"][key], value) for key, value in module.state_dict().items())
    resumed = trainer(max_steps=4)
    resumed.fit(make_module(), data, ckpt_path="last")
    assert resumed.global_step == 4


def test_best_of_a_run_that_has_been_moved_is_not_that_of_the_run_in_its_place(tmp_path):
    def run(where, step):
        path = tmp_path / "a" / "version_0" / "checkpoints" / "step-val" / "reward=1.ckpt"
        state = {"best_model_path": str(path), "monitor": "val/reward", "dirpath": str(path.parents[1])}
        saved(where / "checkpoints" / "last.ckpt", step, callbacks={"ModelCheckpoint": state})
        return saved(where / "checkpoints" / "step-val" / "reward=1.ckpt", step - 1)

    run(tmp_path / "a" / "version_0", 10)
    best = run(tmp_path / "a" / "moved", 20)
    assert find_checkpoint(make(tmp_path, CSVLogger(tmp_path, "a")), "best") == str(best)


# Another version, another model, weights alone ------------------------------------------------------------------------


def test_a_checkpoint_of_a_newer_version_is_named_as_such(folder, capsys):
    main(["fit", "--config", "config.yaml"])
    last = "runs/r/version_0/checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    content["stateset"] = {"format": 1000}
    torch.save(content, last)
    for words in (["fit", "--config=config.yaml", "--ckpt_path"], ["generate", "--prompt=Hi", "--ckpt_path"]):
        said = stopped_with(capsys, *words, last)
        assert "of a newer version (format 1000, this knows 1): update it" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_of_another_model_is_named_as_such(folder, capsys, model_folder, command):
    main(["fit", "--config", "config.yaml"])
    words = ["--config=config.yaml", f"--model.policy.model_name={model_folder('llama')}", "--ckpt_path=last"]
    said = stopped_with(capsys, command, *words)
    assert "the checkpoint is of another model, its weights do not fit model.policy.model_name=/" in said
    assert " in the checkpoint, (" in said
    assert said.count("\n") == 1


def test_a_run_does_not_go_on_from_weights_alone(folder, capsys):
    main(["fit", *save({"every_n_train_steps": 1, "save_weights_only": True})])
    for words in (["fit"], ["doctor", "--sample=false"]):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*words, "--config=config.yaml", "--ckpt_path=last"])
        said = capsys.readouterr()
        assert "no run can go on from save_weights_only: evaluate it, or export it" in "".join(said)
    cli = main(["validate", "--config=config.yaml", "--ckpt_path=last"])
    assert torch.load(cli.trainer.ckpt_path, weights_only=True)["global_step"] == 3


def test_load_from_checkpoint_says_that_it_needs_the_reward(tmp_path):
    fit(tmp_path, max_steps=1).save_checkpoint(tmp_path / "run.ckpt")
    kind = type(make_module())
    with pytest.raises(TypeError, match="missing a required argument: 'reward'"):
        kind.load_from_checkpoint(tmp_path / "run.ckpt")
    assert kind.load_from_checkpoint(tmp_path / "run.ckpt", reward=DigitReward()).policy is not None


# Several machines -----------------------------------------------------------------------------------------------------


def node(place, rank, port, *words):
    """Runs the command as torchrun does on a machine of one rank, in its folder; returns the process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.chdir(place)
        sys.stdout = sys.stderr = open("output.txt", "w")  # noqa: SIM115
        ranks = {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
        cli = main(list(words))
        torch.save(
            {
                "weights": cli.model.state_dict(),
                "step": cli.trainer.global_step,
                "folder": str(run_folder(cli.trainer)),
            },
            "end.pt",
        )
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_on_two_machines(folder, *words):
    """Their exit codes and outputs; each has a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [folder / name for name in ("first", "second")]
    ids = [node(place, rank, port, *words, "--trainer.num_nodes=2") for rank, place in enumerate(places)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ids]
    return codes, [(place / "output.txt").read_text() for place in places]


@pytest.mark.slow  # three runs of two processes
def test_what_the_first_machine_finds_is_sent_to_one_without_a_shared_disk(folder):
    for name in ("first", "second"):
        (folder / name).mkdir()
        for file in ("config.yaml", "rows.jsonl"):
            shutil.copy(folder / file, folder / name)
    words = ["fit", "--config=config.yaml", "--trainer.devices=1"]
    codes, said = run_on_two_machines(folder, *words)
    assert codes == [0, 0], said
    (folder / "second" / "runs" / "r" / "version_6").mkdir(parents=True)  # it does not go on beside this
    codes, said = run_on_two_machines(folder, *words, "--trainer.max_steps=4", "--ckpt_path=last")
    assert codes == [0, 0], said
    assert "resuming runs/r/version_0/checkpoints/last.ckpt" in said[0]
    mine, other = (torch.load(folder / name / "end.pt", weights_only=True) for name in ("first", "second"))
    assert mine["step"] == other["step"] == 4
    assert mine["folder"] == other["folder"] == "runs/r/version_0"
    assert all(torch.equal(value, other["weights"][name]) for name, value in mine["weights"].items())
    assert not list((folder / "second" / "runs").rglob("*.ckpt"))
    assert len(logged(folder / "first" / "runs" / "r" / "version_0")) == 6  # four steps and two validations
    codes, said = run_on_two_machines(folder, *words, "--ckpt_path=best")
    assert codes == [2, 2], said
    assert all("has no best one" in each for each in said)


LORA = PolicyConfig("tiny", lora=LoRAConfig(rank=2))


def evaluated(tmp_path, policy, **options):
    """The metrics of an evaluation of `run.ckpt`, and the policy that it had."""
    trainer, module = make_trainer(tmp_path, limit_val_batches=1, **options), make_module(policy)
    trainer.validate(module, datamodule=make_data(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    return dict(trainer.callback_metrics), module.policy_config


@pytest.mark.parametrize("policy", [LORA, PolicyConfig("tiny", dtype="bfloat16"), PolicyConfig("tiny", adapter="a")])
def test_an_evaluation_takes_adapter_and_dtype_from_the_checkpoint(tmp_path, monkeypatch, caplog, policy):
    monkeypatch.chdir(tmp_path)
    save_adapter(Policy(load_model(LORA), LORA), "a")
    fit(tmp_path, make_module(policy), max_steps=1).save_checkpoint(tmp_path / "run.ckpt")
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        metrics, used = evaluated(tmp_path, PolicyConfig("tiny"))
    assert used == policy
    assert (metrics, used) == evaluated(tmp_path, policy)
    (line,) = [text for text in caplog.messages if text.endswith("as in the checkpoint's run")]
    assert line.startswith("model.policy.")


def test_what_the_user_gives_wins_over_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = PolicyConfig("tiny", dtype="bfloat16")
    fit(tmp_path, make_module(half), max_steps=1).save_checkpoint(tmp_path / "run.ckpt")
    assert evaluated(tmp_path, PolicyConfig("tiny", dtype="float32"))[1].dtype == "float32"
    assert evaluated(tmp_path, "tiny", precision="bf16-mixed")[1].dtype is None
    fit(tmp_path, make_module(LORA), max_steps=1).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ConfigError, match="r=4 differs from 2 of the checkpoint's adapter"):
        evaluated(tmp_path, PolicyConfig("tiny", lora=LoRAConfig(rank=4)))
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    content["hyper_parameters"]["policy"]["adapter"] = "somebody/adapter"  # which would be fetched
    content["hyper_parameters"]["policy"]["lora"]["rank"] = "a"
    torch.save(content, tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match=r"model.policy.lora=.* cannot be used"):
        evaluated(tmp_path, "tiny")
