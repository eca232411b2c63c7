"""Optimizer steps that are skipped because loss or gradient is not finite: what they would have trained is written
down.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from stateset_lightning.callbacks.run_folder import run_folder
from stateset_lightning.episode import Episode
from stateset_lightning.files import append_lines, atomic_write
from stateset_lightning.records import CompletionRecord


def is_bad(norm: float) -> bool:
    """Whether a gradient of this norm is to be skipped: NaN, infinite, or so large that its square is infinite in
    float32.

    AdamW keeps squares: an infinite one would never leave its second moment, and stop the parameter for good.
    """
    return not norm**2 < torch.finfo(torch.float32).max


def spoil_if_not_finite(loss: Tensor) -> Tensor:
    """The loss, times NaN if it is not finite: its gradient could be finite, and only gradients reach the other
    ranks.
    """
    return loss * torch.where(loss.detach().isfinite(), loss.new_ones(()), loss.new_full((), torch.nan))


def bad_steps_file(trainer: Trainer) -> Path:
    """Each rank writes its own completions."""
    name = "bad_steps.jsonl" if trainer.global_rank == 0 else f"bad_steps-rank{trainer.global_rank}.jsonl"
    return run_folder(trainer) / name


def write_bad_step(
    trainer: Trainer,
    episode: Episode,
    step_of_pass: int,
    norm: float,
    records: Sequence[CompletionRecord],
    tokenizer: Any,
) -> Path:
    """Appends the completions of a skipped optimizer step to `bad_steps.jsonl`, one per line, and returns the file.

    Args:
        trainer: Says where, and which optimizer step it would have been.
        episode: That the step trains.
        step_of_pass: Which optimizer step of a pass it is.
        norm: Of the gradient.
        records: Of the episode's completions; empty in a run that was resumed inside the episode, whose rewards are not
            known any more.
        tokenizer: To spell out prompts and completions in that case.
    """
    members = (episode.micro_step_N // trainer.accumulate_grad_batches == step_of_pass) & episode.active_N
    completions = episode.completion_tokens_T.split(episode.lengths_N.tolist())
    step = {"step": trainer.global_step + 1, "episode": episode.index, "grad_norm": str(norm)}
    rows = []
    for n in members.nonzero().flatten().tolist():
        if len(records) == len(members):
            what = records[n].to_dict()
        else:
            prompt = episode.prompt_tokens[n // episode.num_generations]
            what = {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(completions[n].tolist())}
        rows.append(
            {
                **step,
                **what,
                "advantage": str(episode.advantages_N[n].item()),
                "weight": str(episode.weights_N[n].item()),
            }
        )
    file = bad_steps_file(trainer)
    append_lines(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def drop_later_steps(trainer: Trainer, step: int) -> None:
    """Drops what an earlier attempt wrote after optimizer step `step`, from which the run now goes on."""
    file = bad_steps_file(trainer)
    if not file.exists():
        return
    lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    with atomic_write(file) as kept:
        kept.write("".join(line for line in lines if json.loads(line)["step"] <= step).encode())
