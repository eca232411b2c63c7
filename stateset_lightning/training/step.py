"""One step of GRPO, from prompts to updated weights, in the order in which it happens.

TrainingStep.loss             every batch (Lightning's `training_step`)
    start_episode             the first batch of an episode:
        1. sample             G completions of each prompt; each is scored while others are still decoded
        2. advantages         each completion's score compared with those of its group,
        3. token weights      what each of its tokens counts in its optimizer step,
        4. micro-batches      and which micro-step trains it
        5. fixed log-probs    of the policy that sampled, reference and teacher, before anything is updated
    6. policy loss            of one micro-batch, summed over its tokens
(Lightning)                   backward, accumulation over micro-steps
TrainingStep.check_gradient   7. a step with nothing to train, or a gradient that is not finite, is skipped
(Lightning)                   clipping, optimizer, learning rate schedule
TrainingStep.finish           8. weights are checked, metrics added up, coefficients adapted
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.policy import AdapterReference, Policy
from stateset_lightning.ranks import Ranks
from stateset_lightning.seeding import derive_seed
from stateset_lightning.training import checks, metrics
from stateset_lightning.training.collect import Collection, Sampler, collect_together
from stateset_lightning.training.episode import Episode, Plan, make_episode
from stateset_lightning.training.loss import add_fixed_logprobs, micro_batch_loss, nan_if_not_finite, trained_scores
from stateset_lightning.training.resample import Sample
from stateset_lightning.training.teacher import Teacher, with_comparison
from stateset_lightning.training.turns import turn_scores
from stateset_lightning.types import PromptBatch


class TrainingState:
    """What training remembers from one micro-step to the next, of this rank; a checkpoint holds what a run needs of it.

    `started` is None between two optimizer steps: a checkpoint made at any other time loses a gradient.
    """

    def __init__(self) -> None:
        self.metrics = metrics.RunMetrics()
        self.episode: Episode | None = None
        self.episode_of_ranks: list[dict[str, Any]] | None = None  # of every rank, while a checkpoint would need it
        self.collection: Collection | None = None  # what the episode was made of; None in a run resumed inside it
        self.step_of_pass = 0  # the optimizer step under way, of those of a pass over the episode
        self.samples_are_fresh = False  # whether the weights are still those that sampled
        self.episode_ends = False  # with this micro-step
        self.bad_steps = 0  # in a row: skipped, since their gradient was not finite
        self.started: float | None = None  # the optimizer step under way, by `time.perf_counter`
        self.collect_seconds = 0.0  # of it
        self.keep()

    def keep(self) -> None:
        """Remembers the end of an optimizer step, for `turn_back`."""
        self._kept = deepcopy(self.metrics.state_dict()), self.episode_of_ranks

    def turn_back(self) -> None:
        """As a checkpoint at the last optimizer step's end would have found it: the one under way is given up."""
        self.started, (metrics, self.episode_of_ranks) = None, self._kept
        self.metrics.load_state_dict(metrics)

    @property
    def sample_and_advantages(self) -> tuple[Sample, list[float] | None] | None:
        """What the episode was made of, and its advantages; None in a run that was resumed inside the episode."""
        if self.collection is None or self.episode is None:
            return None
        return self.collection.sample, self.episode.advantages_N.tolist()


@dataclass(frozen=True)
class TrainingStep:
    """The steps of a run, with all they need."""

    state: TrainingState  # goes from step to step
    policy: Policy  # what is trained
    sampled_policy: Policy  # samples and scores without gradient: the policy, or an unsharded copy of it
    unsharded: Callable[[], AbstractContextManager[None]]  # while `sampled_policy` is used
    reference: Policy | AdapterReference | None  # None where the algorithm needs none
    algorithm: Algorithm  # scores -> advantages, tokens -> loss
    sampler: Sampler  # prompts -> completions with their scores
    ranks: Ranks  # all of them take the same steps
    accumulate: int  # micro-steps of an optimizer step
    max_tokens_per_step: int | None  # of a micro-step, where that can be kept
    report: Callable[[int, list[int], Tensor], None] | None  # is told (episode, rows, total scores [P, G])
    upcoming: Callable[[], PromptBatch | None]  # the next episode's prompts, asked where the run samples ahead
    teacher: Teacher | None = None  # of an algorithm that distils

    def loss(self, batch: PromptBatch) -> Tensor:
        """Loss of one micro-step, summed over its tokens, times what DDP and Lightning divide it by.

        Raises:
            RewardError: When too many rewards fail, on every rank.
        """
        state = self.state
        state.started = state.started or time.perf_counter()
        if batch.micro_step == 0:
            with self.unsharded():
                self.start_episode(batch)
        episode = state.episode
        if episode is None or episode.index != batch.episode_index:
            raise RuntimeError(f"micro-step {batch.micro_step} came without the first of episode {batch.episode_index}")
        micro_step = batch.micro_step % batch.steps_per_episode
        state.step_of_pass = micro_step // self.accumulate
        state.samples_are_fresh = batch.micro_step < self.accumulate
        state.episode_ends = batch.micro_step == batch.num_micro_steps - 1
        if state.episode_ends:
            state.episode_of_ranks = None  # the next checkpoint comes after the episode's end

        seed = derive_seed(self.sampler.seed, "dropout", episode.index, batch.micro_step, self.ranks.rank)
        temperature = self.sampler.config.temperature
        trained, step_tokens = episode.micro_batch(micro_step), episode.active_by_step[state.step_of_pass]
        if self.teacher is not None:
            trained = with_comparison(trained, self.algorithm, self.teacher, temperature)
        loss, sums = micro_batch_loss(self.policy, self.algorithm, trained, temperature, seed, step_tokens)
        # DDP averages over ranks and Lightning divides by the accumulation: the sum over tokens is meant.
        factor = self.ranks.world * self.accumulate
        state.metrics.step.add(sums | {"policy/loss": (loss.detach(), 1 / factor)})
        return nan_if_not_finite(loss) * factor

    def start_episode(self, batch: PromptBatch) -> None:
        """Samples and scores the prompts, and computes what stays fixed while the episode is trained on."""
        start, policy, algorithm = time.perf_counter(), self.sampled_policy, self.algorithm
        collection = collect_together(self.sampler, policy, batch, algorithm, self.ranks)
        if self.report is not None:
            self.report(batch.episode_index, *collection.groups_of_all_ranks(self.ranks))
        self.sampler.start_next(policy, batch.episode_index, self.upcoming)

        scored, rollout = trained_scores(self, collection), collection.sample.rollout
        if self.sampler.player is not None and self.sampler.player.config.turn_rewards == "discounted":
            turns = turn_scores(scored.scores, collection.sample.turns, self.sampler.scorer.rewards, self.ranks)
            scored = replace(scored, turns=turns)
        shape = len(batch), rollout.num_generations, batch.steps_per_episode
        plan = Plan(*shape, self.accumulate, self.ranks, self.max_tokens_per_step)
        episode = make_episode(batch.episode_index, rollout, scored, algorithm, plan)
        several = batch.num_micro_steps > self.accumulate
        add_fixed_logprobs(self, episode, scored, plan, old=several and not algorithm.trains_on_targets)

        sums = metrics.of_episode(collection, episode, scored.scores, policy, self.ranks)
        state = self.state
        state.metrics.add_episode(sums, rollout, batch.episode_index, self.ranks)
        state.episode, state.collection = episode, collection
        # Gathered now and not when a checkpoint is written, which would hang if one rank had failed by then.
        state.episode_of_ranks = self.ranks.gather(episode.state_dict()) if batch.num_micro_steps > 1 else None
        state.collect_seconds = time.perf_counter() - start

    def check_gradient(self, optimizer: torch.optim.Optimizer) -> float | None:
        """Skips an optimizer step that has nothing to train, or whose gradient is not finite (a bad step).

        Returns:
            The norm of a bad step's gradient; None for any other step.
        """
        state = self.state
        assert state.episode is not None
        norm = checks.total_norm([p.grad for p in self.policy.parameters() if p.grad is not None])
        empty = state.episode.active_by_step[state.step_of_pass] == 0
        bad = not empty and checks.is_bad(norm)
        if empty or bad:  # the same on every rank: gradients are reduced by now
            optimizer.zero_grad(set_to_none=True)  # None rather than zero, on which AdamW would still move the weights
        if not empty:
            state.bad_steps = state.bad_steps + 1 if bad else 0
        state.metrics.step.add(metrics.of_gradient(norm, empty=empty, bad=bad))
        return norm if bad else None

    def finish(self, optimizer: torch.optim.Optimizer, lr: float, step: int) -> dict[str, float]:
        """The metrics of the optimizer step `step`, just made with `lr`; its episode's, too, if they are new.

        Raises:
            NonFiniteError: If the weights are not finite any more.
        """
        state = self.state
        checks.check_weights(self.policy.parameters(), step)
        optimizer.zero_grad(set_to_none=True)  # gradients would lie beside the cache while the next episode is sampled
        seconds = time.perf_counter() - (state.started or 0.0)
        state.metrics.step.add(metrics.of_step(lr, seconds, state.collect_seconds, self.algorithm.state_dict()))
        state.started, state.collect_seconds = None, 0.0
        row = state.metrics.end_step(self.ranks)
        if state.samples_are_fresh:
            self.sampler.check_difference(row, self.policy)
        if not row["policy/empty_steps"] and not row["policy/bad_steps"]:
            self.algorithm.adapt(row)  # the same means on every rank
        return row
