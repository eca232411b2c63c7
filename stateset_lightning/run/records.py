"""One row per completion, for files and tables: what was asked, what was answered, what the rewards said, and token by
token how likely.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from stateset_lightning.files import append_lines, atomic_write
from stateset_lightning.policy import Group, Policy
from stateset_lightning.run.folder import run_folder
from stateset_lightning.training.episode import Episode
from stateset_lightning.training.resample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CompletionRecord:
    """`rewards` and `reward` are None where a reward failed, does not apply, or its total cannot be formed."""

    id: str
    topic: str | None
    prompt: str
    completion: str
    reward: float | None
    rewards: dict[str, float | None]
    finish_reason: str
    num_tokens: int
    advantage: float | None = None
    target: Any = None
    breakdown: dict[str, Any] | None = None
    errors: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None or key == "reward"}


def make_records(sample: Sample, advantages: Sequence[float] | None = None) -> list[CompletionRecord]:
    """Records of all completions, in order."""
    batch, rollout, scores = sample.batch, sample.rollout, sample.scores
    errors: dict[int, list[str]] = {}
    for failure in scores.failures:
        errors.setdefault(failure.completion, []).append(f"{failure.reward}: {failure.error}: {failure.message}")
    records, lengths_N = [], rollout.sampled_lengths_N
    for n, text in enumerate(rollout.texts):
        scenario = batch.scenarios[n // rollout.num_generations]
        records.append(
            CompletionRecord(
                id=scenario.id,
                topic=scenario.topic,
                prompt=scenario.turns()[-1].content,
                completion=text,
                reward=_finite(scores.totals_N[n].item()),
                rewards={
                    name: _finite(value) for name, value in zip(scores.names, scores.values_NF[n].tolist(), strict=True)
                },
                finish_reason=str(rollout.finish_reasons[n]),
                num_tokens=int(lengths_N[n]),
                advantage=None if advantages is None else _finite(advantages[n]),
                target=_json(scenario.target),
                breakdown=_plain(scores.breakdowns[n]) if n < len(scores.breakdowns) else None,
                errors=errors.get(n),
            )
        )
    return records


def token_rows(
    episode: Episode, num_prompts: int, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[dict[str, Any]]:
    """The first `max_tokens` tokens of each completion of the first groups: `tokens` (texts, which join to the
    completion's) and `logprobs` (nats, of the policy that sampled, at the temperature of sampling).

    Where there is a reference, and the completion was worth a pass of it, `ref_logprobs` too.
    """
    lengths = episode.lengths_N.tolist()
    tokens, logprobs = episode.completion_tokens_T.split(lengths), episode.sampling_logprobs_T.split(lengths)
    reference = None if episode.ref_logprobs_T is None else episode.ref_logprobs_T.split(lengths)
    rows = []
    for n in range(num_prompts * episode.num_generations):
        row = {
            "tokens": token_texts(tokenizer, tokens[n][:max_tokens].tolist()),
            "logprobs": _rounded(logprobs[n][:max_tokens]),
        }
        if reference is not None and episode.active_N[n]:
            row["ref_logprobs"] = _rounded(reference[n][:max_tokens])
        rows.append(row)
    return rows


def logprobs_now(
    episode: Episode, num_prompts: int, policy: Policy, temperature: float, max_tokens: int
) -> list[list[float]] | None:
    """Log-probs of the same tokens under the policy as it is now, by a pass without gradient. None if its weights are
    sharded: all ranks would have to take part.
    """
    if any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
        return None
    size = episode.num_generations
    completions = [
        c[:max_tokens].tolist()
        for c in episode.completion_tokens_T.split(episode.lengths_N.tolist())[: num_prompts * size]
    ]
    groups = [
        # an engine may return an empty completion
        Group(prompt, [c for c in completions[p * size : (p + 1) * size] if c])
        for p, prompt in enumerate(episode.prompt_tokens[:num_prompts])
    ]
    logprobs_T, _ = policy.score_without_gradient([group for group in groups if group.completions], temperature)
    return [_rounded(part) for part in logprobs_T.cpu().split([len(completion) for completion in completions])]


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it. A character of several tokens is added by the last of them, and
    others are "".

    A token by itself would lose its leading space (SentencePiece) or be half a character (bytes).
    """
    texts, start, read = [], 0, 0  # decoding begins one piece before the one that is to be read
    for end in range(1, len(tokens) + 1):
        before, text = (
            str(tokenizer.decode(tokens[start:stop], clean_up_tokenization_spaces=False)) for stop in (read, end)
        )
        if text.endswith("\ufffd") and end < len(tokens):
            texts.append("")
        else:
            texts.append(text[len(before) :])
            start, read = read, end
    return texts


def _rounded(values_T: Tensor) -> list[float]:
    return [round(value, 4) for value in values_T.tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(breakdown: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Parts of the scores as JSON holds them; what JSON has no form for is shown as text."""
    parts = {name: {key: _json(value) for key, value in inner.items()} for name, inner in breakdown.items() if inner}
    return parts or None


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return _finite(value)
    return value if isinstance(value, str | int | bool | None) else str(value)


# MERGED: Optimizer steps that are skipped because loss or gradient is not finite: what they would have trained is
# written down.
#


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
