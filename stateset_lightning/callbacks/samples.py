"""Completions as JSON lines: some of every few episodes, all of an evaluation, all predictions."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.callbacks.run_folder import continues, run_folder
from stateset_lightning.files import append_lines
from stateset_lightning.records import CompletionRecord


class SampleWriter(Callback):
    """Writes completions with their rewards to `samples.jsonl` in the run's folder.

    Args:
        every_n_episodes: An episode's completions are written every so many episodes.
        num_prompts: Groups written of such an episode.
        evaluation: Whether the completions of validation and test are written too.
    """

    def __init__(
        self, every_n_episodes: Annotated[int, Ge(1)] = 10, num_prompts: Annotated[int, Ge(1)] = 2, evaluation: bool = True
    ) -> None:
        self.every_n_episodes = every_n_episodes
        self.num_prompts = num_prompts
        self.evaluation = evaluation
        self._size_before_validation: int | None = None  # while one runs, which a resumed run repeats

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.micro_step == 0 and batch.episode_index % self.every_n_episodes == 0 and trainer.is_global_zero:
            records: list[CompletionRecord] = pl_module.last_records  # type: ignore[assignment]
            shown = len(records) // len(batch) * min(self.num_prompts, len(batch))
            self._write(trainer, "train", records[:shown], episode=batch.episode_index)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._write_evaluation(trainer, pl_module, "validation")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._size_before_validation = self._size(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._size_before_validation = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        size = self._size(trainer) if self._size_before_validation is None else self._size_before_validation
        checkpoint["samples"] = {"folder": str(run_folder(trainer).absolute()), "bytes": size}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drops the lines that the run wrote after the checkpoint; the resumed run writes them again."""
        saved = checkpoint.get("samples")  # none if this callback was not there
        if not saved or trainer.state.fn != "fit" or not trainer.is_global_zero or not continues(trainer, saved["folder"]):
            return
        if self._size(trainer) > saved["bytes"]:
            os.truncate(self.file(trainer), saved["bytes"])

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._write_evaluation(trainer, pl_module, "test")

    def _write_evaluation(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        if self.evaluation and trainer.is_global_zero and not trainer.sanity_checking:
            self._write(trainer, split, pl_module.last_records)  # type: ignore[arg-type]

    def _write(self, trainer: Trainer, split: str, records: Iterable[Any], **extra: Any) -> None:
        rows = ({"split": split, "step": trainer.global_step, **extra, **record.to_dict()} for record in records)
        append_rows(self.file(trainer), rows)

    def file(self, trainer: Trainer) -> Path:
        return run_folder(trainer) / "samples.jsonl"

    def _size(self, trainer: Trainer) -> int:
        """Bytes of the file, 0 without one."""
        file = self.file(trainer)
        return file.stat().st_size if file.exists() else 0


class PredictionWriter(Callback):
    """Writes one JSON line per scenario of `predict`: id, prompt, completion, rewards, finish reason.

    Args:
        path: The file; None for `predictions.jsonl` in the run's folder. Several ranks write a file each (`...-rank1.jsonl`).
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        file = self.file(trainer)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("", encoding="utf-8")

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any) -> None:
        append_rows(self.file(trainer), outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print(f"predictions: {self.file(trainer)}")

    def file(self, trainer: Trainer) -> Path:
        path = Path(self.path) if self.path is not None else run_folder(trainer) / "predictions.jsonl"
        return path if trainer.global_rank == 0 else path.with_stem(f"{path.stem}-rank{trainer.global_rank}")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows as JSON lines, all or none, making the folder if need be."""
    append_lines(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
