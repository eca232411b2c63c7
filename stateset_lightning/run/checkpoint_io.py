"""Checkpoint files: written whole or not at all, read without unpickling, and named when they are damaged."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.load import _METADATA_FILENAME, _load_distributed_checkpoint
from lightning.fabric.utilities.types import _PATH
from torch.distributed.checkpoint.api import CheckpointException

from stateset_lightning.errors import CheckpointError
from stateset_lightning.files import atomic_write, remove_leftovers

_DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    CheckpointException,
)
"""What reading raises on a file that is cut short, has flipped bits, or is no checkpoint at all."""


_METADATA_CLASSES = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "torch.distributed.checkpoint.metadata": {
        *(
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
        ),
        *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
}
"""What the description of a sharded checkpoint is made of."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer, but a local file is whole or absent, and loads with `weights_only=True`.

    Lightning's own writer renames too, but does not flush to the disk first, and goes through a folder for temporary
    files that may lie on another disk. Remote paths (`s3://...`) are left to it: object stores show a file only when it
    is complete.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        file = local_path(path)
        if file is None or storage_options is not None:
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
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint; never runs code of it, whatever `weights_only` says.

        Raises:
            CheckpointError: If it is damaged, or holds anything but tensors and plain containers.
        """
        file = local_path(path)
        if file is None:
            return super().load_checkpoint(path, map_location, weights_only=True)
        remove_leftovers(file.parent)
        return read_checkpoint(file, check_sums=True, map_location=map_location)


def read_checkpoint(file: Path, *, check_sums: bool = False, **options: Any) -> dict[str, Any]:
    """The content of a local checkpoint file; `check_sums` reads all of it to find flipped bits, `options` are those of
    `torch.load`.

    A folder that several ranks wrote is put together in memory, on the CPU.

    Raises:
        CheckpointError: If it is damaged or no checkpoint of this package; names one beside it that is whole, the
            newest first.
    """
    try:
        if is_sharded(file):
            with plain_shards(file):
                content = _load_distributed_checkpoint(file)
        else:
            if check_sums:
                _check_sums(file)
            content = torch.load(file, weights_only=True, **options)
    except FileNotFoundError:
        raise CheckpointError(
            f"ckpt_path={file}: there is no such file; give a .ckpt file, or `last` or `best`"
        ) from None
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise CheckpointError(
            f"ckpt_path={file}: the file is damaged or no checkpoint ({reason}); {_instead_of(file)}"
        ) from error
    if not isinstance(content, dict) or not {"state_dict", "stateset"} <= set(content):
        raise CheckpointError(
            f"ckpt_path={file}: no checkpoint of stateset-lightning; for other weights set model.policy.model_name"
        )
    return content


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")
        return super().find_class(module, name)


@contextmanager
def plain_shards(folder: Path) -> Iterator[None]:
    """While a sharded checkpoint is read: torch's reader unpickles, so its description is checked before, and entries
    load as tensors.

    Raises:
        pickle.UnpicklingError: If there is anything else in it.
    """
    with (folder / ".metadata").open("rb") as stream:
        _MetadataReader(stream).load()
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def newest_checkpoints(folder: Path, pattern: str = "*.ckpt") -> list[Path]:
    """Checkpoint files of a folder, the newest first; `pattern` may reach into folders below."""
    # a link to a file that is gone is none
    files = [path for path in folder.glob(pattern) if path.is_file() or is_sharded(path)]
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder to which every rank wrote its part."""
    return (path / _METADATA_FILENAME).is_file()


def local_path(path: _PATH) -> Path | None:
    """The path of a local file; None for a remote one."""
    system, stripped = url_to_fs(str(path))
    return Path(stripped) if isinstance(system, LocalFileSystem) else None


def _check_sums(file: Path) -> None:
    """A checkpoint is a zip file, and torch, which writes the sums of its entries, does not look at them when it
    reads.
    """
    with zipfile.ZipFile(file) as archive:
        if entry := archive.testzip():
            raise zipfile.BadZipFile(f"wrong check sum of {entry}")


def _instead_of(damaged: Path) -> str:
    for file in newest_checkpoints(damaged.parent):
        if file.resolve() == damaged.resolve():
            continue
        try:
            if not is_sharded(file):
                _check_sums(file)
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except _DAMAGE:
            continue
        return f"the one before it is whole: --ckpt_path {file}"
    return f"there is no other whole checkpoint in {damaged.parent}"
