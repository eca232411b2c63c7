"""The table of metrics: complete rows in one file per run, or one W&B run, continued where a resumed run goes on."""

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from stateset_lightning.files import append_lines, atomic_write, read_table, writing
from stateset_lightning.run.checkpoint_io import local_path
from stateset_lightning.run.lightning_internals import set_writer, writer_of


class MetricsFile(ExperimentWriter):
    """What a CSVLogger writes with; Lightning's own deletes the file of an earlier run, and rewrites in place.

    `num_rows` rows stand in the file. A new run begins with none; `resume` keeps those of the run that it continues.
    Each row is written at once, not at `flush_logs_every_n_steps`: a kill takes none, and a report has the newest.
    """

    def __init__(self, log_dir: str) -> None:
        with writing(Path(log_dir)):
            super().__init__(log_dir)
        self.file = Path(self.metrics_file_path)
        self.num_rows = 0

    def resume(self, num_rows: int) -> None:
        """Goes on behind the first `num_rows` rows; the later ones were logged after the checkpoint and come again.

        A file of which none can be read, since its header is damaged, is kept under another name.
        """
        rows = [row for place, row in self._read() if place <= num_rows]
        self.num_rows = len(rows)
        if rows:
            self.metrics_keys = list(rows[0])
            self._write(rows)
        elif num_rows and self.file.exists():
            with writing(self.file):
                self.file.replace(self.file.with_suffix(".damaged.csv"))

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        # A name may be the user's, or hold the type of an exception; a row is one line.
        names = {name: name if name.isprintable() else json.dumps(name)[1:-1] for name in metrics_dict}
        super().log_metrics({names[name]: value for name, value in metrics_dict.items()}, step)
        rows, self.metrics = self.metrics, []
        if rows[0].keys() <= set(self.metrics_keys) and self.file.exists():
            append_lines(self.file, self._lines(rows))
        else:  # a new column, or a new run's first row, which replaces the file of an earlier run
            kept = [row for _, row in self._read()] if self.num_rows else []
            self.num_rows = len(kept)
            self.metrics_keys = sorted({*self.metrics_keys, *rows[0]})
            self._write([*kept, *rows])
        self.num_rows += 1

    def _check_log_dir_exists(self) -> None:
        """Private in lightning 2.6.6: deletes an earlier file at once. Nothing is deleted before there is a row."""

    def _read(self) -> Iterable[tuple[int, dict[str, Any]]]:
        return read_table(self.file, "step") if self.file.exists() else ()

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        with atomic_write(self.file) as file:
            file.write(self._lines(rows, header=True).encode())

    def _lines(self, rows: Iterable[dict[str, Any]], header: bool = False) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def install_metrics_files(trainer: Trainer) -> None:
    """Gives every local CSVLogger its `MetricsFile`; to be called before one has begun to write."""
    for logger in _loggers(trainer, CSVLogger):
        if writer_of(logger) is None and local_path(logger.log_dir):
            set_writer(logger, MetricsFile(logger.log_dir))


def metrics_files(trainer: Trainer) -> list[MetricsFile]:
    """Those that were installed, in the order of the loggers; none on ranks that do not log."""
    return [writer for writer in map(writer_of, _loggers(trainer, CSVLogger)) if isinstance(writer, MetricsFile)]


def wandb_rows(trainer: Trainer) -> list[int]:
    """Rows that W&B has been sent, by logger."""
    return [logger.experiment.step for logger in _loggers(trainer, WandbLogger)]


def skip_known_rows(trainer: Trainer, rows: Iterable[int]) -> None:
    """Does not send a resumed run's first rows to W&B, which has them: it repeats them bit by bit.

    W&B cannot drop rows that it was sent after a checkpoint: a rewind (`resume_from`) needs its server and a run that
    is online, and an explicit `step`, below which it ignores rows, cannot be given through Lightning's logger. So the
    run's `log` is replaced (wandb 0.31, lightning 2.6.6).

    Args:
        trainer: With W&B runs that go on under their id.
        rows: `wandb_rows` when the checkpoint was made.
    """
    for logger, sent in zip(_loggers(trainer, WandbLogger), rows, strict=False):
        run = logger.experiment
        run.log = partial(_log_if_new, run.log, iter(range(run.step - sent)))


def _log_if_new(log: Callable[..., None], known: Iterator[int], *args: Any, **options: Any) -> None:
    if next(known, None) is None:
        log(*args, **options)


def drop_later_events(trainer: Trainer, step: int) -> None:
    """Makes TensorBoard leave out what the run wrote after optimizer step `step`, from which it now goes on."""
    for logger in _loggers(trainer, TensorBoardLogger):
        logger.experiment.close()  # its next event opens a file that is read after these two
        for _ in range(2):  # the first restart that TensorBoard sees is the run's start to it
            type(logger.experiment)(logger.log_dir, purge_step=step + 1).close()
        # Files of one second are read in the order of their numbers as text, in which 10 comes before 9.
        time.sleep(1 - time.time() % 1)


def _loggers(trainer: Trainer, kind: type[Any]) -> list[Any]:
    return [logger for logger in trainer.loggers if isinstance(logger, kind)] if trainer.is_global_zero else []
