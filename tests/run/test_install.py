"""What every run gets, and what stays as the user chose it."""

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from module_runs import fit, make_data, make_module

from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.run.last_checkpoint import LastCheckpoint
from stateset_lightning.run.metrics_file import MetricsFile
from stateset_lightning.run.step_end import StepEnd


def test_a_run_has_one_of_each_however_often_it_fits(tmp_path):
    module, keeps = make_module(), ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(tmp_path, module, max_steps=1, callbacks=[keeps], enable_checkpointing=True)
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(module, make_data())
    ours = [type(callback) for callback in trainer.callbacks if isinstance(callback, StepEnd | LastCheckpoint)]
    assert ours == [StepEnd, LastCheckpoint]
    assert trainer.callbacks[-1] is not keeps  # it comes after every ModelCheckpoint


def test_a_run_gets_our_writers_and_only_what_it_needs(tmp_path):
    trainer = fit(tmp_path, max_steps=1, logger=CSVLogger(tmp_path, "run"))
    assert type(trainer.logger.experiment) is MetricsFile
    assert not any(isinstance(callback, LastCheckpoint) for callback in trainer.callbacks)


def test_a_checkpoint_writer_that_the_user_chose_is_kept(tmp_path):
    assert type(fit(tmp_path, max_steps=1).strategy.checkpoint_io) is AtomicCheckpointIO
    chosen = fit(tmp_path, max_steps=1, plugins=[AsyncCheckpointIO()]).strategy.checkpoint_io
    assert type(chosen) is AsyncCheckpointIO
    assert type(chosen.checkpoint_io) is AtomicCheckpointIO  # it writes with ours
