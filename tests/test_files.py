"""Files that are whole or absent: what a raising writer, a full disk and a kill leave behind."""

import errno
import fcntl
import resource
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from stateset_lightning.callbacks import PredictionWriter
from stateset_lightning.errors import DiskError
from stateset_lightning.files import append_lines, atomic_folder, atomic_write, make_folder, remove_leftovers, writing
from stateset_lightning.run.metrics_file import MetricsFile


@contextmanager
def full_disk(limit):
    """Files cannot grow beyond `limit` bytes: the system's own error, in place of a full disk's."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_written_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "deep" / "file"
    for content in (b"first", b"second"):
        with atomic_write(path) as file:
            file.write(content)
            assert path.exists() == (content == b"second")  # the old one stays until the new one is whole
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_writer_that_raises_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("good")

    def write():
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_named_and_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("good")

    def write():
        with atomic_write(path) as file:
            file.write(b"x" * 20_000)

    with (
        full_disk(10_000),
        pytest.raises(DiskError, match=r"file: cannot be written \(File too large\).*untouched.*Make room"),
    ):
        write()
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("good")
    for write in (lambda path: atomic_write(path).__enter__(), lambda path: append_lines(path, "x\n")):
        with pytest.raises(DiskError, match=r"file/deep: cannot be written"):
            write(tmp_path / "file" / "deep")


HOST = socket.gethostname()
NOT_LEFT_BY_US = {
    "whole": "step=2.ckpt",
    "hidden": ".hidden",
    "another program's": ".film.mp4.partial",
    "another program's, with a number": ".film-1.partial",
    "of another machine": ".step=3.ckpt.elsewhere-1f.partial",
    "not hidden": f"x.{HOST}-1f.partial",
    "another ending": f".x.{HOST}-1f.partial.bak",
}


def test_leftovers_of_a_kill_are_told_from_other_files(tmp_path):
    for name in (
        ".step=3.ckpt.partial",
        f".step=3.ckpt.{HOST}-1f.partial",
        f".a\nb.{HOST}-2f.partial",
        *NOT_LEFT_BY_US.values(),
    ):
        (tmp_path / name).write_text("x")
    (tmp_path / f".out.{HOST}-3f.partial").mkdir()
    (tmp_path / f".out.{HOST}-3f.partial" / "weights").write_text("x")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*NOT_LEFT_BY_US.values()}
    remove_leftovers(tmp_path / "absent")


def test_writers_of_one_name_do_not_meet_whatever_their_machines_are_called(tmp_path, monkeypatch):
    # Two containers may have one name and the same numbers of processes, and a file system may have no locks.
    monkeypatch.setattr("fcntl.flock", _refuse)
    with atomic_write(tmp_path / "file") as first:
        first.write(b"first")
        with atomic_write(tmp_path / "file") as second:
            second.write(b"second")
        assert (tmp_path / "file").read_bytes() == b"second"
    assert (tmp_path / "file").read_bytes() == b"first"
    with atomic_folder(tmp_path / "folder", overwrite=True) as first:
        with atomic_folder(tmp_path / "folder") as second:
            (second / "second").touch()
        (first / "first").touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["first"]
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_what_a_writer_has_made_and_not_locked_yet_stays(tmp_path, monkeypatch, write):
    lock = fcntl.flock

    def late(*arguments):
        monkeypatch.setattr("fcntl.flock", lock)
        remove_leftovers(tmp_path)
        lock(*arguments)

    monkeypatch.setattr("fcntl.flock", late)
    with write(tmp_path / "it"):
        remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def _refuse(*_):
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_full_disk_under_safetensors_is_one_line_too(tmp_path):
    path = tmp_path / "it"
    with full_disk(10_000), pytest.raises(DiskError, match=r"it: cannot be written \(.*File too large"), writing(path):
        save_file({"a": torch.zeros(10_000)}, path)


WRITERS = {
    "file": lambda path: atomic_write(path).__enter__(),
    "folder": lambda path: atomic_folder(path).__enter__(),
    "lines": lambda path: append_lines(path, "x\n"),
    "new folder": make_folder,
    "metrics": lambda path: MetricsFile(str(path)),
    "predictions": lambda path: PredictionWriter(str(path)).on_predict_start(
        SimpleNamespace(global_rank=0, ckpt_path=None), None
    ),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("calls", [("os.mkdir",), ("os.mkdir", "os.unlink", "os.rmdir", "os.rename", "os.replace")])
def test_a_disk_that_is_only_read_is_one_line_that_names_the_path(tmp_path, monkeypatch, write, calls):
    for call in calls:
        monkeypatch.setattr(call, _refuse)
    with pytest.raises(DiskError, match=r"deep/it: cannot be written \(Read-only file system\)") as error:
        write(tmp_path / "deep" / "it")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("call", ["os.rename", "os.replace", "os.fsync"])
def test_a_disk_that_becomes_read_only_while_a_folder_is_filled_keeps_the_old_one(tmp_path, monkeypatch, call):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def write():
        with atomic_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "new").write_text("new")
            monkeypatch.setattr(call, _refuse)
            monkeypatch.setattr("shutil.rmtree", _refuse)
            with atomic_write(folder / "file") as file:
                file.write(b"new")

    with pytest.raises(DiskError, match="cannot be written"):
        write()
    assert (tmp_path / "out" / "old").read_text() == "old"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "new\n"),
        ("one\n", "one\nnew\n"),
        ("one\ntor", "one\nnew\n"),
        ("torn", "new\n"),
        ("é\n" * 70_000 + "x" * 70_000, "é\n" * 70_000 + "new\n"),
    ],
)
def test_lines_follow_whole_lines(tmp_path, before, after):
    path = tmp_path / "rows"
    path.write_text(before)
    append_lines(path, "new\n")
    assert path.read_text() == after


def test_lines_for_which_there_is_no_room_are_not_written_in_part(tmp_path):
    path = tmp_path / "rows"
    append_lines(path, "one\n")
    with full_disk(1000), pytest.raises(DiskError, match="rows: cannot be written"):
        append_lines(path, "two\n" * 500)
    assert path.read_text() == "one\n"


WRITES = """
import pathlib, sys
from stateset_lightning.files import atomic_write
with atomic_write(pathlib.Path(sys.argv[1])) as file:
    file.write(b"theirs")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_another_process_is_writing_stays(tmp_path):
    path = tmp_path / "file"
    command = [sys.executable, "-c", WRITES, str(path)]  # below, this process cleans up and writes as well
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        remove_leftovers(tmp_path)
        with atomic_write(path) as file:
            file.write(b"mine")
        assert path.read_bytes() == b"mine"
    assert path.read_bytes() == b"theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
