"""One run at a time writes to a folder: a lock that the kernel releases, however its holder ends."""

import fcntl
import logging
import os
import socket
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.errors import ConfigError
from stateset_lightning.files import disk_error
from stateset_lightning.run import lightning_internals
from stateset_lightning.run.folder import LOCK, run_folder

_log = logging.getLogger("stateset_lightning")


class RunLock(Callback):
    """Keeps the folder of a training run for this process, and tells the other ranks which one it is."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def take(self, trainer: Trainer) -> None:
        """Called before anything is written to the folder; on the first rank alone.

        Raises:
            ConfigError: If another process trains there.
            DiskError: If the folder cannot be written.
        """
        path = run_folder(trainer) / LOCK
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Released once the process closes it or ends. A lock of `flock` would live on in what a reward has forked.
            self._file = path.open("a+")
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if self._file is None:
                raise disk_error(path, error) from error
            if isinstance(error, BlockingIOError | PermissionError):
                self._file.seek(0)
                holder = self._file.read()
                self.release()
                raise ConfigError(f"{path.parent}: {holder} trains in this folder: wait for it, or end it") from None
            _log.warning("%s cannot be locked (%s): nothing keeps a second run out", path, error.strerror)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lightning_internals.share_versions(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.release()

    def on_exception(self, *_: Any) -> None:
        self.release()
