"""Which micro-step trains which completion: even work inside an optimizer step, whole groups where possible.

Work is counted in tokens of a packed forward: a prompt once, its completions behind it. Taking a group apart computes
its prompt again, so it is done only where there are fewer groups than micro-steps, or where a budget would be exceeded.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.policy import Group
from stateset_lightning.ranks import Ranks
from stateset_lightning.types import FinishReason, Rollout, Scores


@dataclass(frozen=True)
class Piece:
    """A prompt of `prompt_tokens` and some of its completions, as (number, tokens)."""

    prompt_tokens: int
    completions: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + sum(tokens for _, tokens in self.completions)

    def halves(self) -> tuple[Piece, Piece]:
        """The same completions in two pieces of about as many tokens each."""
        total, before, cut = sum(tokens for _, tokens in self.completions), 0, 0
        while cut < len(self.completions) - 1 and 2 * before < total:
            before += self.completions[cut][1]
            cut += 1
        return Piece(self.prompt_tokens, self.completions[:cut]), Piece(self.prompt_tokens, self.completions[cut:])


def share_out(groups: Sequence[Piece], micro_steps: int, max_tokens: int | None = None) -> list[list[Piece]]:
    """The pieces of each micro-step.

    No micro-step is above `max_tokens` where taking groups apart can help; see `tokens_over` for what cannot be helped.
    """
    pieces = list(groups)
    while True:
        steps = _balance(pieces, micro_steps)
        if len(pieces) < micro_steps:
            candidates = pieces
        elif max_tokens is not None and load(pieces) <= micro_steps * max_tokens < micro_steps * load(
            fullest := max(steps, key=load)
        ):
            candidates = fullest
        else:
            return steps
        divisible = [piece for piece in candidates if len(piece.completions) > 1]
        if not divisible:
            return steps
        largest = max(divisible, key=lambda piece: piece.tokens)
        pieces.remove(largest)
        pieces += largest.halves()


def load(pieces: Sequence[Piece]) -> int:
    """Tokens of a micro-step."""
    return sum(piece.tokens for piece in pieces)


def tokens_over(steps: Sequence[Sequence[Piece]], max_tokens: int) -> int:
    """Tokens of all micro-steps beyond `max_tokens` each."""
    return sum(max(0, load(pieces) - max_tokens) for pieces in steps)


def _balance(pieces: Sequence[Piece], micro_steps: int) -> list[list[Piece]]:
    """The largest piece first, each to the micro-step with the least work so far (Graham, 1969: at most 4/3 of the
    best).
    """
    steps: list[list[Piece]] = [[] for _ in range(micro_steps)]
    loads = [(0, k) for k in range(micro_steps)]
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        tokens, k = heapq.heappop(loads)
        steps[k].append(piece)
        heapq.heappush(loads, (tokens + piece.tokens, k))
    return steps


# MERGED: An episode: one prompt batch sampled, scored and ready to be trained on, micro-step by micro-step.
#
# The plan of an episode is fixed when it is made. Optimizer step k of a pass trains a contiguous range of the episode's
# global prompt positions, the same in every pass; its micro-steps share out this rank's prompts of that range. Letters: P
# prompts and N = P * G completions of this rank, T completion tokens.
#


@dataclass(frozen=True)
class Part:
    """What one micro-step trains: groups of completions with their per-completion and per-token values."""

    groups: list[Group]
    advantages_N: Tensor
    weights_N: Tensor  # weight of each token of a completion
    lengths_N: Tensor
    sampling_logprobs_T: Tensor
    old_logprobs_T: Tensor | None
    ref_logprobs_T: Tensor | None
    select_T: Tensor | None


@dataclass
class Episode:
    """Tensors and lists only, so that a checkpoint can hold it. `active_N` marks the completions that need a policy
    forward.
    """

    index: int
    prompt_tokens: list[list[int]]
    completion_tokens_T: Tensor
    lengths_N: Tensor
    sampling_logprobs_T: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    active_N: Tensor
    micro_step_N: Tensor  # which micro-step of a pass trains a completion
    active_by_step: list[int]  # completions of all ranks to train, by optimizer step of a pass
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    select_T: Tensor | None = None  # what the algorithm's selection keeps
    tokens_over_budget: int = 0  # of this rank's micro-steps of a pass

    @property
    def num_generations(self) -> int:
        return len(self.lengths_N) // len(self.prompt_tokens)

    def part(self, micro_step: int) -> Part:
        """The completions of a micro-step of a pass that need training; none, perhaps."""
        return self._select((self.micro_step_N == micro_step) & self.active_N)

    def active_part(self) -> Part:
        """All completions that need training: what old and reference log-probs are computed for."""
        return self._select(self.active_N)

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the active completions' tokens -> [T], zero for the others."""
        all_T = torch.zeros(len(self.completion_tokens_T), dtype=values.dtype)
        all_T[self._tokens_of(self.active_N)] = values.cpu()
        return all_T

    def state_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Episode:
        return cls(**state)

    def _tokens_of(self, rows_N: Tensor) -> Tensor:
        return rows_N.repeat_interleave(self.lengths_N)

    def _select(self, rows_N: Tensor) -> Part:
        completions = self.completion_tokens_T.split(self.lengths_N.tolist())
        by_prompt: dict[int, list[list[int]]] = {}
        for n in rows_N.nonzero().flatten().tolist():
            by_prompt.setdefault(n // self.num_generations, []).append(completions[n].tolist())
        tokens_T = self._tokens_of(rows_N)
        return Part(
            groups=[Group(self.prompt_tokens[p], group) for p, group in by_prompt.items()],
            advantages_N=self.advantages_N[rows_N],
            weights_N=self.weights_N[rows_N],
            lengths_N=self.lengths_N[rows_N],
            sampling_logprobs_T=self.sampling_logprobs_T[tokens_T],
            old_logprobs_T=None if self.old_logprobs_T is None else self.old_logprobs_T[tokens_T],
            ref_logprobs_T=None if self.ref_logprobs_T is None else self.ref_logprobs_T[tokens_T],
            select_T=None if self.select_T is None else self.select_T[tokens_T],
        )


@dataclass(frozen=True)
class Plan:
    """How an episode is cut: `steps_per_episode` micro-steps per pass, `accumulate` of them to an optimizer step.

    Completions that need no training take no part in the balance; `max_tokens_per_step` is what a micro-step holds at
    most.
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

    def step_of_position(self, positions: np.ndarray) -> np.ndarray:
        """The optimizer step of a pass that trains a global prompt position."""
        return positions * self.optimizer_steps // (self.num_prompts * self.ranks.world)

    def micro_steps(
        self, prompt_tokens: Sequence[Sequence[int]], lengths_N: Tensor, active_N: Tensor
    ) -> tuple[Tensor, int]:
        """The micro-step of each of this rank's completions, int64 [N], and the tokens beyond `max_tokens_per_step`."""
        step_P = self.step_of_position(np.arange(self.num_prompts) * self.ranks.world + self.ranks.rank)
        micro_step_N = torch.from_numpy(step_P * self.accumulate).repeat_interleave(self.num_generations)
        groups: list[list[Piece]] = [[] for _ in range(self.optimizer_steps)]
        lengths, active = lengths_N.tolist(), active_N.tolist()
        for p, step in enumerate(step_P.tolist()):
            members = range(p * self.num_generations, (p + 1) * self.num_generations)
            completions = tuple((n, lengths[n]) for n in members if active[n])
            if completions:
                groups[step].append(Piece(len(prompt_tokens[p]), completions))
        over = 0
        for step, pieces in enumerate(groups):
            shares = share_out(pieces, self.accumulate, self.max_tokens_per_step)
            for k, share in enumerate(shares):
                micro_step_N[[n for piece in share for n, _ in piece.completions]] = step * self.accumulate + k
            over += tokens_over(shares, self.max_tokens_per_step) if self.max_tokens_per_step else 0
        return micro_step_N, over


def make_episode(
    index: int,
    rollout: Rollout,
    scores: Scores,
    reward_weights: Sequence[float],
    algorithm: Algorithm,
    plan: Plan,
    baseline_PF: Tensor | None = None,
) -> Episode:
    """Advantages over the prompts of all ranks, token weights over each optimizer step, and who trains when.

    `baseline_PF` holds the scores of a greedy completion per prompt of this rank, for algorithms that need them.
    """
    ranks = plan.ranks
    shape_PG = (plan.num_prompts, plan.num_generations)
    lengths_PG = ranks.by_position(rollout.lengths_N.reshape(shape_PG))
    scores_PGF = ranks.by_position(scores.values_NF.reshape(*shape_PG, -1))
    truncated = torch.tensor([reason == FinishReason.LENGTH for reason in rollout.finish_reasons])
    truncated_PG = ranks.by_position(truncated.reshape(shape_PG))

    baseline_PF = None if baseline_PF is None else ranks.by_position(baseline_PF)
    advantages_PG = algorithm.advantages(
        scores_PGF, torch.tensor(reward_weights, dtype=torch.float64), lengths_PG, baseline_PF
    )
    trains_PG = advantages_PG.isfinite()
    if algorithm.mask_truncated:
        trains_PG = trains_PG & ~truncated_PG
    # One token at least: an engine may return an empty completion, and there is nothing in it to train.
    active_PG = trains_PG & (lengths_PG > 0)
    if not algorithm.trains_on_zero_advantage:
        active_PG = active_PG & (advantages_PG != 0)

    step_P = torch.from_numpy(plan.step_of_position(np.arange(plan.num_prompts * ranks.world)))
    weights_PG = torch.zeros_like(advantages_PG)
    for step in range(plan.optimizer_steps):
        here = step_P == step
        groups = here.nonzero().expand(-1, plan.num_generations).flatten()
        weights = algorithm.token_weights(lengths_PG[here].flatten(), groups, trains_PG[here].flatten())
        weights_PG[here] = weights.reshape(-1, plan.num_generations)

    mine = slice(ranks.rank, None, ranks.world)
    active_N = active_PG[mine].flatten()
    micro_step_N, tokens_over_budget = plan.micro_steps(rollout.prompt_tokens, rollout.lengths_N, active_N)
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
        active_by_step=[int(active_PG[step_P == step].sum()) for step in range(plan.optimizer_steps)],
        tokens_over_budget=tokens_over_budget,
    )
