"""One run at a time writes to a folder: a lock that the kernel releases, however its holder ends."""

import fcntl
import logging
import os
import socket
from contextlib import ExitStack

from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.errors import ConfigError
from stateset_lightning.files import writing
from stateset_lightning.run import lightning_internals
from stateset_lightning.run.folder import LOCK, run_folder

_log = logging.getLogger("stateset_lightning")


class RunLock(Callback):
    """Keeps the folder of a training run for this process, and tells the other ranks which one it is."""

    def __init__(self) -> None:
        self._held = ExitStack()

    def take(self, trainer: Trainer) -> None:
        """Called before anything is written to the folder; on the first rank alone.

        Raises:
            ConfigError: If another process trains there.
            DiskError: If the folder cannot be written.
        """
        path = run_folder(trainer) / LOCK
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = self._held.enter_context(path.open("a+"))
            try:
                # One of `flock` would live on in what a reward has forked.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = path.read_text()
                raise ConfigError(f"{path.parent}: {holder} trains in this folder: wait for it, or end it") from None
            except OSError as error:
                _log.warning("%s cannot be locked (%s): nothing keeps a second run out", path, error.strerror)
            file.truncate(0)
            # Not by the file's buffer, which would fail once more when it is closed.
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lightning_internals.share_versions(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._held.close()

    on_exception = teardown  # type: ignore[assignment]  # Lightning leaves `teardown` out then
