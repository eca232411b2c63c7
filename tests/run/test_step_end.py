"""Saves, stops and signals inside an optimizer step wait for its end; what a signal ends goes on exactly; `last` is the
newest state after every opportunity to save, and a run goes on from it exactly.
"""

import asyncio
import csv
import os
import signal
import threading
from collections import Counter
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from module_runs import DigitReward, accumulating_run as run, assert_same_end, end_state, fit, make_data, make_module

from stateset_lightning import threads
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import BatchReward
from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO

# every other one inside a step
VALIDATING = {"limit_val_batches": 1.0, "val_check_interval": 3, "check_val_every_n_epoch": None}


class Sends(Callback):
    """Sends a signal to this process, or raises, when the hook is called for the `count`-th time."""

    def __init__(self, hook, count, what):
        self.count, self.what = count, what
        setattr(self, hook, self.strike)

    def strike(self, *args, **kwargs):
        self.count -= 1
        if self.count == 0:
            if isinstance(self.what, signal.Signals):
                os.kill(os.getpid(), self.what)
            else:
                raise self.what


def steps_saved(folder):
    """Optimizer steps done and micro-steps completed, as the checkpoints of a folder have them."""
    states = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.ckpt"))]
    loaders = [state["ScenarioDataModule"]["train"] for state in states]
    return [
        (state["global_step"], loader["completed"] + 16 * loader["epoch"])
        for state, loader in zip(states, loaders, strict=True)
    ]


def test_timed_saves_come_at_the_end_of_steps_only(tmp_path):
    timed = ModelCheckpoint(tmp_path / "c", train_time_interval=timedelta(0), save_top_k=-1, filename="{step}")
    run(tmp_path, timed, enable_checkpointing=True)
    assert steps_saved(tmp_path / "c") == [(step, 2 * step) for step in range(1, 7)]


def test_a_save_by_a_validation_inside_a_step_comes_at_its_end(tmp_path):
    best = ModelCheckpoint(tmp_path / "c", monitor="val/reward", mode="max", save_top_k=-1, filename="{step}")
    run(tmp_path, best, enable_checkpointing=True, **VALIDATING)
    # validations after micro-steps 3, 6, 9 and 12
    assert steps_saved(tmp_path / "c") == [(2, 4), (3, 6), (5, 10), (6, 12)]


def test_a_resumed_run_does_not_save_inside_its_first_step(tmp_path):
    run(
        tmp_path / "a",
        ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, filename="{step}"),
        enable_checkpointing=True,
        max_steps=2,
    )
    again = ModelCheckpoint(tmp_path / "d", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    run(tmp_path / "b", again, enable_checkpointing=True, ckpt_path=tmp_path / "c" / "step=2.ckpt")
    assert steps_saved(tmp_path / "d") == [(4, 8), (6, 12)]


def test_a_stop_inside_a_step_comes_at_its_end(tmp_path):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch.micro_step == 2:
                trainer.should_stop = True

    trainer = run(tmp_path, Stops())
    assert trainer.global_step == 2
    assert not trainer.lightning_module.inside_optimizer_step


def test_a_save_of_ones_own_inside_a_step_is_refused(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "mine.ckpt")

    with pytest.raises(ConfigError, match="inside an optimizer step, whose gradient so far no checkpoint holds"):
        run(tmp_path, Saves())


@pytest.mark.parametrize(
    "callback", [OnExceptionCheckpoint("x"), ModelCheckpoint(save_on_exception=True)], ids=lambda c: type(c).__name__
)
def test_saves_on_any_exception_are_refused(tmp_path, callback, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the refusal is an exception, on which the callback saves
    with pytest.raises(ConfigError, match=f"{type(callback).__name__} saves in the middle of whatever failed"):
        run(tmp_path, callback, enable_checkpointing=True)


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
def test_an_exception_saves_nothing(tmp_path, error):
    with pytest.raises((OSError, SystemExit)):
        run(tmp_path, Sends("on_train_batch_end", 3, error))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return end_state(folder, run(folder, **VALIDATING))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("hook", "count", "step"),
    [
        ("on_train_batch_start", 3, 2),
        ("on_train_batch_end", 3, 2),
        ("on_train_batch_end", 4, 2),
        ("on_validation_batch_end", 3, 3),
        ("on_validation_batch_end", 2, 2),
        ("on_validation_batch_end", 8, 6),
    ],
)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint_from_which_it_goes_on_exactly(
    tmp_path, straight, sent, hook, count, step, capfd
):
    handler = signal.getsignal(sent)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, Sends(hook, count, sent), **VALIDATING)
    assert ended.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    assert signal.getsignal(sent) == handler
    path = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    said = capfd.readouterr()
    assert f"{sent.name}: ending after this optimizer step with a last checkpoint" in said.err
    assert f"after optimizer step {step}; resume with --ckpt_path {path}" in said.out
    assert_same_end(straight, end_state(tmp_path, run(tmp_path, ckpt_path=path, **VALIDATING)))


@pytest.mark.parametrize(
    ("limits", "last_step"),
    [
        ({"max_steps": -1, "max_epochs": 2}, 16),
        ({"max_steps": 11, "max_epochs": 9}, 11),
        ({"max_steps": 11, "max_epochs": 9, "val_check_interval": 16, "check_val_every_n_epoch": None}, 11),
    ],
    ids=["max_epochs", "max_steps", "val_check_interval"],
)
@pytest.mark.parametrize(("hook", "count"), [("on_train_batch_end", 16), ("on_validation_batch_end", 1)])
def test_a_run_that_a_signal_ended_at_the_end_of_an_epoch_goes_on_exactly(tmp_path, limits, last_step, hook, count):
    options = {**limits, "limit_val_batches": 1.0}  # an epoch has 16 micro-steps, and then a validation of two batches
    expected = end_state(tmp_path / "a", run(tmp_path / "a", **options))
    path = tmp_path / "b" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    for sends, ckpt_path in [
        (Sends(hook, count, signal.SIGTERM), None),
        (Sends("on_validation_batch_end", 1, signal.SIGTERM), path),
    ]:
        with pytest.raises(SystemExit):
            run(tmp_path / "b", sends, ckpt_path=ckpt_path, **options)
        assert torch.load(path, weights_only=True)["global_step"] == 8
    resumed = run(tmp_path / "b", ckpt_path=path, **options)
    assert resumed.global_step == last_step
    assert_same_end(expected, end_state(tmp_path / "b", resumed))


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing(tmp_path):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *(Sends("on_train_batch_start", n, signal.SIGINT) for n in (2, 3)), accumulate_grad_batches=4)
    assert ended.value.code == 130
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_checkpoint_lies_beside_the_others_and_is_found_by_them(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, save_last=True, filename="{step}")
    with pytest.raises(SystemExit):
        run(tmp_path, checkpoints, Sends("on_train_batch_end", 5, signal.SIGTERM), enable_checkpointing=True)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["last.ckpt", "step=2.ckpt"]
    assert torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)["global_step"] == 3
    resumed = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, save_last=True, filename="{step}")
    run(tmp_path, resumed, ckpt_path=tmp_path / "c" / "last.ckpt", enable_checkpointing=True)
    assert resumed.last_model_path == str(tmp_path / "c" / "last.ckpt")  # not last-v1.ckpt
    assert torch.load(resumed.last_model_path, weights_only=True)["global_step"] == 6


def test_under_slurm_the_requeue_signal_waits_for_the_end_of_the_step(tmp_path, monkeypatch):
    for name, value in {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    requeued = []
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.signal_connector.call",
        lambda command, **options: requeued.append(command) or 0,
    )
    trainer = run(tmp_path, Sends("on_train_batch_start", 3, signal.SIGUSR1))
    assert requeued == [["scontrol", "requeue", "7"]]
    assert trainer.global_step == 6
    assert steps_saved(tmp_path) == [(2, 4)]


EVERY_SECOND = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


MONITORED = {"monitor": "val/reward", "mode": "max", "save_last": True, "filename": "{step}"}


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
        ({}, EVERY_SECOND, [None, None, 2, 2, 4, 4, 6]),
        ({"save_last": "link"}, EVERY_SECOND, [None, None, 2, 2, 4, 4, 6]),
        ({"save_top_k": 2}, EVERY_SECOND, [None, None, 2, 2, 4, 4, 6]),
        ({"save_top_k": 0}, EVERY_SECOND, [None, None, 2, 2, 4, 4, 6]),
        ({}, {"limit_val_batches": 1.0}, [None, None, 2, 2, 4, 4, 6]),
        ({"monitor": "train/reward"}, {}, [None, None, 2, 2, 4, 4, 6]),
        ({"every_n_epochs": 2}, EVERY_SECOND, [None, None, None, None, 4, 4, 4]),
        ({"every_n_train_steps": 1}, EVERY_SECOND, [None, 1, 2, 3, 4, 5, 6]),
        ({"every_n_train_steps": 1, "save_last": "link"}, EVERY_SECOND, [None, 1, 2, 3, 4, 5, 6]),
        ({"every_n_train_steps": 3}, {"limit_val_batches": 1.0}, [None, None, None, 3, 3, 3, 6]),
        ({"train_time_interval": timedelta(0)}, EVERY_SECOND, [None, 1, 2, 3, 4, 5, 6]),
        ({"train_time_interval": timedelta(days=1)}, EVERY_SECOND, [None] * 7),
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
    again = [entry for entry, count in Counter(written).items() if count > 1]  # before a validation, and after it
    assert set(again) <= {(str(looks.file), step) for step in (2, 4, 6)}


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_best_stays_what_it_was(tmp_path, save_last):
    keeps = ModelCheckpoint(tmp_path / "c", **{**MONITORED, "save_last": save_last})
    unchanging_run(tmp_path, keeps, **EVERY_SECOND)
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
    unchanging_run(tmp_path, keeps, plugins=[Plain()], **EVERY_SECOND)
    assert (step_of(keeps.best_model_path), step_of(keeps.last_model_path)) == (2, 7)


def test_one_keeps_the_best_and_another_the_last(tmp_path):
    best = ModelCheckpoint(tmp_path / "c", monitor="val/reward", mode="max", filename="{step}")
    last = ModelCheckpoint(tmp_path / "c", train_time_interval=timedelta(0), save_top_k=0, save_last=True)
    unchanging_run(tmp_path, best, last, **EVERY_SECOND)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["last.ckpt", "step=2.ckpt"]
    assert step_of(tmp_path / "c" / "last.ckpt") == 7


def test_a_run_that_stops_early_keeps_its_last_state(tmp_path):
    keeps = ModelCheckpoint(tmp_path / "c", **MONITORED)
    trainer, _ = unchanging_run(tmp_path, EarlyStopping("val/reward", patience=1, mode="max"), keeps, **EVERY_SECOND)
    assert trainer.global_step == 4
    assert step_of(keeps.last_model_path) == 4


class LooksWhileValidating(Looks):
    """The same as each validation begins."""

    def on_train_batch_start(self, *args):
        """Does not look."""

    def on_validation_start(self, *args):
        self.seen.append(step_of(self.file) if self.file.exists() else None)


@pytest.mark.parametrize("saves", [{"train_time_interval": timedelta(0)}, {"every_n_train_steps": 2}], ids=str)
@pytest.mark.parametrize("save_last", [True, "link"])
def test_what_may_be_saved_is_saved_before_a_validation_which_may_be_long(tmp_path, saves, save_last):
    looks = LooksWhileValidating(tmp_path / "c")
    keeps = ModelCheckpoint(tmp_path / "c", **{**MONITORED, "save_last": save_last}, **saves)
    unchanging_run(tmp_path, looks, keeps, **EVERY_SECOND)
    assert looks.seen == [2, 4, 6]


@pytest.mark.parametrize(
    ("saves", "kept"),
    [
        ({}, {7}),
        ({"save_top_k": -1}, {2, 4, 6, 7}),
        ({"every_n_epochs": 2}, {7}),
        ({"every_n_train_steps": 3}, {7}),
        ({"every_n_train_steps": 3, "save_top_k": -1}, {3, 6, 7}),
        ({"every_n_train_steps": 100}, {7}),
        ({"train_time_interval": timedelta(days=1)}, {7}),
        ({"monitor": "train/reward", "mode": "max"}, {2}),  # keeps what is best, not what is newest
    ],
    ids=str,
)
def test_the_last_steps_are_saved_where_the_interval_does_not_divide(tmp_path, saves, kept):
    unchanging_run(tmp_path, ModelCheckpoint(tmp_path / "c", filename="{step}", **saves))
    assert {step_of(file) for file in (tmp_path / "c").iterdir()} == kept
    assert {file.stem for file in (tmp_path / "c").iterdir()} == {f"step={step}" for step in kept}


@pytest.mark.parametrize(
    ("callback", "validation", "said"),
    [
        (ModelCheckpoint(save_top_k=0), {}, ["no checkpoint was saved"]),
        (
            ModelCheckpoint(monitor="train/rewardd"),
            {},
            ["no checkpoint was saved", "ModelCheckpoint.monitor=train/rewardd was never logged"],
        ),
        (
            ModelCheckpoint(monitor="train/reward", mode="max", train_time_interval=timedelta(days=1)),
            {},
            ["no checkpoint was saved"],
        ),
        (
            EarlyStopping("policy/kl", check_on_train_epoch_end=False),
            {},
            ["EarlyStopping.monitor=policy/kl was never logged"],
        ),
        (ModelCheckpoint(monitor="step"), {}, []),
        (ModelCheckpoint(monitor="val/reward", mode="max"), EVERY_SECOND, []),
        (ModelCheckpoint(), {}, []),
    ],
)
def test_a_run_that_saved_nothing_or_whose_monitor_never_came_says_so(tmp_path, callback, validation, said, caplog):
    class Own(Callback):
        """May log anything, so that no monitor can be refused at the start."""

    # Lightning itself fails on a missing metric once a validation has run; here none runs.
    unchanging_run(tmp_path, callback, Own(), max_steps=3, **validation)
    warned = [record.getMessage() for record in caplog.records if record.name == "stateset_lightning"]
    for text in said:
        assert any(text in line for line in warned), (text, warned)
    if not said:
        assert not [line for line in warned if "never logged" in line or "no checkpoint" in line]


@pytest.mark.parametrize("saves", [{"every_n_train_steps": 2}, {"every_n_train_steps": 2, "save_last": True}], ids=str)
def test_runs_that_share_a_folder_leave_each_others_last_alone(tmp_path, saves):
    def stopped_run(name, ckpt_path=None, at=5):
        keeps = ModelCheckpoint(tmp_path / "c", filename=name + "-{step}", **saves)
        with pytest.raises(SystemExit):
            run(
                tmp_path / name,
                keeps,
                Sends("on_train_batch_end", at, signal.SIGTERM),
                enable_checkpointing=True,
                ckpt_path=ckpt_path,
            )
        return keeps.last_model_path

    first, second = stopped_run("a"), stopped_run("b")
    assert [os.path.basename(path) for path in (first, second)] == ["last.ckpt", "last-v1.ckpt"]
    before = os.stat(second).st_mtime_ns
    # From its last, and from a file that knows of none.
    assert stopped_run("a", first, at=1) == first
    assert step_of(first) == 4
    assert stopped_run("a", tmp_path / "c" / "a-step=2.ckpt", at=1) == first
    assert step_of(first) == 3
    # Another run that goes on from there, in a folder of its own.
    assert os.path.basename(stopped_run("d", first, at=1)) == "last-v2.ckpt"
    assert (step_of(first), step_of(second), os.stat(second).st_mtime_ns) == (3, 3, before)


def test_several_callbacks_of_a_run_share_a_folder_and_no_file(tmp_path):
    def callbacks():
        weights = ModelCheckpoint(tmp_path / "c", save_last=True, save_weights_only=True, every_n_train_steps=2)
        whole = ModelCheckpoint(tmp_path / "c", save_last=True, train_time_interval=timedelta(0), save_top_k=0)
        return [weights, whole]

    first = callbacks()
    run(tmp_path, *first, max_steps=3, enable_checkpointing=True)
    again = callbacks()
    run(tmp_path, *again, max_steps=5, enable_checkpointing=True, ckpt_path=first[1].last_model_path)
    assert [c.last_model_path for c in again] == [c.last_model_path for c in first]
    assert len({c.last_model_path for c in again}) == 2
    whole = torch.load(again[1].last_model_path, weights_only=True)
    assert whole["global_step"] == 5
    assert "optimizer_states" in whole


def test_without_save_last_there_is_no_last(tmp_path):
    unchanging_run(tmp_path, ModelCheckpoint(tmp_path / "c", **{**MONITORED, "save_last": None}), **EVERY_SECOND)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step=2.ckpt"]


@pytest.mark.parametrize(
    "validation", [{"limit_val_batches": 1.0}, {**EVERY_SECOND, "val_check_interval": 3}], ids=["epochs", "interval"]
)
@pytest.mark.parametrize("steps", [8, 9], ids=["the epoch's end", "mid-epoch"])
def test_a_longer_run_goes_on_exactly_from_the_last_state_of_a_shorter_one(tmp_path, validation, steps):
    straight = end_state(tmp_path / "a", run(tmp_path / "a", max_steps=12, **validation))
    keeps = ModelCheckpoint(tmp_path / "c", save_top_k=0, **MONITORED)
    run(tmp_path / "b", keeps, max_steps=steps, enable_checkpointing=True, **validation)
    assert step_of(keeps.last_model_path) == steps
    assert_same_end(
        straight,
        end_state(tmp_path / "b", run(tmp_path / "b", ckpt_path=keeps.last_model_path, max_steps=12, **validation)),
    )


@pytest.mark.parametrize("validation", [{"limit_val_batches": 1.0}, {}], ids=["validation", "no validation"])
def test_a_run_goes_on_exactly_from_a_save_at_an_epochs_end(tmp_path, validation):
    # 16 steps: a second end of the first epoch would make it the last
    options = {"max_steps": 20, "max_epochs": 2, **validation}
    straight = end_state(tmp_path / "a", run(tmp_path / "a", **options))
    keeps = ModelCheckpoint(tmp_path / "c", filename="{step}", save_top_k=-1)
    run(tmp_path / "b", keeps, enable_checkpointing=True, **{**options, "max_steps": 9})
    file = tmp_path / "c" / "step=8.ckpt"
    assert_same_end(straight, end_state(tmp_path / "b", run(tmp_path / "b", ckpt_path=file, **options)))


def test_files_are_named_by_the_step_that_they_hold(tmp_path):
    """Also after a validation, which logs a `step` of its own as its place on the x-axis."""
    by_step = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    best = ModelCheckpoint(tmp_path / "best", filename="{step}", monitor="val/reward", mode="max", save_top_k=-1)
    run(tmp_path, by_step, best, max_steps=7, enable_checkpointing=True, **{**EVERY_SECOND, "val_check_interval": 3})
    named = {path.stem: step_of(path) for folder in ("c", "best") for path in (tmp_path / folder).iterdir()}
    assert named == {f"step={step}": step for step in range(1, 8)}
    with (tmp_path / "run" / "version_0" / "metrics.csv").open(newline="") as lines:
        validated = [int(row["step"]) for row in csv.DictReader(lines) if row["val/reward"]]
    assert validated == [1, 3, 4, 6]  # steps done as micro-steps 3, 6, 9 and 12 ended


def test_checkpoints_of_the_best_validations_are_kept(tmp_path):
    best = ModelCheckpoint(tmp_path / "c", monitor="val/reward", mode="max", save_top_k=2, filename="{step}")
    fit(tmp_path, callbacks=[best], enable_checkpointing=True, max_steps=4, **{**VALIDATING, "val_check_interval": 1})
    assert len(list((tmp_path / "c").glob("*.ckpt"))) == 2
    assert best.best_model_score == max(best.best_k_models.values())


def test_max_epochs_and_max_time_end_a_run(tmp_path):
    assert fit(tmp_path, max_steps=-1, max_epochs=3).global_step == 6  # two episodes of four prompts make an epoch
    assert fit(tmp_path, max_steps=-1, max_time={"seconds": 1}).global_step > 0


class HangsReward(DigitReward):
    """Sends a signal in its `count`-th call and never returns."""

    timeout = None

    def __init__(self, count, sent):
        super().__init__(name="digit")
        self.count, self.sent = count, sent

    def compute_reward(self, turns, context=None):
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), self.sent)
            threading.Event().wait(60)
        return super().compute_reward(turns, context)


class HangsAsync(HangsReward):
    async def compute_reward(self, turns, context=None):
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), self.sent)
            await asyncio.sleep(60)
        return DigitReward.compute_reward(self, turns, context)


class HangsBatch(BatchReward):
    def __init__(self, count, sent):
        super().__init__(name="digit")
        self.one = HangsReward(count, sent)

    def compute_rewards(self, turns, contexts):
        return [self.one.compute_reward(*pair) for pair in zip(turns, contexts, strict=True)]


@pytest.mark.parametrize(
    (
        "kind",
        "count",
        "step",
    ),  # 16 completions of an episode of four steps, 4 of a validation: inside steps 2, 5; after 3
    [
        (HangsReward, 5, 0),
        (HangsReward, 18, 1),
        (HangsReward, 22, 3),
        (HangsReward, 27, 4),
        (HangsReward, 42, 4),
        (HangsAsync, 27, 4),
        (HangsBatch, 27, 4),
    ],
)
def test_a_signal_cuts_off_a_reward_that_hangs(tmp_path, straight, monkeypatch, kind, count, step):
    monkeypatch.setattr(threads, "_WAIT_SECONDS", 0.05)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, reward=kind(count, signal.SIGTERM), **VALIDATING)
    assert ended.value.code == 143
    path = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    assert step_of(path) == step
    resumed = run(tmp_path, ckpt_path=path, accept_changes=["rewards"], **VALIDATING)
    assert not resumed.lightning_module.metrics.last.get("reward_failures/digit/Interruption")
    assert_same_end(straight, end_state(tmp_path, resumed))
