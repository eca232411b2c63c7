"""What every run gets, and what stays as the user chose it; one run at a time writes to a folder, and runs that start
together get folders of their own.
"""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from cli_runs import logged
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from module_runs import fit, make_data, make_module, make_trainer
from test_files import full_disk

from stateset_lightning.cli.main import main
from stateset_lightning.errors import ConfigError, DiskError
from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.run.install import RunLock
from stateset_lightning.run.last_checkpoint import LastCheckpoint, remove_link
from stateset_lightning.run.lightning_internals import claim_versions
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


# The lock -------------------------------------------------------------------------------------------------------------

HOLDS = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 77 on elsewhere")
file.flush()
print("locked", flush=True)
time.sleep(60)
"""


def logger(folder):
    return CSVLogger(folder, "run", version=0)


class Fails(Callback):
    def on_train_start(self, *args):
        raise OSError("gone")


class Forks(Callback):
    """A child that outlives the run, as a reward may leave one."""

    def on_train_start(self, *args):
        if not (child := os.fork()):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            signal.pause()
        self.child = child


def taken(folder):
    RunLock().take(make_trainer(folder, logger=logger(folder)))


def no_folder(folder, monkeypatch):
    (folder / "run").write_text("in the way")
    taken(folder)


def full(folder, monkeypatch):
    with full_disk(0):
        taken(folder)


def read_only(folder, monkeypatch):
    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "remove", refuse)
    (folder / "last.ckpt").symlink_to("best.ckpt")
    remove_link(make_trainer(folder), str(folder / "last.ckpt"))


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (no_folder, r"version_0/\.lock: cannot be written \(Not a directory\)"),
        (full, r"version_0/\.lock: cannot be written \(File too large\)"),
        (read_only, r"last\.ckpt: the link cannot be removed \(Read-only file system\)"),
    ],
)
def test_a_disk_that_refuses_gives_one_line(tmp_path, monkeypatch, cause, said):
    with pytest.raises(DiskError, match=said) as caught:
        cause(tmp_path, monkeypatch)
    assert "\n" not in str(caught.value)


def test_a_second_run_in_the_folder_of_one_that_trains_is_refused_and_changes_nothing(tmp_path):
    version = tmp_path / "run" / "version_0"
    version.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDS, str(version / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=r"version_0: process 77 on elsewhere trains in this folder"):
            fit(tmp_path, logger=logger(tmp_path))
        assert [path.name for path in version.iterdir()] == [".lock"]
        other.kill()
    fit(tmp_path, logger=logger(tmp_path))  # the kernel has released it
    assert (version / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize("callback", [None, Fails(), Forks()], ids=["end", "error", "forked child"])
def test_the_lock_is_released_at_the_end_however_the_run_ends(tmp_path, callback):
    with suppress(OSError):
        fit(tmp_path, logger=logger(tmp_path), callbacks=[callback] if callback else [])
    command = [sys.executable, "-c", HOLDS.replace("time.sleep(60)", ""), str(tmp_path / "run" / "version_0" / ".lock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if isinstance(callback, Forks):
        os.kill(callback.child, signal.SIGKILL)
        os.waitpid(callback.child, 0)
    assert done.stdout == "locked\n"


def test_runs_that_start_together_never_share_a_version(tmp_path):
    (tmp_path / "run" / "version_0").mkdir(parents=True)
    (tmp_path / "run" / "version_3").write_text("a file")

    def start(_):
        trainer = make_trainer(tmp_path, logger=[CSVLogger(tmp_path, "run"), CSVLogger(tmp_path, "run")])
        claim_versions(trainer)
        mine, other = (each.version for each in trainer.loggers)
        assert mine == other
        return mine

    with ThreadPoolExecutor(8) as pool:
        versions = sorted(pool.map(start, range(8)))
    assert versions == [1, 2, 4, 5, 6, 7, 8, 9]


def test_an_evaluation_has_a_folder_of_its_own_name_and_says_the_step_of_its_checkpoint(folder, capsys):
    """It takes no number of a run; a baseline is a part of its run."""
    flags = ["--config", "config.yaml", "--data.predict", "rows.jsonl"]
    main(["fit", *flags, "--trainer.max_steps", "2", "--baseline", "true"])
    main(["predict", *flags, "--ckpt_path", "last"])
    capsys.readouterr()
    main(["validate", *flags, "--ckpt_path", "last"])
    said, runs = capsys.readouterr().out, folder / "runs" / "r"
    assert sorted(path.name for path in runs.iterdir()) == ["evaluation_0", "evaluation_1", "version_0"]
    assert (runs / "evaluation_0" / "predictions.jsonl").is_file()
    assert "validation after step 2: reward" in said
    assert re.search(r"step +│ +2\.0 ", said)  # in Lightning's table
    assert [row["step"] for row in logged(runs / "evaluation_1")] == ["2"]
    assert {json.loads(line)["step"] for line in (runs / "evaluation_1" / "samples.jsonl").open()} == {2}
