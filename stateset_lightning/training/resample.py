"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): groups that teach nothing give way to other prompts.

Each rank replaces groups of its own and asks nobody: ranks may need different numbers of rounds. Letters: P prompts, G
completions per prompt, N = P * G completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from stateset_lightning.training.metrics import constant_groups
from stateset_lightning.types import PromptBatch, Rollout, Scores

T = TypeVar("T")

Replacements = Callable[[PromptBatch, Sequence[int], int], PromptBatch]
"""(batch, slots of it, round) -> other prompts for these slots; see `EpisodeLoader.replacements`."""


@dataclass(frozen=True)
class Sample:
    """Prompts, their completions and what the rewards said of them."""

    batch: PromptBatch
    rollout: Rollout
    scores: Scores

    @property
    def totals_PG(self) -> Tensor:
        return self.scores.totals_N.reshape(-1, self.rollout.num_generations)

    def uninformative(self) -> list[int]:
        """Prompts whose completions all have one total reward, or of which fewer than two have any."""
        constant_P, dropped_P = constant_groups(self.totals_PG)
        return [int(slot) for slot in (constant_P | dropped_P).nonzero()]

    def with_groups(self, slots: Sequence[int], other: Sample) -> Sample:
        """The groups of `other` in place of those in the given slots, whose positions they take over."""
        size = self.rollout.num_generations
        prompts = {slot: i for i, slot in enumerate(slots)}  # slot -> prompt of `other`
        completions = {slot * size + g: i * size + g for slot, i in prompts.items() for g in range(size)}
        batch = copy(self.batch)
        for name in ("prompt_tokens", "conversations", "scenarios", "rows"):
            setattr(batch, name, _merged(getattr(self.batch, name), getattr(other.batch, name), prompts))
        return Sample(
            batch,
            _rollout(self.rollout, other.rollout, prompts, completions),
            _scores(self.scores, other.scores, completions),
        )


def resample(
    sample: Callable[[PromptBatch], Sample], replacements: Replacements, first: Sample, rounds: int
) -> tuple[Sample, list[Sample]]:
    """Replaces uninformative groups for at most `rounds` rounds; those of the last round stay, whatever they are.

    Returns:
        The sample to train on, and all samples that were drawn as replacements.
    """
    current, drawn = first, []
    for number in range(1, rounds + 1):
        slots = current.uninformative()
        if not slots:
            break
        drawn.append(sample(replacements(current.batch, slots, number)))
        current = current.with_groups(slots, drawn[-1])
    return current, drawn


def _merged(mine: Sequence[T], other: Sequence[T], place: Mapping[int, int]) -> list[T]:
    """`mine`, with `other[place[i]]` instead of each item i in `place`."""
    return [other[place[i]] if i in place else value for i, value in enumerate(mine)]


def _rollout(mine: Rollout, other: Rollout, prompts: Mapping[int, int], completions: Mapping[int, int]) -> Rollout:
    def packed(values_T: Tensor, other_T: Tensor) -> Tensor:
        parts = values_T.split(mine.lengths_N.tolist()), other_T.split(other.lengths_N.tolist())
        return torch.cat(_merged(*parts, completions))

    return replace(
        mine,
        prompt_tokens=_merged(mine.prompt_tokens, other.prompt_tokens, prompts),
        completion_tokens_T=packed(mine.completion_tokens_T, other.completion_tokens_T),
        lengths_N=torch.stack(_merged(list(mine.lengths_N), list(other.lengths_N), completions)),
        logprobs_T=packed(mine.logprobs_T, other.logprobs_T),
        sampled_T=packed(mine.sampled_T, other.sampled_T),
        finish_reasons=_merged(mine.finish_reasons, other.finish_reasons, completions),
        texts=_merged(mine.texts, other.texts, completions),
    )


def _scores(mine: Scores, other: Scores, completions: Mapping[int, int]) -> Scores:
    back = {there: n for n, there in completions.items()}
    kept = [failure for failure in mine.failures if failure.completion not in completions]
    return replace(
        mine,
        values_NF=torch.stack(_merged(list(mine.values_NF), list(other.values_NF), completions)),
        totals_N=torch.stack(_merged(list(mine.totals_N), list(other.totals_N), completions)),
        breakdowns=_merged(mine.breakdowns, other.breakdowns, completions) if mine.breakdowns else [],
        failures=kept + [replace(failure, completion=back[failure.completion]) for failure in other.failures],
        seconds=mine.seconds + other.seconds,
    )
