"""Checkpoint files: complete or absent, read without running any code that they hold, and named when they are damaged.

A sharded checkpoint is a folder to which every rank wrote its shards, described by its file `.metadata`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO

# Private in lightning 2.6.6: the name of the file beside the shards, and the reader of a whole folder.
from lightning.fabric.utilities.load import _METADATA_FILENAME, _load_distributed_checkpoint
from lightning.fabric.utilities.types import _PATH
from torch.distributed.checkpoint.api import CheckpointException

from stateset_lightning.errors import CheckpointError
from stateset_lightning.files import atomic_write, remove_leftovers

_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, KeyError, UnpicklingError, BadZipFile, CheckpointException)
"""What reading raises on a file that is cut short, has flipped bits, or is no checkpoint at all."""

_METADATA_CLASSES = {
    "torch": "Size float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool",
    "torch.distributed.checkpoint.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex"
    " StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",  # in Python 3.13
}
"""All that a `.metadata` is made of (torch 2.13)."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer, but a local file is complete or absent, and loads with `weights_only=True`.

    Lightning's own writer renames too, but does not flush to the disk first, and goes through a folder for temporary
    files that may lie on another disk. Remote paths (`s3://...`) are left to it: object stores show a file only when it
    is complete.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if (file := local_path(path)) is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        remove_leftovers(file.parent)
        with atomic_write(file) as stream:
            try:
                torch.save(checkpoint, stream)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch hides why its stream failed
                    raise error.__context__ from None
                raise

    def load_checkpoint(
        self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint; never runs code that it holds, whatever `weights_only` says.

        Raises:
            CheckpointError: If it is damaged, or holds anything but tensors and plain containers.
        """
        if (file := local_path(path)) is None:
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(file, check_sums=True, map_location=map_location)


def read_checkpoint(file: Path, *, check_sums: bool = False, **options: Any) -> dict[str, Any]:
    """The content of a local checkpoint; a sharded one is put together in memory, on the CPU.

    Args:
        file: A file, or a folder of shards.
        check_sums: Whether all of a file is read to find flipped bits.
        options: For `torch.load`, of a file.

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
    if not isinstance(content, dict) or not {"state_dict", "stateset"} <= set(content):
        raise CheckpointError(
            f"ckpt_path={file}: no checkpoint of stateset-lightning; for other weights set model.policy.model_name"
        )
    return content


def _read(file: Path, check_sums: bool, **options: Any) -> Any:
    if is_sharded(file):
        with safe_shards(file):
            return _load_distributed_checkpoint(file)
    if check_sums:
        # A checkpoint is a zip file; torch writes check sums of its entries, but does not look at them when it reads.
        with ZipFile(file) as archive:
            if entry := archive.testzip():
                raise BadZipFile(f"wrong check sum of {entry}")
    return torch.load(file, weights_only=True, **options)


def _instead_of(damaged: Path) -> str:
    for file in newest_checkpoints(damaged.parent):
        if file.resolve() != damaged.resolve():
            with suppress(*_DAMAGE):
                if not is_sharded(file):
                    _read(file, check_sums=True, map_location="cpu", mmap=True)
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
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        del os.environ[key]
        if before is not None:
            os.environ[key] = before


def newest_checkpoints(folder: Path, pattern: str = "*.ckpt") -> list[Path]:
    """Checkpoints in a folder, the newest first; `pattern` may reach into folders below."""
    # without links to files that are gone
    files = [path for path in folder.glob(pattern) if path.is_file() or is_sharded(path)]
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return (path / _METADATA_FILENAME).is_file()


def local_path(path: _PATH) -> Path | None:
    """The path of a local file; None for a remote one."""
    system, stripped = url_to_fs(str(path))
    return Path(stripped) if isinstance(system, LocalFileSystem) else None
