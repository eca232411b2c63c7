"""Prompts -> an episode: completions, scores and fixed log-probs; what happens once per episode, before anything is
trained.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.errors import RewardError
from stateset_lightning.policy import AdapterReference, Policy
from stateset_lightning.policy.precision import sampling_dtype
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import Scorer
from stateset_lightning.rollout import InProcessEngine, RemoteEngine, RolloutConfig, RolloutEngine
from stateset_lightning.seeding import sample_seeds
from stateset_lightning.training.episode import Episode, Plan, make_episode
from stateset_lightning.training.loss import add_fixed_logprobs, all_logprobs, with_kl_scores
from stateset_lightning.training.metrics import episode_metrics, peak_memory_mb
from stateset_lightning.training.resample import Replacements, Sample, resample
from stateset_lightning.training.sampling_ahead import SamplingAhead
from stateset_lightning.types import Metrics, PromptBatch, Rollout, Scores, conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Report = Callable[[int, Sequence[int], Tensor], None]
"""(episode, rows, totals_PG) of all ranks' groups; see `ScenarioDataModule.report_rewards`."""


def prepared(
    engine: RolloutEngine | None, tokenizer: PreTrainedTokenizerBase, sampling: RolloutConfig, precision: str
) -> RolloutEngine:
    """The engine, ready for a run of this Trainer precision; by default the one in this process."""
    engine = InProcessEngine(tokenizer) if engine is None else engine
    if isinstance(engine, InProcessEngine):
        engine.dtype = sampling_dtype(precision)
    elif isinstance(engine, RemoteEngine):
        engine.setup(tokenizer, sampling)
    return engine


@dataclass(frozen=True)
class Sampler:
    """An engine and a scorer that work at the same time: a completion is scored while others are decoded."""

    engine: RolloutEngine
    scorer: Scorer
    config: RolloutConfig
    seed: int
    system_prompt: str | None = None
    ahead: SamplingAhead[tuple[Rollout, Scores]] | None = None

    def sample(
        self, policy: Policy, batch: PromptBatch, num_generations: int, *, greedy: bool
    ) -> tuple[Rollout, Scores]:
        """Completions of all prompts and their scores. Noise follows from the seed, the split, the episode and the
        positions.
        """
        if self.ahead is not None:
            self.ahead.wait()
        self.engine.sync(policy)
        return self._draw(policy, batch, num_generations, greedy)

    def start_ahead(self, policy: Policy, batch: PromptBatch) -> None:
        """Begins to sample and score a later episode's prompts from the policy as it is now."""
        assert self.ahead is not None
        self.engine.sync(policy)
        self.ahead.start(batch.episode_index, partial(self._draw, policy, batch, self.config.num_generations, False))

    def _draw(self, policy: Policy, batch: PromptBatch, num_generations: int, greedy: bool) -> tuple[Rollout, Scores]:
        seeds_N = sample_seeds(self.seed, batch.split, batch.episode_index, batch.positions, num_generations)
        with self.scorer.start(len(seeds_N), policy.device) as session:

            def score(n: int, text: str, num_tokens: int) -> None:
                scenario = batch.scenarios[n // num_generations]
                session.submit(
                    n,
                    conversation(scenario, text, self.system_prompt),
                    scenario.columns(),
                    completion_tokens=num_tokens,
                )

            rollout = self.engine.generate(
                batch.prompt_tokens, num_generations, self.config, seeds_N, greedy=greedy, on_finished=score
            )
            return rollout, session.collect()


@dataclass(frozen=True)
class Collected:
    """An episode, and what it was made of: the sample that it trains on, and what is said of it."""

    episode: Episode
    sample: Sample
    metrics: Metrics


@dataclass(frozen=True)
class Collector:
    """Makes an episode of a prompt batch.

    Args:
        sampler: Samples and scores.
        algorithm: Says what an episode needs, and turns scores into advantages.
        policy: What is sampled and trained.
        reference: The reference policy, if the algorithm has one.
        ranks: All of them collect at the same time.
        accumulate: Micro-steps of an optimizer step.
        max_tokens_per_step: Tokens of a micro-step at most, where that can be.
        replacements: Where dynamic sampling gets prompts from.
        report: Told what every group scored; None where nobody asks.
        upcoming: Says what the next episode's prompts are, if there is one; asked where the sampler samples ahead.
    """

    sampler: Sampler
    algorithm: Algorithm
    policy: Policy
    reference: Policy | AdapterReference | None
    ranks: Ranks
    accumulate: int
    max_tokens_per_step: int | None = None
    replacements: Replacements | None = None
    report: Report | None = None
    upcoming: Callable[[], PromptBatch | None] = lambda: None

    def collect(self, batch: PromptBatch) -> Collected:
        """Samples, scores and plans an episode, and computes all that stays fixed while it is trained on.

        Raises:
            RewardError: When too many rewards fail, on every rank.
        """
        start = time.perf_counter()
        ahead = None if self.sampler.ahead is None else self.sampler.ahead.take(batch.episode_index)
        sample = first = self._sample(batch) if ahead is None else Sample(batch, *ahead[0])
        drawn: list[Sample] = []
        if rounds := self.sampler.config.dynamic_sampling:
            assert self.replacements is not None, "checked before the run"
            sample, drawn = resample(self._sample, self.replacements, first, rounds)
        baseline = self._sample(sample.batch, greedy=True) if self.algorithm.needs_greedy_baseline else None
        seconds = time.perf_counter() - start
        # From here on every rank makes the same calls: until now they may have sampled different numbers of rounds.
        check_failures(self.sampler.scorer, [first.scores, *(other.scores for other in drawn)], self.ranks)
        if baseline is not None:
            check_failures(self.sampler.scorer, [baseline.scores], self.ranks)
        self._report([first, *drawn])
        costs = self.sampler.scorer.take_counts()  # before the next episode's are counted
        if self.sampler.ahead is not None and (following := self.upcoming()) is not None:
            self.sampler.start_ahead(self.policy, following)

        episode, kl_metrics = self._episode(sample, baseline)
        everything = [first, *drawn, *([] if baseline is None else [baseline])]
        scored = episode_metrics(
            sample.rollout,
            sample.scores,
            episode.advantages_N,
            self.ranks.world,
            sampled=[other.scores for other in everything],
        )
        metrics = {**scored, **kl_metrics, **work_metrics(sample, episode, self.policy)}
        metrics |= self._sampling_metrics(everything, seconds, ahead[1] if ahead else 0.0)
        metrics |= self._budget_metrics(episode)
        metrics |= {name: (count, 1 / self.ranks.world) for name, count in costs.items()}
        if rounds:
            extra = sum(len(other.batch) for other in drawn)
            metrics["groups/resampled"] = (len(drawn[0].batch) if drawn else 0, len(batch))
            metrics["work/extra_prompts"] = (extra, 1 / self.ranks.world)
        if baseline is not None:
            totals = baseline.scores.totals_N[baseline.scores.totals_N.isfinite()]
            metrics["train/baseline_reward"] = (totals.sum(), len(totals))
        return Collected(episode, sample, metrics)

    def _sample(self, batch: PromptBatch, greedy: bool = False) -> Sample:
        num_generations = 1 if greedy else self.sampler.config.num_generations
        return Sample(batch, *self.sampler.sample(self.policy, batch, num_generations, greedy=greedy))

    def _report(self, samples: Sequence[Sample]) -> None:
        """All groups that were sampled, replaced ones too, of all ranks in order of position, which is unique."""
        if self.report is None:
            return
        mine = [
            group for s in samples for group in zip(s.batch.positions, s.batch.rows or [], s.totals_PG, strict=True)
        ]
        groups = sorted((group for of_rank in self.ranks.gather(mine) for group in of_rank), key=lambda group: group[0])
        self.report(
            samples[0].batch.episode_index,
            [row for _, row, _ in groups],
            torch.stack([totals_G for _, _, totals_G in groups]),
        )

    def _episode(self, sample: Sample, baseline: Sample | None) -> tuple[Episode, Metrics]:
        batch, config, algorithm = sample.batch, self.sampler.config, self.algorithm
        plan = Plan(
            len(batch),
            config.num_generations,
            batch.steps_per_episode,
            self.accumulate,
            self.ranks,
            self.max_tokens_per_step,
        )
        # A held-out reward, of weight 0, is shown and never trained on: where it fails, 0 x NaN would fail the
        # completion.
        trained = [f for f, reward in enumerate(self.sampler.scorer.rewards) if reward.weight]
        weights = [self.sampler.scorer.rewards[f].weight for f in trained]
        scores, logprobs_T, ref_logprobs_T = with_rewards(sample.scores, trained), None, None
        metrics: Metrics = {}
        if algorithm.kl_in_reward:
            assert self.reference is not None
            # Both from the same kind of pass: a sampler of lower precision would add noise, of which a constant group
            # makes advantages.
            logprobs_T, ref_logprobs_T = (
                all_logprobs(p, sample.rollout, config.temperature) for p in (self.policy, self.reference)
            )
            scores = with_kl_scores(scores, sample.rollout, algorithm, logprobs_T, ref_logprobs_T)
            weights.append(-algorithm.kl_coefficient)
            kl_N = scores.values_NF[:, -1]
            metrics["policy/kl_reward"] = (kl_N[kl_N.isfinite()].sum(), int(kl_N.isfinite().sum()))
        # the rewards alone, without the KL
        baseline_PF = None if baseline is None else baseline.scores.values_NF[:, trained]
        episode = make_episode(batch.episode_index, sample.rollout, scores, weights, algorithm, plan, baseline_PF)
        several_steps = batch.num_micro_steps > self.accumulate
        episode.ref_logprobs_T = ref_logprobs_T
        episode.old_logprobs_T = logprobs_T if several_steps else None
        add_fixed_logprobs(
            episode,
            self.policy,
            self.reference,
            algorithm,
            plan,
            config.temperature,
            self.sampler.seed,
            old=several_steps,
        )
        return episode, metrics

    def _budget_metrics(self, episode: Episode) -> Metrics:
        if self.max_tokens_per_step is None:
            return {}
        if episode.tokens_over_budget:
            # The same text each time, so that Python shows it once; the metric has the numbers.
            warnings.warn(
                f"an episode has micro-steps of more than model.max_tokens_per_step={self.max_tokens_per_step} tokens,"
                " whatever is moved between them (metric work/over_budget_tokens): raise data.steps_per_episode and"
                " trainer.accumulate_grad_batches alike",
                stacklevel=2,
            )
        return {"work/over_budget_tokens": (episode.tokens_over_budget, 1 / self.ranks.world)}

    def _sampling_metrics(self, samples: Sequence[Sample], seconds: float, seconds_ahead: float) -> Metrics:
        """`seconds` are those that training waited; sampling ahead went on beside it."""
        tokens = sum(int(sample.rollout.lengths_N.sum()) for sample in samples)
        engine = self.sampler.engine
        metrics = engine.pop_metrics() if isinstance(engine, RemoteEngine) else {}
        if self.sampler.ahead is not None:
            metrics["work/sampled_ahead"] = (float(seconds_ahead > 0), 1)
        return metrics | {
            "time/sample_s": (seconds, 1),
            "time/score_s": (sum(sample.scores.seconds for sample in samples), 1),
            "work/tokens_per_s": (tokens / max(seconds, seconds_ahead), 1 / self.ranks.world),  # ranks add up
        }


def check_failures(scorer: Scorer, scores: Sequence[Scores], ranks: Ranks) -> None:
    """Stops the run when the rewards of all ranks together failed too often; every rank comes to the same end.

    Raises:
        RewardError: With the last traceback, on the ranks that have one.
    """
    totals_N = torch.cat([some.totals_N for some in scores])
    counts = ranks.gather((int(totals_N.isnan().sum()), totals_N.numel()))
    failed, total = (sum(numbers) for numbers in zip(*counts, strict=True))
    if failed > scorer.max_failures * total:
        for some in scores:
            scorer.check_failures(some)
        raise RewardError(f"{failed} of {total} completions of all ranks have no score; see the other ranks' messages")


def with_rewards(scores: Scores, columns: Sequence[int]) -> Scores:
    """The scores of some of the rewards alone."""
    return replace(scores, names=tuple(scores.names[f] for f in columns), values_NF=scores.values_NF[:, list(columns)])


def work_metrics(sample: Sample, episode: Episode, policy: Policy) -> Metrics:
    """How much of an episode's training is spared, and the memory so far.

    `work/token_ratio` is the number of tokens of a padded training pass over that of the pass that is made, for the
    same completions.
    """
    groups = episode.active_part().groups
    packed = sum(len(group.prompt) + group.num_completion_tokens for group in groups)
    longest = max((len(group.prompt) for group in groups), default=0) + max(
        (len(c) for g in groups for c in g.completions), default=0
    )
    padded = sum(len(group.completions) for group in groups) * longest
    count = len(sample.rollout.texts)
    return {
        "work/token_ratio": (padded, packed if policy.uses_packed_scoring else padded),
        "work/skipped": (count - int(episode.active_N.sum()), count),
        "memory/peak_mb": (peak_memory_mb(policy.device), 1),
    }
