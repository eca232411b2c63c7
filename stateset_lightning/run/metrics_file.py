"""The table of metrics: whole rows in one file per run, or one W&B run, continued where a resumed run left it."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from stateset_lightning.files import append_lines, atomic_write
from stateset_lightning.run.checkpoint_io import local_path


class MetricsFile(ExperimentWriter):
    """What a CSVLogger writes with. Lightning's own deletes the file of an earlier run in the same folder, and rewrites
    in place.

    `num_rows` rows stand in the file. A new run begins with none; `resume` keeps those of the run that it continues.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.file = Path(self.metrics_file_path)
        self.num_rows = 0
        self._begun = False

    def resume(self, num_rows: int) -> None:
        """Goes on behind the first `num_rows` rows; those that follow were logged after the checkpoint and come
        again.
        """
        header, rows = self._read()
        self.metrics_keys = header
        self.num_rows = min(num_rows, len(rows))
        self._write(rows[: self.num_rows])
        self._begun = True

    def save(self) -> None:
        if not self.metrics:
            return
        if not self._begun:
            self.file.unlink(missing_ok=True)
            self._begun = True
        rows, self.metrics = self.metrics, []
        if set().union(*rows) <= set(self.metrics_keys) and self.file.exists():
            append_lines(self.file, self._lines(rows))
        else:
            _, old = self._read()
            self.metrics_keys = sorted(set(self.metrics_keys).union(*rows))
            self._write([*old, *rows])
        self.num_rows += len(rows)

    def _check_log_dir_exists(self) -> None:
        """Nothing is deleted before there is a row to write: the run may be a resumed one."""

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        if not self.file.exists():
            return [], []
        with self.file.open(newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        with atomic_write(self.file) as file:
            file.write(
                (
                    self._lines([dict(zip(self.metrics_keys, self.metrics_keys, strict=True))]) + self._lines(rows)
                ).encode()
            )

    def _lines(self, rows: Iterable[dict[str, Any]]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, fieldnames=self.metrics_keys, lineterminator="\n").writerows(rows)
        return text.getvalue()


def install_metrics_files(trainer: Trainer) -> None:
    """Gives every local CSVLogger its `MetricsFile`; to be called before one has begun to write."""
    for logger in trainer.loggers:
        if (
            isinstance(logger, CSVLogger)
            and logger._experiment is None
            and trainer.is_global_zero
            and local_path(logger.log_dir)
        ):
            logger._experiment = MetricsFile(logger.log_dir)


def metrics_files(trainer: Trainer) -> list[MetricsFile]:
    """Those that were installed, in the order of the loggers; none on ranks that do not log."""
    writers = [logger._experiment for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    return [writer for writer in writers if isinstance(writer, MetricsFile)]


def wandb_rows(trainer: Trainer) -> list[int]:
    """Rows that W&B has been sent, by logger."""
    return [logger.experiment.step for logger in _wandb_loggers(trainer)]


def skip_known_rows(trainer: Trainer, rows: Iterable[int]) -> None:
    """W&B cannot drop the rows that it was sent after a checkpoint. A resumed run repeats them bit by bit, so they are
    not sent again.

    Args:
        trainer: With W&B runs that go on under their id.
        rows: `wandb_rows` when the checkpoint was made.
    """
    for logger, sent in zip(_wandb_loggers(trainer), rows, strict=False):
        known, log = logger.experiment.step - sent, logger.experiment.log

        def log_if_new(
            *args: Any,
            log: Any = log,
            known: list[int] = [known],  # noqa: B006 (counts down)
            **options: Any,
        ) -> None:
            if known[0] > 0:
                known[0] -= 1
            else:
                log(*args, **options)

        logger.experiment.log = log_if_new


def _wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)] if trainer.is_global_zero else []


def drop_later_events(trainer: Trainer, step: int) -> None:
    """TensorBoard leaves out what the run wrote after optimizer step `step`, from which it now goes on."""
    loggers = (
        [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.is_global_zero
        else []
    )
    for logger in [*loggers, *loggers]:  # twice, since it takes the first restart that it sees for the run's start
        logger.experiment.close()
        logger.experiment.purge_step = step + 1
        logger.experiment._get_file_writer()  # opens a file that begins with the restart
