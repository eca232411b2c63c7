"""Files that are whole or absent: what a raising writer, a full disk and a kill leave behind."""

import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from stateset_lightning.errors import DiskError
from stateset_lightning.files import append_lines, atomic_write, remove_leftovers


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


def test_leftovers_of_a_kill_are_told_from_other_files(tmp_path):
    for name in (".step=3.ckpt.partial", "step=2.ckpt", ".hidden", "notes.partial"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "notes.partial", "step=2.ckpt"]
    remove_leftovers(tmp_path / "absent")


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
    command = [sys.executable, "-c", WRITES, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        remove_leftovers(tmp_path)
        with atomic_write(path) as file:
            file.write(b"mine")
        assert path.read_bytes() == b"mine"
    assert path.read_bytes() == b"theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
