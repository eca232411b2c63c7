"""Completions as JSON lines: some of every few episodes, all of an evaluation, all predictions."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from stateset_lightning.files import append_lines, atomic_write
from stateset_lightning.ranks import Ranks
from stateset_lightning.run.folder import continues, run_folder
from stateset_lightning.run.records import logprobs_now, token_rows

EVALUATED = 16
"""Completions of an evaluation that loggers show; the file has all."""


class SampleWriter(Callback):
    """Writes completions with their rewards to `samples.jsonl` in the run's folder, and shows them in W&B and
    TensorBoard.

    Training completions are written when their episode ends: token by token, `logprobs` are those of the policy that
    sampled and `logprobs_after` those of the policy that the episode's optimizer steps have made of it (nats, at the
    temperature of sampling).

    Args:
        every_n_episodes: An episode's completions are written every so many episodes.
        num_prompts: Groups written of such an episode.
        evaluation: Whether the completions of validation and test are written too.
        max_tokens: Tokens of a completion that are written one by one; its text is always whole.
        max_megabytes: Size from which on the file is thinned out: every second episode and evaluation goes; the first
            and the last stay.
    """

    def __init__(
        self,
        every_n_episodes: Annotated[int, Ge(1)] = 10,
        num_prompts: Annotated[int, Ge(1)] = 2,
        evaluation: bool = True,
        max_tokens: Annotated[int, Ge(0)] = 512,
        max_megabytes: Annotated[float, Ge(1)] = 64,
    ) -> None:
        self.every_n_episodes = every_n_episodes
        self.num_prompts = num_prompts
        self.evaluation = evaluation
        self.max_tokens = max_tokens
        self.max_megabytes = max_megabytes
        self._episode: list[dict[str, Any]] = []  # rows of the episode under way
        self._evaluated: list[dict[str, Any]] = []  # this rank's rows of the evaluation under way
        self._validated_step = -1  # of the last whole validation
        self._size_after_thinning = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.episode_index % self.every_n_episodes or not trainer.is_global_zero:
            return
        if batch.micro_step == 0:
            self._episode = self._episode_rows(pl_module, min(self.num_prompts, len(batch)))
        if batch.micro_step == batch.num_micro_steps - 1:
            self._write_episode(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self._keep_evaluated(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated_step = trainer.global_step
            self._write_evaluation(trainer, "validation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated = []

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self._keep_evaluated(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_evaluation(trainer, "test")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = {"step": trainer.global_step, "validated_step": self._validated_step, "episode": self._episode}
        checkpoint["samples"] = {"folder": str(run_folder(trainer).absolute()), **state}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drops the rows that the run wrote after the checkpoint; the resumed run writes them again."""
        saved = checkpoint.get("samples")  # none if this callback was not there
        if not saved or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        self._episode, self._validated_step = saved["episode"], saved["validated_step"]
        under_way = {row["episode"] for row in self._episode}
        if continues(trainer, saved["folder"]) and self.file(trainer).exists():
            last = {"train": saved["step"], "validation": saved["validated_step"], "test": saved["step"]}
            _keep_rows(
                self.file(trainer),
                lambda row: row["step"] <= last[row["split"]] and row.get("episode") not in under_way,
            )

    def _episode_rows(self, pl_module: Any, num_prompts: int) -> list[dict[str, Any]]:
        episode = pl_module.episode
        records = pl_module.last_records[: num_prompts * episode.num_generations]
        tokens = token_rows(episode, num_prompts, pl_module.tokenizer, self.max_tokens)
        return [
            {"episode": episode.index, **record.to_dict(), **row} for record, row in zip(records, tokens, strict=True)
        ]

    def _write_episode(self, trainer: Trainer, pl_module: Any) -> None:
        rows, self._episode = self._episode, []
        if not rows:
            return
        episode = pl_module.episode
        num_prompts = len(rows) // episode.num_generations
        now = logprobs_now(episode, num_prompts, pl_module.policy, pl_module.rollout.temperature, self.max_tokens)
        if now is not None:
            rows = [{**row, "logprobs_after": values} for row, values in zip(rows, now, strict=True)]
        rows = [{"split": "train", "step": trainer.global_step, **row} for row in rows]
        append_rows(self.file(trainer), rows)
        log_samples(trainer, "train", rows)
        self._thin_out(trainer)

    def _keep_evaluated(self, pl_module: Any) -> None:
        if self.evaluation:
            self._evaluated += [record.to_dict() for record in pl_module.last_records]

    def _write_evaluation(self, trainer: Trainer, split: str) -> None:
        mine, self._evaluated = self._evaluated, []
        if not self.evaluation:
            return
        # Ranks take turns with the prompts; at the end, since one of them may have a batch more.
        turns = zip_longest(*Ranks.current().gather(mine))
        rows = [
            {"split": split, "step": trainer.global_step, **row} for turn in turns for row in turn if row is not None
        ]
        if rows and trainer.is_global_zero:
            append_rows(self.file(trainer), rows)
            log_samples(trainer, split, rows[:EVALUATED])
            self._thin_out(trainer)

    def _thin_out(self, trainer: Trainer) -> None:
        # Twice what thinning left: where that is above the limit already, the file is not rewritten for every row.
        file, limit = self.file(trainer), max(self.max_megabytes * 2**20, 2 * self._size_after_thinning)
        if file.stat().st_size > limit:
            thin_out(file)
            self._size_after_thinning = file.stat().st_size

    def file(self, trainer: Trainer) -> Path:
        return run_folder(trainer) / "samples.jsonl"


class PredictionWriter(Callback):
    """Writes one JSON line per scenario of `predict`: id, prompt, completion, rewards, finish reason.

    Args:
        path: The file; None for `predictions.jsonl` in the run's folder. Several ranks write a file each
            (`...-rank1.jsonl`).
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        file = self.file(trainer)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        append_rows(self.file(trainer), outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print(f"predictions: {self.file(trainer)}")

    def file(self, trainer: Trainer) -> Path:
        path = Path(self.path) if self.path is not None else run_folder(trainer) / "predictions.jsonl"
        return path if trainer.global_rank == 0 else path.with_stem(f"{path.stem}-rank{trainer.global_rank}")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows as JSON lines, all or none, making the folder if need be."""
    append_lines(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def block_of(row: Mapping[str, Any]) -> tuple[str, int, int]:
    """What a row of `samples.jsonl` was written with: its split, step and episode (-1 in an evaluation)."""
    return row["split"], row["step"], row.get("episode", -1)


def thin_out(path: Path) -> None:
    """Drops every second block of each split, but neither the first nor the last, so that what is left is spread over
    the run.
    """
    blocks: dict[str, dict[Any, None]] = {}
    for _, row in _rows(path):
        blocks.setdefault(row["split"], {})[block_of(row)] = None
    kept = {block for of_split in blocks.values() for block in [*list(of_split)[::2], list(of_split)[-1]]}
    _keep_rows(path, lambda row: block_of(row) in kept)


def _keep_rows(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    with atomic_write(path) as file:
        file.writelines(line for line, row in _rows(path) if keep(row))


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines with what they hold, but for a last one that a kill tore."""
    with path.open("rb") as file:
        yield from ((line, json.loads(line)) for line in file if line.endswith(b"\n"))


# MERGED: Completions in loggers that can show them: a table in W&B, text in TensorBoard.

COLUMNS = (
    "step",
    "episode",
    "id",
    "prompt",
    "target",
    "completion",
    "reward",
    "advantage",
    "finish_reason",
    "num_tokens",
)


def log_samples(trainer: Trainer, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Shows rows of `samples.jsonl` as `samples/<split>`; in W&B as a table of its own for each call, which nothing
    keeps in memory.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            columns, data = sample_table(rows)
            logger.log_table(f"samples/{split}", columns=columns, data=data, step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(f"samples/{split}", sample_text(rows), trainer.global_step)


def sample_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and data: those of `COLUMNS` that any row has, then each reward."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    rewards = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    # As text, since the targets of a data set need not be of one type, and a column must be.
    cells = [{**row, "target": None if row.get("target") is None else str(row["target"])} for row in rows]
    data = [[row.get(name) for name in columns] + [row["rewards"].get(name) for name in rewards] for row in cells]
    return columns + [f"reward/{name}" for name in rewards], data


def sample_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in which prompts and completions are code: a model's own links and images stay text."""
    parts: list[str] = []
    prompt = None
    for row in rows:
        if row["prompt"] != prompt:
            prompt = row["prompt"]
            parts += ["**prompt**", _code(prompt)]
        numbers = {"reward": row["reward"], **row["rewards"], "advantage": row.get("advantage")}
        said = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items() if value is not None)
        parts += [f"{said or 'failed'}, {row['num_tokens']} tokens, {row['finish_reason']}", _code(row["completion"])]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
