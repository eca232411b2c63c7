"""Rows of a run's files: a record of each completion, what a skipped optimizer step would have trained, JSON lines."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from stateset_lightning.files import append_lines, atomic_write, read_lines
from stateset_lightning.redaction import json_text, plain, redacted
from stateset_lightning.run.folder import BAD_STEPS, of_rank, run_folder
from stateset_lightning.training.episode import Episode
from stateset_lightning.training.resample import Sample

MAX_PARTS = 10_000  # values of a breakdown, of which each is searched for secrets


def make_records(sample: Sample, advantages: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """What was asked, what was answered and how it was scored: a row of each completion, in order, as JSON holds it.

    `reward` and what is in `rewards` are None where a reward failed, does not apply, or the total cannot be formed;
    any other name is missing where it has no value. Those of a conversation have `turns`, the prompt's included,
    `num_turns` of the model, `ended_by` (environment, turns, tokens, length or failure) and `environment_reward`.
    """
    batch, rollout, scores = sample.batch, sample.rollout, sample.scores
    records, lengths_N = [], rollout.sampled_lengths_N
    for n, text in enumerate(rollout.texts):
        scenario = batch.scenarios[n // rollout.num_generations]
        rewards = zip(scores.names, scores.values_NF[n].tolist(), strict=True)
        failures = [failure for failure in scores.failures if failure.completion == n]
        row = {
            "id": scenario.id,
            "topic": scenario.topic,
            "prompt": scenario.turns()[-1].content,
            "completion": text,
            "reward": plain(scores.totals_N[n].item()),
            "rewards": plain(dict(rewards)),
            "finish_reason": str(rollout.finish_reasons[n]),
            "num_tokens": int(lengths_N[n]),
            "advantage": None if advantages is None else plain(advantages[n]),
            "target": plain(scenario.target),
            "breakdown": redacted(plain(scores.breakdowns[n], MAX_PARTS)) or None,
            "errors": plain([f"{failure.reward}: {failure.error}: {failure.message}" for failure in failures]) or None,
            **(sample.told[n] if sample.told else {}),
        }
        records.append({name: value for name, value in row.items() if value is not None or name == "reward"})
    return records


# Optimizer steps that are skipped, because loss or gradient is not finite ---------------------------------------------


def write_bad_step(
    trainer: Trainer, episode: Episode, step_of_pass: int, norm: float, records: list[dict[str, Any]], tokenizer: Any
) -> Path:
    """Appends the completions of a skipped optimizer step to this rank's `bad_steps.jsonl`, and returns the file.

    Args:
        trainer: Says where, and which optimizer step it would have been.
        episode: What the step trains.
        step_of_pass: Which optimizer step of a pass over the episode it is.
        norm: Of the gradient.
        records: Of the episode's completions; empty in a run that was resumed inside the episode, whose rewards are not
            known any more.
        tokenizer: Decodes prompts and completions in that case.
    """
    step = {"step": trainer.global_step + 1, "episode": episode.index, "grad_norm": str(norm)}
    trained_N = (episode.micro_step_N // trainer.accumulate_grad_batches == step_of_pass) & episode.active_N
    completions = episode.completion_tokens_T.split(episode.lengths_N.tolist())
    rows = []
    for n in trained_N.nonzero().flatten().tolist():
        prompt, completion = episode.prompt_tokens[n // episode.num_generations], completions[n].tolist()
        decoded = {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(completion)}
        share = {"advantage": str(episode.advantages_N[n].item()), "weight": str(episode.weights_N[n].item())}
        rows.append({**step, **(records[n] if records else decoded), **share})
    file = of_rank(trainer, run_folder(trainer) / BAD_STEPS)
    append_rows(file, rows)
    return file


def drop_later_steps(trainer: Trainer, step: int) -> None:
    """Drops the rows of skipped steps after optimizer step `step`, from which the run now goes on."""
    keep_rows(of_rank(trainer, run_folder(trainer) / BAD_STEPS), lambda row: row["step"] <= step)


# JSON lines -----------------------------------------------------------------------------------------------------------


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Appends rows as JSON lines, all or none, making the folder if need be; returns how many bytes."""
    text = "".join(f"{json_text(row)}\n" for row in rows)
    append_lines(path, text)
    return len(text.encode())


def keep_rows(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Rewrites a file, if there is one, with some of its rows, as they are; one at which `keep` fails is damaged."""
    if not path.exists():
        return
    with atomic_write(path) as file:
        file.writelines(line for _, line, kept in read_lines(path, lambda text: keep(json.loads(text))) if kept)
