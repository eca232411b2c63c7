"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): groups that teach nothing give way to other prompts.

Each rank replaces groups of its own and asks nobody: ranks may need different numbers of rounds. Letters: P prompts, G
completions per prompt, N = P * G completions.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from stateset_lightning.policy import SamplingMask
from stateset_lightning.training.metrics import constant_groups
from stateset_lightning.types import Metrics, PromptBatch, Rollout, Scores

T = TypeVar("T")

# (batch, slots of it, round) -> other prompts for these slots; see `EpisodeLoader.replacements`.
Replacements = Callable[[PromptBatch, Sequence[int], int], PromptBatch]


@dataclass(frozen=True)
class Sample:
    """Prompts, their completions, what the rewards said of them, and what happened in conversations, by metric.

    Where an environment answers, `told` has what files say of each conversation (see `Conversation.told`), and `turns`,
    of each turn of each conversation, its sampled tokens and its return; they are empty elsewhere.
    """

    batch: PromptBatch
    rollout: Rollout
    scores: Scores
    conversations: Metrics = field(default_factory=dict)
    told: list[dict[str, Any]] = field(default_factory=list)
    turns: list[list[tuple[int, float]]] = field(default_factory=list)

    @property
    def totals_PG(self) -> Tensor:
        return self.scores.totals_N.reshape(-1, self.rollout.num_generations)

    def uninformative(self) -> list[int]:
        """Prompts whose completions all have one total reward, or of which fewer than two have any."""
        constant_P, dropped_P = constant_groups(self.totals_PG)
        return [int(slot) for slot in (constant_P | dropped_P).nonzero()]

    def with_groups(self, slots: Sequence[int], other: "Sample") -> "Sample":
        """The groups of `other` in place of those in the given slots, whose positions they take over."""
        size, prompts = self.rollout.num_generations, list(range(len(self.batch)))
        for i, slot in enumerate(slots):
            prompts[slot] = len(prompts) + i  # counted through both
        completions = [prompt * size + g for prompt in prompts for g in range(size)]
        batch = copy(self.batch)
        for name in ("prompt_tokens", "conversations", "scenarios", "rows"):
            setattr(batch, name, _picked(getattr(self.batch, name), getattr(other.batch, name), prompts))
        rollout = _rollout(self.rollout, other.rollout, prompts, completions)
        scores = _scores(self.scores, other.scores, completions)
        told, turns = _picked(self.told, other.told, completions), _picked(self.turns, other.turns, completions)
        return Sample(batch, rollout, scores, self.conversations, told, turns)


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


def _picked(mine: Sequence[T], other: Sequence[T], rows: Sequence[int]) -> list[T]:
    """Items of both, in this order; none where there are none."""
    both = [*mine, *other]
    return [both[row] for row in rows] if mine else []


def _rollout(mine: Rollout, other: Rollout, prompts: Sequence[int], completions: Sequence[int]) -> Rollout:
    def packed(values_T: Any, other_T: Any, cat: Callable[[list[Any]], Any] = torch.cat) -> Any:
        parts = values_T.split(mine.lengths_N.tolist()), other_T.split(other.lengths_N.tolist())
        return cat(_picked(*parts, completions))

    return replace(
        mine,
        prompt_tokens=_picked(mine.prompt_tokens, other.prompt_tokens, prompts),
        completion_tokens_T=packed(mine.completion_tokens_T, other.completion_tokens_T),
        lengths_N=torch.cat([mine.lengths_N, other.lengths_N])[completions],
        logprobs_T=packed(mine.logprobs_T, other.logprobs_T),
        sampled_T=packed(mine.sampled_T, other.sampled_T),
        finish_reasons=_picked(mine.finish_reasons, other.finish_reasons, completions),
        texts=_picked(mine.texts, other.texts, completions),
        sampling_mask=mine.sampling_mask and packed(mine.sampling_mask, other.sampling_mask, SamplingMask.cat),
    )


def _scores(mine: Scores, other: Scores, completions: Sequence[int]) -> Scores:
    place = {completion: n for n, completion in enumerate(completions)}
    failures = [(failure.completion, failure) for failure in mine.failures]
    failures += [(len(completions) + failure.completion, failure) for failure in other.failures]
    return replace(
        mine,
        values_NF=torch.cat([mine.values_NF, other.values_NF])[completions],
        totals_N=torch.cat([mine.totals_N, other.totals_N])[completions],
        breakdowns=_picked(mine.breakdowns, other.breakdowns, completions),
        failures=[replace(failure, completion=place[n]) for n, failure in failures if n in place],
        seconds=mine.seconds + other.seconds,
    )
