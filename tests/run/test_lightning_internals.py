"""Lightning's private fields and behaviour that a run depends on: these fail first when a release changes one.

Each test drives Lightning alone, with its own demo model, and states what `run/lightning_internals.py`,
`run/step_end.py` (ModelCheckpoint) and `run/metrics_file.py` take for granted.
"""

import copy
import os
import signal
from datetime import timedelta

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO, XLACheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment

from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.run.fsdp_strategy import FSDP2Strategy
from stateset_lightning.run.lightning_internals import (
    continue_version,
    replace_checkpoint_io,
    requeue_signal,
    search_with,
    set_writer,
    turn_back_to_last_batch,
    validate_now,
    validation_follows,
    with_all_ranks,
    writer_of,
)


class Model(BoringModel):
    """64 batches an epoch; keeps after how many of them it was validated."""

    def __init__(self):
        super().__init__()
        self.batches, self.validated = 0, []

    def on_train_batch_end(self, *args):
        self.batches += 1

    def on_validation_start(self):
        self.validated.append(self.batches)


class Hook(Callback):
    """One hook of a callback."""

    def __init__(self, name, call):
        setattr(self, name, call)


def fit(folder, *callbacks, ckpt_path=None, **options):
    fixed = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"max_steps": 7, "limit_val_batches": 1, "num_sanity_val_steps": 0, **fixed, **options}
    trainer = Trainer(default_root_dir=folder, callbacks=list(callbacks), enable_checkpointing=keeps, **options)
    trainer.fit(Model(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("options", "stop", "expected"),
    [
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, None, [3, 6]),
        ({"limit_train_batches": 3}, None, [3, 6]),
        ({"limit_train_batches": 3}, 4, [3, 4]),
    ],
    ids=["interval", "epochs", "early stop"],
)
def test_it_is_known_beforehand_that_a_validation_follows(tmp_path, options, stop, expected):
    followed = []

    def ends(trainer, module, *args):
        trainer.should_stop = trainer.global_step == stop
        if validation_follows(trainer):
            followed.append(module.batches + 1)

    trainer = fit(tmp_path, Hook("on_train_batch_end", ends), **options)
    assert trainer.lightning_module.validated == followed == expected


def test_a_validation_of_ones_own_leaves_a_resumed_run_to_go_on(tmp_path):
    """Without `_has_run` reset, the loop counts the resumed epoch as done, and trains no further batch."""
    save = Hook("on_train_epoch_end", lambda trainer, module: trainer.save_checkpoint(tmp_path / "end.ckpt"))
    fit(tmp_path, save, max_steps=-1, max_epochs=1, limit_train_batches=3, limit_val_batches=0)
    options = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 3, "val_check_interval": 3}
    start = Hook("on_train_start", lambda trainer, module: validate_now(trainer))
    resumed = fit(tmp_path, start, ckpt_path=tmp_path / "end.ckpt", **options)
    assert resumed.global_step == 9
    assert resumed.lightning_module.validated[0] == 0


def test_an_epochs_end_is_turned_back_to_its_last_batch(tmp_path):
    saved = {}

    def save(place):
        def keep(trainer, module, *args):
            loops = trainer._checkpoint_connector.dump_checkpoint()["loops"]["fit_loop"]
            saved[place] = copy.deepcopy(loops)

        return keep

    hooks = [Hook(name, save(name)) for name in ("on_train_batch_end", "on_train_epoch_end")]
    fit(tmp_path, *hooks, max_steps=-1, max_epochs=2, limit_train_batches=3, limit_val_batches=0)
    batch, epoch = saved["on_train_batch_end"], saved["on_train_epoch_end"]
    assert epoch != batch
    turn_back_to_last_batch(epoch)
    assert epoch == batch
    turn_back_to_last_batch(epoch)  # there is nothing to take from it
    assert epoch == batch


@pytest.mark.parametrize(("auto_requeue", "expected"), [(True, signal.SIGUSR2), (False, None)])
def test_slurms_signal_is_known(monkeypatch, auto_requeue, expected):
    for name in ("NTASKS", "JOB_ID", "PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "1" if name in ("NTASKS", "JOB_ID") else "0")
    slurm = SLURMEnvironment(auto_requeue=auto_requeue, requeue_signal=signal.SIGUSR2)
    assert requeue_signal(Trainer(accelerator="cpu", devices=1, logger=False, plugins=[slurm])) == expected


def test_without_slurm_there_is_no_signal():
    assert requeue_signal(Trainer(accelerator="cpu", logger=False)) is None


def test_a_csv_logger_writes_with_what_it_is_given(tmp_path):
    logger, writer = CSVLogger(tmp_path, "a", version=0), ExperimentWriter(str(tmp_path / "mine"))
    assert writer_of(logger) is None
    set_writer(logger, writer)
    logger.log_metrics({"x": 1.0}, step=1)
    logger.save()
    assert (tmp_path / "mine" / "metrics.csv").read_text() == "step,x\n1,1.0\n"


def test_lightnings_writer_deletes_an_earlier_file_where_metrics_file_does_not(tmp_path):
    class Keeps(ExperimentWriter):
        def _check_log_dir_exists(self):
            pass

    file = tmp_path / "metrics.csv"
    file.write_text("step\n")
    Keeps(str(tmp_path))
    assert file.exists()
    with pytest.warns(UserWarning, match="will be deleted"):
        ExperimentWriter(str(tmp_path))
    assert not file.exists()


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize(("folder", "version"), [("version_7", 7), ("mine", "mine")])
def test_a_logger_goes_on_in_the_folder_of_a_run(tmp_path, kind, folder, version):
    if kind is TensorBoardLogger:
        pytest.importorskip("tensorboard")
    logger, given = kind(tmp_path, "a"), kind(tmp_path, "a", version=3)
    for each in (logger, given):
        continue_version(each, folder)
    assert (logger.version, given.version) == (version, 3)
    assert logger.log_dir == str(tmp_path / "a" / folder)


def test_a_wandb_logger_goes_on_under_an_id(tmp_path):
    logger, given = WandbLogger(save_dir=tmp_path, offline=True), WandbLogger(save_dir=tmp_path, id="own", offline=True)
    for each in (logger, given):
        continue_version(each, "x1y2z3")
    assert (logger.version, given.version) == ("x1y2z3", "own")
    assert logger._wandb_init["id"] == "x1y2z3"  # what `wandb.init` is called with
    assert logger._wandb_init["resume"] == "allow"


# ModelCheckpoint, in step_end.py --------------------------------------------------------------------------------------


def test_a_model_checkpoint_tells_its_triggers(tmp_path):
    assert ModelCheckpoint(every_n_train_steps=3)._every_n_train_steps == 3
    assert ModelCheckpoint(every_n_epochs=2)._every_n_train_steps == 0
    timed, clocks = ModelCheckpoint(tmp_path, train_time_interval=timedelta(0)), []
    look = Hook("on_train_batch_start", lambda *args: clocks.append(timed._last_time_checked))
    fit(tmp_path, timed, look, max_steps=3)
    assert len(set(clocks)) == 3  # it moves whenever the time is up
    rare, clocks = ModelCheckpoint(tmp_path, train_time_interval=timedelta(days=1)), []
    look = Hook("on_train_batch_start", lambda *args: clocks.append(rare._last_time_checked))
    fit(tmp_path, rare, look, max_steps=3)
    assert len(set(clocks)) == 1


def test_a_model_checkpoint_tells_when_it_saves_in_an_epoch(tmp_path):
    at_end, at_validation = (
        ModelCheckpoint(tmp_path, save_on_train_epoch_end=end, every_n_epochs=1 + (not end)) for end in (True, False)
    )
    trainer = fit(tmp_path, at_end, at_validation, limit_train_batches=3)
    assert at_end._should_save_on_train_epoch_end(trainer)
    assert not at_validation._should_save_on_train_epoch_end(trainer)


@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_last_checkpoint_can_be_written_without_the_best_taking_notice(tmp_path, save_last):
    """What LastCheckpoint does: `last` becomes a file of this step, and the step counts as not yet saved."""
    keeps = ModelCheckpoint(tmp_path, filename="best", every_n_train_steps=2, save_last=save_last)

    def save(trainer, module, *args):
        if trainer.global_step == 3:
            assert not keeps._should_skip_saving_checkpoint(trainer)
            step = keeps._last_global_step_saved
            assert step == 2
            if os.path.islink(keeps.last_model_path):
                os.remove(keeps.last_model_path)
            keeps._last_checkpoint_saved = ""
            keeps._save_last_checkpoint(trainer, keeps._monitor_candidates(trainer))
            assert not os.path.islink(tmp_path / "last.ckpt")
            assert keeps._last_global_step_saved == 3
            assert keeps._should_skip_saving_checkpoint(trainer)
            keeps._last_global_step_saved = step
            assert not keeps._should_skip_saving_checkpoint(trainer)

    fit(tmp_path, keeps, Hook("on_train_batch_end", save), max_steps=3)
    assert keeps.last_model_path == str(tmp_path / "last.ckpt")
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


def test_a_trainer_asks_for_the_file_that_a_ckpt_path_names_after_it_has_met_its_module(tmp_path):
    file = tmp_path / "some.ckpt"
    fit(tmp_path).save_checkpoint(file)
    asked = []

    class Searching(Model):
        trainer = Model.trainer.setter(
            lambda self, trainer: (
                search_with(trainer, lambda trainer, path: asked.append((trainer.state.fn, path)) or str(file)),
                Model.trainer.fset(self, trainer),
            )
        )

    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, max_steps=8, barebones=True)
    for name in ("fit", "validate", "test", "predict"):
        getattr(trainer, name)(Searching(), ckpt_path="last")
        assert trainer.ckpt_path == str(file)
        trainer.validate(Searching())  # without a path it is not asked
    assert asked == [(name, "last") for name in ("fit", "validate", "test", "predict")]


@pytest.mark.parametrize("strategy", ["ddp", FSDP2Strategy()], ids=["ddp", "fsdp2"])
def test_ranks_are_connected_before_a_run_and_once(monkeypatch, strategy):
    """Both strategies have their own method, of which one is private; a run calls it again."""
    ids = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "GROUP_RANK": 0}
    for name, value in {**ids, "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, str(value))
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
    assert trainer.world_size == 1
    try:
        for _ in range(2):
            assert with_all_ranks(trainer, torch.distributed.get_world_size) == 1
        gloo = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert gloo.options._threads == (2 if strategy == "ddp" else 1)  # two crash the process under fsdp2
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrappers", [0, 1, 2])
def test_a_plain_writer_is_replaced_inside_all_that_wrap_it(wrappers):
    plugin = None
    for _ in range(wrappers):
        plugin = AsyncCheckpointIO(plugin)
    trainer = Trainer(accelerator="cpu", logger=False, plugins=[plugin] if plugin else None)
    mine = AtomicCheckpointIO()
    replace_checkpoint_io(trainer, XLACheckpointIO, mine)  # none is of that kind
    assert mine not in writers(trainer)
    replace_checkpoint_io(trainer, TorchCheckpointIO, mine)
    assert writers(trainer)[wrappers:] == [mine]


def writers(trainer):
    """The checkpoint plugins, the outermost first."""
    found = [trainer.strategy.checkpoint_io]
    while (inner := getattr(found[-1], "checkpoint_io", None)) is not None:
        found.append(inner)
    return found
