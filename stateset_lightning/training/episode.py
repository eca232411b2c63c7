"""An episode: one prompt batch sampled, scored and ready to be trained on, micro-step by micro-step.

Which micro-step trains which completion is fixed when the episode is made. Optimizer step k of a pass trains a
contiguous range of the episode's global prompt positions, the same in every pass; inside that range the micro-steps
share the work evenly, in whole groups where possible. Work is counted in tokens of a packed forward: a prompt once, its
completions behind it. Splitting a group computes its prompt again, so it is done only where there are fewer groups than
micro-steps, or where `max_tokens_per_step` would be exceeded.

Letters: P prompts and N = P * G completions of this rank, T tokens of all N completions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.algorithm.aggregation import sequence_sums
from stateset_lightning.errors import tell_once
from stateset_lightning.policy import Comparison, Group, SamplingMask
from stateset_lightning.policy.head import uploaded
from stateset_lightning.ranks import Ranks
from stateset_lightning.training.turns import TrainedScores, turn_advantages
from stateset_lightning.types import FinishReason, Rollout


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-step trains. Its T counts sampled tokens alone: an environment's are read, not trained."""

    groups: list[Group]
    advantages_N: Tensor
    weights_N: Tensor  # weight of each token of a completion
    lengths_N: Tensor
    sampling_logprobs_T: Tensor | None = None  # None of targets
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    select_T: Tensor | None = None
    advantages_T: Tensor | None = None
    experts_per_token_E: Tensor | None = None
    right_N: Tensor | None = None
    teacher_logprobs_T: Tensor | None = None
    comparison: Comparison | None = None  # of the policy's distributions with a teacher's

    def to(self, device: torch.device) -> "MicroBatch":
        """On a device, whose copies the host does not wait for; float64 as float32, as Apple's GPUs lack it."""

        def there(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return uploaded(value.float() if value.dtype == torch.float64 else value, device)

        return MicroBatch(**{name: there(value) for name, value in vars(self).items()})


@dataclass
class Episode:
    """Tensors and lists only, so that a checkpoint can hold it.

    Values per token ([T]) stand for all tokens of the completions; those of tokens that were not sampled mean nothing.
    """

    index: int
    prompt_tokens: list[list[int]]
    completion_tokens_T: Tensor
    lengths_N: Tensor
    sampling_logprobs_T: Tensor | None  # None of targets
    advantages_N: Tensor
    weights_N: Tensor
    active_N: Tensor  # whether a completion needs a policy forward
    micro_step_N: Tensor  # which micro-step of a pass trains a completion
    active_by_step: list[int]  # sampled tokens of all ranks to train, by optimizer step of a pass
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    teacher_logprobs_T: Tensor | None = None
    select_T: Tensor | None = None  # what the algorithm's selection keeps
    tokens_over_budget: int | None = 0  # of this rank's micro-steps of a pass; None without a budget
    sampled_T: Tensor | None = None  # None: all tokens were sampled
    experts_per_token_E: Tensor | None = None  # how often routers choose each expert; None where that is not trained
    sampling_mask: tuple[Tensor, Tensor] | None = None  # what `SamplingMask` is made of; None where it is not kept
    right_N: Tensor | None = None  # as of a `TokenBatch`
    advantages_T: Tensor | None = None  # where turns have advantages of their own

    @property
    def num_generations(self) -> int:
        return len(self.lengths_N) // len(self.prompt_tokens)

    def micro_batch(self, micro_step: int) -> MicroBatch:
        """The completions of a micro-step of a pass that need training; none, perhaps."""
        return self.batch_of((self.micro_step_N == micro_step) & self.active_N)

    def active_batch(self) -> MicroBatch:
        """All completions that need training."""
        return self.batch_of(self.active_N)

    def scatter(self, values: Tensor, rows_N: Tensor | None = None) -> Tensor:
        """Values of the sampled tokens of these completions, the active ones unless given, -> [T]; zero elsewhere."""
        all_T = torch.zeros(len(self.completion_tokens_T), dtype=values.dtype)
        all_T[self.sampled_tokens_of(self.active_N if rows_N is None else rows_N)] = values.cpu()
        return all_T

    def sampled_tokens_of(self, rows_N: Tensor) -> Tensor:
        """Which tokens are sampled ones of these completions, bool [T]."""
        tokens_T = rows_N.repeat_interleave(self.lengths_N)
        return tokens_T if self.sampled_T is None else tokens_T & self.sampled_T

    def state_dict(self) -> dict[str, Any]:
        """The arguments that make it."""
        return {**vars(self)}

    def batch_of(self, rows_N: Tensor) -> MicroBatch:
        """These completions."""
        lengths, rows = self.lengths_N.tolist(), rows_N.nonzero().flatten().tolist()
        sampled = None if self.sampled_T is None else self.sampled_T.split(lengths)
        tokens_T = self.sampled_tokens_of(rows_N)
        kinds = {"N": rows_N, "T": tokens_T}
        of_rows: dict[str, Any] = {  # what both have of each completion and of each token
            part.name: values[kinds[part.name[-1]]]
            for part in fields(MicroBatch)
            if part.name[-1] in kinds and (values := getattr(self, part.name)) is not None
        }
        of_rows["lengths_N"] = sequence_sums(tokens_T.long(), self.lengths_N)[rows_N]
        mask = None if self.sampling_mask is None else SamplingMask(*self.sampling_mask)[tokens_T]
        return MicroBatch(
            groups=groups_of(self.prompt_tokens, self.completion_tokens_T.split(lengths), rows, sampled, mask),
            experts_per_token_E=self.experts_per_token_E,
            **of_rows,
        )


def groups_of(
    prompts: Sequence[list[int]],
    completions: Sequence[Tensor],
    rows: Iterable[int],
    sampled: Sequence[Tensor] | None = None,
    mask: SamplingMask | None = None,
) -> list[Group]:
    """Some completions, together with those of the same prompt.

    Args:
        prompts: Tokens of each prompt.
        completions: Tokens of each completion, of all prompts.
        rows: Which completions, in order; none of them is empty.
        sampled: Which tokens of each completion were sampled; None: all.
        mask: Of the sampled tokens of these rows.
    """
    size, groups = len(completions) // len(prompts), []
    for p, members in groupby(rows, lambda n: n // size):
        chosen = list(members)
        masks = None if sampled is None else [sampled[n].tolist() for n in chosen]
        groups.append(Group(prompts[p], [completions[n].tolist() for n in chosen], masks))
    if mask is None:
        return groups
    parts = mask.split([sum(map(len, group.sampled_places)) for group in groups])
    return [replace(group, mask=part) for group, part in zip(groups, parts, strict=True)]


@dataclass(frozen=True)
class Plan:
    """How an episode is cut: `steps_per_episode` micro-steps per pass, `accumulate` of them to an optimizer step.

    Completions that need no training take no part in the balance; `max_tokens_per_step` is what a micro-step holds at
    most, where splitting groups can keep it.
    """

    num_prompts: int
    num_generations: int
    steps_per_episode: int
    accumulate: int
    ranks: Ranks = field(default_factory=Ranks)
    max_tokens_per_step: int | None = None

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of one pass."""
        return self.steps_per_episode // self.accumulate

    def step_of_position(self, positions: Tensor) -> Tensor:
        """The optimizer step of a pass that trains a global prompt position."""
        return positions * self.optimizer_steps // (self.num_prompts * self.ranks.world)

    def micro_steps(
        self, prompt_tokens: Sequence[Sequence[int]], lengths_N: Tensor, active_N: Tensor
    ) -> tuple[Tensor, int | None]:
        """The micro-step of each of this rank's completions, int64 [N], and the tokens beyond `max_tokens_per_step`."""
        step_P = self.step_of_position(torch.arange(self.num_prompts) * self.ranks.world + self.ranks.rank)
        micro_step_N = (step_P * self.accumulate).repeat_interleave(self.num_generations)
        groups: list[list[GroupShare]] = [[] for _ in range(self.optimizer_steps)]
        lengths, active = lengths_N.tolist(), active_N.tolist()
        for p, step in enumerate(step_P.tolist()):
            members = range(p * self.num_generations, (p + 1) * self.num_generations)
            if completions := tuple((n, lengths[n]) for n in members if active[n]):
                groups[step].append(GroupShare(len(prompt_tokens[p]), completions))
        over = 0
        for step, shares in enumerate(groups):
            micro_steps = balance(shares, self.accumulate, self.max_tokens_per_step)
            for k, micro_step in enumerate(micro_steps):
                micro_step_N[[n for share in micro_step for n, _ in share.completions]] = step * self.accumulate + k
            over += tokens_over(micro_steps, self.max_tokens_per_step) if self.max_tokens_per_step else 0
        return micro_step_N, None if self.max_tokens_per_step is None else over


def make_episode(index: int, rollout: Rollout, scored: TrainedScores, algorithm: Algorithm, plan: Plan) -> Episode:
    """Advantages over the prompts of all ranks, token weights over each optimizer step, and who trains when."""
    ranks, scores, turns = plan.ranks, scored.scores, scored.turns
    shape_PG = (plan.num_prompts, plan.num_generations)
    lengths_PG = ranks.by_position(rollout.sampled_lengths_N.reshape(shape_PG))
    scores_PGF = ranks.by_position(scores.values_NF.reshape(*shape_PG, -1))
    truncated = torch.tensor([reason == FinishReason.LENGTH for reason in rollout.finish_reasons])
    truncated_PG = ranks.by_position(truncated.reshape(shape_PG))
    baseline_PF = None if scored.baseline_PF is None else ranks.by_position(scored.baseline_PF)

    weights_F = torch.tensor(scored.weights, dtype=torch.float64)
    advantages_PG = algorithm.advantages(scores_PGF, weights_F, lengths_PG, baseline_PF)
    advantages_PGK = advantages_PG[..., None]
    if turns is not None:
        advantages_PGK = turn_advantages(turns, algorithm, weights_F, lengths_PG, advantages_PG, ranks)
    trains_PG = advantages_PG.isfinite() & ~(truncated_PG & algorithm.mask_truncated)
    # One token at least: an engine may return an empty completion, and there is nothing in it to train.
    active_PG = trains_PG & (lengths_PG > 0)
    if not algorithm.trains_on_zero_advantage:
        active_PG = active_PG & (advantages_PGK != 0).any(-1)

    step_P = plan.step_of_position(torch.arange(plan.num_prompts * ranks.world))
    weights_PG, right_PG = torch.zeros_like(advantages_PG), None
    if algorithm.positive_coefficient > 0:
        right_PG = (ranks.by_position((scores.totals_N > 0).reshape(shape_PG)) & trains_PG).double()
    for step in range(plan.optimizer_steps):
        here = step_P == step
        groups = here.nonzero().expand(-1, plan.num_generations).flatten()
        weights = algorithm.token_weights(lengths_PG[here].flatten(), groups, trains_PG[here].flatten())
        weights_PG[here] = weights.reshape(-1, plan.num_generations)
        if right_PG is not None:
            of_right = algorithm.token_weights(lengths_PG[here].flatten(), groups, right_PG[here].flatten() > 0)
            right_PG[here] = (of_right / weights).nan_to_num(0.0).reshape(-1, plan.num_generations)

    mine = slice(ranks.rank, None, ranks.world)
    active_N = active_PG[mine].flatten()
    micro_step_N, tokens_over_budget = plan.micro_steps(rollout.prompt_tokens, rollout.lengths_N, active_N)
    if tokens_over_budget:
        # The same text each time; the metric has the numbers.
        remedy = "raise data.steps_per_episode and trainer.accumulate_grad_batches alike (work/over_budget_tokens)"
        tell_once(f"micro-steps have more than model.max_tokens_per_step={plan.max_tokens_per_step} tokens: {remedy}")
    return Episode(
        index=index,
        prompt_tokens=rollout.prompt_tokens,
        completion_tokens_T=rollout.completion_tokens_T,
        lengths_N=rollout.lengths_N,
        sampling_logprobs_T=rollout.logprobs_T,
        advantages_N=advantages_PG[mine].flatten().float(),
        weights_N=weights_PG[mine].flatten(),
        active_N=active_N,
        micro_step_N=micro_step_N,
        active_by_step=[int((lengths_PG * active_PG)[step_P == k].sum()) for k in range(plan.optimizer_steps)],
        tokens_over_budget=tokens_over_budget,
        sampled_T=None if bool(rollout.sampled_T.all()) else rollout.sampled_T,
        sampling_mask=None if (mask := rollout.sampling_mask) is None else (mask.ids_K, mask.counts_T),
        right_N=None if right_PG is None else right_PG[mine].flatten(),
        advantages_T=None if turns is None else turns.of_tokens(advantages_PGK[mine], rollout.sampled_T),
    )


# Even work per micro-step ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupShare:
    """A prompt of `prompt_tokens` and some of its completions, as (number, tokens)."""

    prompt_tokens: int
    completions: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + sum(tokens for _, tokens in self.completions)

    def halves(self) -> "tuple[GroupShare, GroupShare]":
        """The same completions in two shares of about as many tokens each."""
        total, before, cut = sum(tokens for _, tokens in self.completions), 0, 0
        while cut < len(self.completions) - 1 and 2 * before < total:
            before += self.completions[cut][1]
            cut += 1
        first, second = self.completions[:cut], self.completions[cut:]
        return GroupShare(self.prompt_tokens, first), GroupShare(self.prompt_tokens, second)


def balance(groups: Sequence[GroupShare], micro_steps: int, max_tokens: int | None = None) -> list[list[GroupShare]]:
    """What each micro-step trains.

    No micro-step is above `max_tokens` where splitting groups can help; see `tokens_over` for what cannot be helped.
    """
    shares = list(groups)
    while True:
        steps = _fill(shares, micro_steps)
        fullest = max(steps, key=load)
        if len(shares) < micro_steps:
            candidates = shares
        elif max_tokens is not None and load(shares) <= micro_steps * max_tokens < micro_steps * load(fullest):
            candidates = fullest
        else:
            return steps
        if not (divisible := [share for share in candidates if len(share.completions) > 1]):
            return steps
        largest = max(divisible, key=lambda share: share.tokens)
        shares.remove(largest)
        shares += largest.halves()


def load(shares: Sequence[GroupShare]) -> int:
    """Tokens of a micro-step."""
    return sum(share.tokens for share in shares)


def tokens_over(steps: Sequence[Sequence[GroupShare]], max_tokens: int) -> int:
    """Tokens of all micro-steps beyond `max_tokens` each."""
    return sum(max(0, load(shares) - max_tokens) for shares in steps)


def _fill(shares: Sequence[GroupShare], micro_steps: int) -> list[list[GroupShare]]:
    """The largest first, each to the micro-step with the least work so far (Graham, 1969: at most 4/3 of the best)."""
    steps: list[list[GroupShare]] = [[] for _ in range(micro_steps)]
    loads = [0] * micro_steps
    for share in sorted(shares, key=lambda share: -share.tokens):
        k = loads.index(min(loads))
        steps[k].append(share)
        loads[k] += share.tokens
    return steps
