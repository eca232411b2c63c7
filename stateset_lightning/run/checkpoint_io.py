"""Checkpoint files: complete or absent, read without running any code that they hold, and named when they are damaged.

A sharded checkpoint is a folder to which every rank wrote its shards, described by its file `.metadata`.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from tempfile import NamedTemporaryFile
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO

# Private in lightning 2.6.6: the name of the file beside the shards, and the reader of a whole folder.
from lightning.fabric.utilities.load import _METADATA_FILENAME, _load_distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.serialization import get_unsafe_globals_in_checkpoint

from stateset_lightning.errors import CheckpointError, ConfigError
from stateset_lightning.files import atomic_write
from stateset_lightning.ranks import Ranks

# Of what `checkpoint["stateset"]` holds, and how; version 0.1 wrote none. A higher one is of a newer version.
FORMAT = 1

# What reading raises on a file that is cut short, has flipped bits, or is no checkpoint at all.
_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, KeyError, UnpicklingError, BadZipFile, CheckpointException)

# All that a `.metadata` is made of (torch 2.13).
_METADATA_CLASSES = {
    "torch": "Size float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool",
    "torch.distributed.checkpoint.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex"
    " StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",  # in Python 3.13
}


# What a file says of itself at its end, as the comment of a zip file: read without loading it. See `age`.
_STAMP = re.compile(rb"stateset-lightning saved_at=(\d+\.\d+) resumable=([01])$")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer, but a local file is complete or absent, and loads with `weights_only=True`.

    Lightning's own writer renames too, but does not flush to the disk first, and goes through a folder for temporary
    files that may lie on another disk. Remote paths (`s3://...`) are left to it: object stores show a file only when it
    is complete.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if (file := local_path(path)) is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(file) as stream:
            try:
                torch.save(checkpoint, stream)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch hides why its stream failed
                    raise error.__context__ from None
                raise
            stream.seek(0)
            if foreign := get_unsafe_globals_in_checkpoint(stream):
                kept = "a checkpoint holds numbers, text, tensors, lists and mappings, so that reading it runs no code"
                who = "a callback's state, on_save_checkpoint or hyperparameters"
                raise ConfigError(f"{kept}, but {who} have {', '.join(foreign)}: keep such values as numbers or text")
            if saved_at := checkpoint.get("stateset", {}).get("saved_at"):
                stamp = b"stateset-lightning saved_at=%.6f resumable=%d" % (saved_at, "lr_schedulers" in checkpoint)
                stream.seek(-2, os.SEEK_END)  # where torch wrote that there is no comment
                stream.write(len(stamp).to_bytes(2, "little") + stamp)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        """Reads a checkpoint; never runs code that it holds, whatever `weights_only` says.

        Called by all ranks: each gets what rank 0 has.

        Raises:
            CheckpointError: If it is damaged, or holds anything but tensors and plain containers.
        """
        if (file := local_path(path)) is None:
            return super().load_checkpoint(path, map_location, weights_only=True)
        with of_first_rank(file) as copy:
            return read_checkpoint(copy, check_sums=True, map_location=map_location)


@contextmanager
def of_first_rank(file: Path) -> Iterator[Path]:
    """The checkpoint that rank 0 has at a path: the path where the same is there, else a copy that goes at the end.

    For machines without a shared disk: rank 0 alone writes checkpoints. Copies are in the folder for temporary files
    (`TMPDIR`). Called by all ranks.

    Raises:
        CheckpointError: If it is a folder of shards, and not the same everywhere: it cannot be sent.
    """
    ranks = Ranks.current()
    tails = ranks.gather(_tail(file))
    others = [rank for rank, tail in enumerate(tails) if tail != tails[0]]
    if not others:
        yield file
        return
    if ranks.from_first(is_sharded(file)):
        raise CheckpointError(f"ckpt_path={file}: rank {others[0]} lacks this folder of shards: use a shared disk")
    with nullcontext() if ranks.rank else file.open("rb") as source, NamedTemporaryFile(suffix=file.suffix) as copy:
        while piece := ranks.from_first(source.read(2**26) if source else b""):
            if ranks.rank in others:
                copy.write(piece)
        copy.flush()
        yield Path(copy.name) if ranks.rank in others else file


def _tail(path: Path, size: int = 2**16) -> bytes | None:
    """The end of a file, which differs between any two checkpoints; None if there is none.

    Among so many bytes are the check sums of the entries of small checkpoints.
    """
    with suppress(OSError), (path / ".metadata" if is_sharded(path) else path).open("rb") as stream:
        stream.seek(max(stream.seek(0, os.SEEK_END) - size, 0))
        return stream.read()
    return None


def read_checkpoint(file: Path, *, check_sums: bool = False, **options: Any) -> dict[str, Any]:
    """The content of a local checkpoint, on the CPU.

    Args:
        file: A file, whose tensors are read when they are looked at; or a folder of shards, put together in memory.
        check_sums: Whether all of a file is read at once, to find flipped bits.
        options: Others for `torch.load`, of a file.

    Raises:
        CheckpointError: If it is damaged or no checkpoint of this package; names the newest undamaged one beside it.
    """
    try:
        content = _read(file, check_sums, **options)
    except FileNotFoundError:
        raise CheckpointError(f"ckpt_path={file}: there is no such file; give a .ckpt file, `last` or `best`") from None
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        damaged = f"ckpt_path={file}: the file is damaged or no checkpoint ({reason})"
        raise CheckpointError(f"{damaged}; {_instead_of(file)}") from error
    if not _is_ours(content):
        raise CheckpointError(f"ckpt_path={file}: no checkpoint of ours; give other weights as model.policy.model_name")
    if (number := content["stateset"].get("format", 0)) > FORMAT:
        raise CheckpointError(f"ckpt_path={file}: of a newer version (format {number}, this knows {FORMAT}): update it")
    return content


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and {"state_dict", "stateset"} <= set(content)


def is_foreign(path: Path) -> bool:
    """Whether a file is none of this package's checkpoints, and not a damaged one either."""
    with suppress(*_DAMAGE), path.open("rb") as stream:  # not a folder of shards, which is ours
        return stream.read(2) != b"PK" or not _is_ours(_read(path))
    return False


def check_weights(mine: Mapping[str, Any], saved: Mapping[str, Any], model: str) -> None:
    """A checkpoint's weights are those of this model, by name and shape.

    Raises:
        CheckpointError: Naming the first that is not.
    """
    here, there = ({name: (*tensor.shape,) for name, tensor in tensors.items()} for tensors in (mine, saved))
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            shapes = f"{name} is {there.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} in the model"
            raise CheckpointError(f"the checkpoint is of another model, its weights do not fit {model}: {shapes}")


def _read(file: Path, check_sums: bool = False, map_location: Any = "cpu", mmap: bool | None = None) -> Any:
    if is_sharded(file):
        with safe_shards(file):
            return _load_distributed_checkpoint(file)
    if check_sums:
        # A checkpoint is a zip file; torch writes check sums of its entries, but does not look at them when it reads.
        with ZipFile(file) as archive:
            if entry := archive.testzip():
                raise BadZipFile(f"wrong check sum of {entry}")
    return torch.load(file, map_location, weights_only=True, mmap=not check_sums if mmap is None else mmap)


def _instead_of(damaged: Path) -> str:
    for file in newest_checkpoints(damaged.parent):
        if file.resolve() != damaged.resolve():
            with suppress(*_DAMAGE):
                if is_sharded(file) or _read(file, check_sums=True, mmap=True):
                    return f"the one before it is whole: --ckpt_path {file}"
    return f"there is no other whole checkpoint in {damaged.parent}"


class _MetadataReader(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_CLASSES.get(module, "").split():
            raise UnpicklingError(f"{module}.{name} is no part of a checkpoint")
        return super().find_class(module, name)


@contextmanager
def safe_shards(folder: Path) -> Iterator[None]:
    """While a sharded checkpoint is read: makes sure that torch, which unpickles, runs no code that the shards hold.

    `.metadata` is checked before torch unpickles it. Entries that are no tensors load with `weights_only=True`: torch
    2.13 has no argument for it (DefaultLoadPlanner.load_bytes), but its documented variable for the whole process.

    Raises:
        UnpicklingError: If `.metadata` holds anything but what describes a checkpoint.
    """
    with (folder / ".metadata").open("rb") as stream:
        _MetadataReader(stream).load()
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before, os.environ[key] = os.environ.get(key, "0"), "1"
    try:
        yield
    finally:
        os.environ[key] = before


def newest_checkpoints(folder: Path, pattern: str = "*.ckpt") -> list[Path]:
    """Checkpoints in a folder, the newest first (see `age`); `pattern` may reach into folders below."""
    # without links to files that are gone
    files = [path for path in folder.glob(pattern) if path.is_file() or is_sharded(path)]
    return sorted(files, key=age, reverse=True)


def age(path: Path) -> tuple[bool, float, str]:
    """Grows with what a checkpoint is worth as the last: whether a run can go on from it, when it was saved, its name.

    By what the file says itself: copied, moved or touched it stays the same. The time of the file counts only where it
    says nothing, because version 0.1 wrote it or its end is missing.
    """
    with suppress(*_DAMAGE):
        if is_sharded(path):
            state = torch.load(path / _METADATA_FILENAME, weights_only=True)["stateset"]
            return True, state["saved_at"], path.name
        if stamp := _STAMP.search(_tail(path, 100) or b""):
            return stamp[2] == b"1", float(stamp[1]), path.name
    return True, path.stat().st_mtime, path.name


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return (path / _METADATA_FILENAME).is_file()


def local_path(path: str | Path) -> Path | None:
    """The path of a local file; None for a remote one."""
    name = str(path).removeprefix("file://")
    return None if "://" in name else Path(name)  # `::`, which fsspec takes for a chain of file systems, is part of it
