"""Completions for people to read: some of every few episodes, all of an evaluation, all predictions.

They go to files of JSON lines, and those of a run to loggers that can show them: a table in W&B, text in TensorBoard.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

from annotated_types import Ge
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch.distributed.tensor import DTensor

from stateset_lightning.errors import bounded
from stateset_lightning.files import atomic_write, check_output, keep_inputs
from stateset_lightning.policy import SamplingMask
from stateset_lightning.ranks import Ranks
from stateset_lightning.run.folder import PREDICTIONS, SAMPLES, continues, of_rank, run_folder
from stateset_lightning.run.records import append_rows, keep_rows
from stateset_lightning.training.episode import Episode, groups_of

Rows = list[dict[str, Any]]
# Rows that are written together: their split, step and episode (-1 in an evaluation).
Block = tuple[str, int, int]

# Completions of an evaluation that loggers show; the file has all.
SHOWN = 16


@bounded("samples")
@dataclass(eq=False)
class SampleWriter(Callback):
    """Writes completions and their rewards to `samples.jsonl` in the run's folder; shows them in W&B and TensorBoard.

    Training completions are written when their episode ends: token by token, `logprobs` are those of the policy that
    sampled and `logprobs_after` those of the policy after the episode's optimizer steps (nats, at the temperature of
    sampling).

    Args:
        every_n_episodes: An episode's completions are written every so many episodes.
        num_prompts: Groups written of such an episode.
        evaluation: Whether the completions of validation and test are written too.
        max_tokens: Tokens of a completion that are written one by one; its text is always complete.
        max_megabytes: Size from which on the file is thinned out: every second episode and evaluation goes; the first
            and the last stay.
    """

    every_n_episodes: Annotated[int, Ge(1)] = 10
    num_prompts: Annotated[int, Ge(1)] = 2
    evaluation: bool = True
    max_tokens: Annotated[int, Ge(0)] = 512
    max_megabytes: Annotated[float, Ge(1)] = 64

    def __post_init__(self) -> None:
        self._episode: Rows = []  # rows of the running episode
        self._evaluated: Rows = []  # this rank's rows of the running evaluation
        self._sizes: dict[Block, int] = {}  # bytes of each block in the file of a run that nothing interrupts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            check_output(run_folder(trainer) / SAMPLES)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.episode_index % self.every_n_episodes or not trainer.is_global_zero:
            return
        episode = pl_module.episode
        if batch.micro_step == 0:  # a run that is resumed inside the episode knows no records of it
            records = pl_module.last_records[: self.num_prompts * episode.num_generations]
            self._episode = [{"episode": episode.index, **record} for record in records]
        if batch.micro_step == batch.num_micro_steps - 1 and self._episode:
            told = token_rows(episode, len(self._episode), self.max_tokens, pl_module)
            rows = [{**row, **more} for row, more in zip(self._episode, told, strict=True)]
            self._episode = []
            self._write(trainer, "train", rows, len(rows))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if self.evaluation:
            self._evaluated += pl_module.last_records

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.evaluation and not trainer.sanity_checking:
            # Ranks take turns with the prompts; at the end, since one of them may have a batch more.
            turns = zip_longest(*Ranks.current().gather(self._evaluated))
            rows = [row for turn in turns for row in turn if row is not None]
            self._write(trainer, "test" if trainer.testing else "validation", rows, SHOWN)

    on_test_start, on_test_batch_end, on_test_end = on_validation_start, on_validation_batch_end, on_validation_end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = {"step": trainer.global_step, "episode": self._episode, "sizes": list(self._sizes.items())}
        checkpoint["samples"] = {"folder": str(run_folder(trainer).absolute()), **state}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drops the rows that the run wrote after the checkpoint; the resumed run writes them again."""
        saved = checkpoint.get("samples")  # none if this callback was not there
        if not saved or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        self._episode = saved["episode"]

        def written_before(row: Mapping[str, Any]) -> bool:
            is_known = block_of(row) in self._sizes or "sizes" not in saved  # as in version 0.1: by the step alone
            return row["step"] <= saved["step"] and (is_known or row["split"] == "test")

        if continues(trainer, saved["folder"]):
            self._sizes = dict(saved.get("sizes", ()))
            keep_rows(run_folder(trainer) / SAMPLES, written_before)

    def _write(self, trainer: Trainer, split: str, rows: Iterable[Mapping[str, Any]], num_shown: int) -> None:
        rows = [{"split": split, "step": trainer.lightning_module.weights_step, **row} for row in rows]
        if not rows or not trainer.is_global_zero:
            return
        file, block = run_folder(trainer) / SAMPLES, block_of(rows[0])
        self._sizes[block] = self._sizes.get(block, 0) + append_rows(file, rows)
        log_samples(trainer, split, rows[:num_shown])
        # By what was written and not by the file: after a kill, that lacks what was thinned out after the checkpoint.
        dropped = thinned_out(self._sizes)
        size, size_of_dropped = sum(self._sizes.values()), sum(self._sizes[block] for block in dropped)
        # The file is not rewritten for every row where its first and last blocks alone are above the limit.
        if size > self.max_megabytes * 2**20 and size_of_dropped > size / 4:
            keep_rows(file, lambda row: block_of(row) not in dropped)
            self._sizes = {block: size for block, size in self._sizes.items() if block not in dropped}


class PredictionWriter(Callback):
    """Writes one JSON line per scenario of `predict`: id, prompt, completion, rewards, finish reason.

    Args:
        path: The file; None for `predictions.jsonl` in the run's folder. Several ranks write a file each
            (`...-rank1.jsonl`).
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        keep_inputs(trainer.ckpt_path)
        with atomic_write(self.file(trainer)):
            pass  # an empty file

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        append_rows(self.file(trainer), outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print(f"predictions: {self.file(trainer)}")

    def file(self, trainer: Trainer) -> Path:
        return of_rank(trainer, run_folder(trainer) / PREDICTIONS if self.path is None else Path(self.path))


def block_of(row: Mapping[str, Any]) -> Block:
    """What a row of `samples.jsonl` was written with."""
    return row["split"], row["step"], row.get("episode", -1)


def thinned_out(blocks: Iterable[Block]) -> set[Block]:
    """Every second block of each split, but not the first and the last: what stays is spread over the run."""
    splits = groupby(sorted(blocks, key=itemgetter(0)), key=itemgetter(0))
    return {block for _, of_split in splits for block in [*of_split][1:-1:2]}


# Token by token -------------------------------------------------------------------------------------------------------


def token_rows(episode: Episode, num_completions: int, max_tokens: int, module: Any) -> Rows:
    """The first `max_tokens` tokens of the first completions, and their log-probs at the temperature of sampling, in
    nats.

    `tokens` are texts, which join to the completion's; `logprobs` are of the policy that sampled (None where a server
    gave none; a target has none), `logprobs_after` of the module's as it is now. Where a reference scored the
    completion, `ref_logprobs` are its own. All are None of an environment's tokens.
    """

    def first_tokens(values_T: Any) -> list[Any]:
        return [values[:max_tokens] for values in values_T.split(episode.lengths_N.tolist())[:num_completions]]

    completions = first_tokens(episode.completion_tokens_T)
    rows: Rows = [{"tokens": token_texts(module.tokenizer, tokens.tolist())} for tokens in completions]
    known = {"logprobs": episode.sampling_logprobs_T, "ref_logprobs": episode.ref_logprobs_T}
    logprobs = {name: first_tokens(values_T) for name, values_T in known.items() if values_T is not None}
    # Not known if weights are sharded: all ranks would have to take part.
    if not any(isinstance(parameter, DTensor) for parameter in module.policy.parameters()):
        prompts = episode.prompt_tokens[: num_completions // episode.num_generations]
        mask = episode.sampling_mask and SamplingMask.cat(first_tokens(SamplingMask(*episode.sampling_mask)))
        groups = groups_of(prompts, completions, [n for n, ids in enumerate(completions) if len(ids)], mask=mask)
        now_T, _ = module.policy.score_without_gradient(groups, module.rollout.temperature)
        logprobs["logprobs_after"] = list(now_T.cpu().split([len(tokens) for tokens in completions]))
    sampled = None if episode.sampled_T is None else first_tokens(episode.sampled_T)
    for name, values in logprobs.items():
        for n, row in enumerate(rows):
            if sampled is not None:
                values[n] = values[n].masked_fill(~sampled[n], math.nan)
            if name != "ref_logprobs" or episode.active_N[n]:  # of the others it has scored none
                row[name] = [None if math.isnan(value) else round(value, 4) for value in values[n].tolist()]
    return rows


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    A token by itself would lose its leading space (SentencePiece) or be half a character (bytes). A character of
    several tokens is added by the last of them; the others are "".
    """
    texts, start, read = [], 0, 0  # decoding begins one text before the one that is to be read
    for end in range(1, len(ids) + 1):
        before, text = (tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False) for stop in (read, end))
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            texts.append(text[len(before) :])
            start, read = read, end
    return texts


# In loggers -----------------------------------------------------------------------------------------------------------

COLUMNS = "step episode id prompt target completion reward advantage finish_reason num_tokens"


def log_samples(trainer: Trainer, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Shows rows of `samples.jsonl` as `samples/<split>`.

    In W&B each call makes a table of its own, which nothing keeps in memory. To TensorBoard, whose texts are Markdown,
    all is code: a model's own links and images stay text.
    """
    columns, data = sample_table(rows)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(f"samples/{split}", columns=columns, data=data, step=rows[0]["step"])
        elif isinstance(logger, TensorBoardLogger):
            cells = ("\n".join(f"{name}: {cell}" for name, cell in zip(columns, row, strict=True)) for row in data)
            text = "\n\n---\n\n".join(indent(each, "    ", bool) for each in cells)
            logger.experiment.add_text(f"samples/{split}", text, rows[0]["step"])


def sample_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and data: those of `COLUMNS` that any row has, then each reward."""
    columns = [name for name in COLUMNS.split() if any(name in row for row in rows)]
    rewards = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    # As text, since the targets of a data set need not be of one type, and a column must be.
    cells = [{**row, "target": None if row.get("target") is None else str(row["target"])} for row in rows]
    data = [[row.get(name) for name in columns] + [row["rewards"].get(name) for name in rewards] for row in cells]
    return columns + [f"reward/{name}" for name in rewards], data
