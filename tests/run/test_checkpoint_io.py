"""Checkpoint files under attack: full disks, kills, truncation, flipped bits, pickled code, remote paths."""

import os
import pickle
import signal
import subprocess
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from test_files import full_disk

from stateset_lightning.errors import CheckpointError, ConfigError, DiskError
from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO, local_path, newest_checkpoints, read_checkpoint

IO = AtomicCheckpointIO()


def checkpoint(value, size=10):
    return {"state_dict": {"weight": torch.full((size,), float(value))}, "stateset": {"seed": 1}}


def save(path, value, age=0):
    IO.save_checkpoint(checkpoint(value), path)
    time = path.stat().st_mtime - age
    os.utime(path, (time, time))
    return path


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)


def test_what_is_written_is_read_and_replaces_what_was_there(tmp_path):
    for value in (1, 2):
        IO.save_checkpoint(checkpoint(value), tmp_path / "a" / "last.ckpt")
    assert torch.equal(IO.load_checkpoint(tmp_path / "a" / "last.ckpt")["state_dict"]["weight"], torch.full((10,), 2.0))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["last.ckpt"]
    IO.remove_checkpoint(tmp_path / "a" / "last.ckpt")
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Path("a"), "Path"),
        (defaultdict(int), "defaultdict"),
        (datetime(2026, 1, 1), "datetime"),
        (np.mean([1]), "numpy"),
    ],
)
def test_what_no_reader_would_take_is_not_written(tmp_path, value, named):
    """Reading runs no code, so it takes no classes: a run whose checkpoints hold some could never be resumed."""
    path = save(tmp_path / "last.ckpt", 1)
    with pytest.raises(ConfigError, match=f"but a callback's state.* have .*{named}"):
        IO.save_checkpoint({**checkpoint(2), "callbacks": {"Own": {"best": value}}}, path)
    assert IO.load_checkpoint(path)["state_dict"]["weight"][0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    path = save(tmp_path / "last.ckpt", 1)
    with (
        full_disk(50_000),
        pytest.raises(DiskError, match=r"last.ckpt: cannot be written \(File too large\).*untouched"),
    ):
        IO.save_checkpoint(checkpoint(2, size=100_000), path)
    assert IO.load_checkpoint(path)["state_dict"]["weight"][0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


KILLED = """
import os, signal, sys, torch
from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO
class Kills:
    def __reduce__(self):  # half of the file is written by now
        os.kill(os.getpid(), signal.SIGKILL)
AtomicCheckpointIO().save_checkpoint({"state_dict": torch.zeros(300_000), "stateset": {}, "then": Kills()}, sys.argv[1])
"""


@pytest.mark.slow  # starts a process that imports torch and lightning
def test_a_kill_inside_a_write_leaves_the_last_good_checkpoint_and_a_leftover_that_goes(tmp_path):
    path = save(tmp_path / "last.ckpt", 1)
    run = subprocess.run([sys.executable, "-c", KILLED, path], capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr
    leftover, last = sorted(tmp_path.iterdir())
    assert leftover.match(".last.ckpt.*.partial")
    assert last.name == "last.ckpt"
    assert IO.load_checkpoint(path)["state_dict"]["weight"][0] == 1
    assert leftover.exists()  # it might be another run's, under way: a reader deletes nothing
    save(tmp_path / "next.ckpt", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "next.ckpt"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped weight", "flipped structure"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tmp_path, damage):
    save(tmp_path / "step=1.ckpt", 1, age=30)
    save(tmp_path / "step=2.ckpt", 2, age=20)
    newest = save(tmp_path / "last.ckpt", 3)
    if damage == "flipped weight":
        flip_bit(newest, newest.read_bytes().index(torch.tensor(3.0).numpy().tobytes() * 3))
    elif damage == "flipped structure":
        flip_bit(newest, newest.read_bytes().index(b"stateset"))
    else:
        newest.write_bytes(newest.read_bytes()[:-200] if damage == "truncated" else b"")
    with pytest.raises(
        CheckpointError, match=r"last.ckpt: the file is damaged.*the one before it is whole: --ckpt_path .*step=2.ckpt"
    ):
        IO.load_checkpoint(newest)


def test_only_whole_checkpoints_are_offered(tmp_path):
    broken = save(tmp_path / "step=2.ckpt", 2)
    broken.write_bytes(broken.read_bytes()[:100])
    newest = save(tmp_path / "last.ckpt", 3)
    newest.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="there is no other whole checkpoint"):
        read_checkpoint(newest)


def test_files_that_are_no_checkpoints_of_ours_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"checkpoint of ours; give other weights as model\.policy\.model_name"):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="there is no such file"):
        IO.load_checkpoint(tmp_path / "absent.ckpt")


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "owned"))
    torch.save({**checkpoint(1), "extra": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil.ckpt: the file is damaged or no checkpoint \(UnpicklingError"):
        IO.load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "owned").exists()


def test_remote_paths_are_left_to_lightning():
    assert local_path("memory://bucket/last.ckpt") is None
    IO.save_checkpoint(checkpoint(5), "memory://bucket/last.ckpt")
    assert IO.load_checkpoint("memory://bucket/last.ckpt")["state_dict"]["weight"][0] == 5


def test_the_newest_come_first(tmp_path):
    old, new = save(tmp_path / "a" / "old.ckpt", 1, age=10), save(tmp_path / "b" / "new.ckpt", 2)
    (tmp_path / "b" / "gone.ckpt").symlink_to(tmp_path / "nowhere.ckpt")
    assert newest_checkpoints(tmp_path, "*/*.ckpt") == [new, old]


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["description", "entry"])
def test_a_sharded_checkpoint_never_runs_code(tmp_path: Path, place: str) -> None:
    command = f"touch {tmp_path / 'harmed'}"
    folder = tmp_path / "folder.ckpt"
    state: dict[str, Any] = {"state_dict": {"w": torch.ones(2)}, "stateset": {}}
    if place == "entry":
        state["entry"] = Harmful(command)
    torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({}, folder / "meta.pt")
    if place == "description":
        (folder / ".metadata").write_bytes(pickle.dumps(Harmful(command)))
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        read_checkpoint(folder)
    assert not (tmp_path / "harmed").exists()
