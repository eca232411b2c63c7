"""Prompts -> completions, scores and fixed log-probs: what happens once per episode, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stateset_lightning.episode import Episode
from stateset_lightning.errors import RewardError
from stateset_lightning.metrics import peak_memory_mb
from stateset_lightning.policy import Policy
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import Scorer
from stateset_lightning.rollout import RolloutConfig, RolloutEngine
from stateset_lightning.seeding import sample_seeds
from stateset_lightning.types import Metrics, PromptBatch, Rollout, Scores, conversation


@dataclass(frozen=True)
class Sampler:
    """An engine and a scorer that work at the same time: a completion is scored while others are decoded."""

    engine: RolloutEngine
    scorer: Scorer
    config: RolloutConfig
    seed: int
    system_prompt: str | None = None

    def sample(self, policy: Policy, batch: PromptBatch, num_generations: int, *, greedy: bool) -> tuple[Rollout, Scores]:
        """Completions of all prompts and their scores. Noise follows from the seed, the split, the episode and the positions."""
        self.engine.sync(policy)
        seeds_N = sample_seeds(self.seed, batch.split, batch.episode_index, batch.positions, num_generations)
        with self.scorer.start(len(seeds_N)) as session:

            def score(n: int, text: str, num_tokens: int) -> None:
                scenario = batch.scenarios[n // num_generations]
                session.submit(n, conversation(scenario, text, self.system_prompt), scenario.columns(), completion_tokens=num_tokens)

            rollout = self.engine.generate(batch.prompt_tokens, num_generations, self.config, seeds_N, greedy=greedy, on_finished=score)
            return rollout, session.collect()


def check_failures(scorer: Scorer, scores: Scores, ranks: Ranks) -> None:
    """Stops the run when the rewards of all ranks together failed too often; every rank comes to the same end.

    Raises:
        RewardError: With the last traceback, on the ranks that have one.
    """
    counts = ranks.gather((int(scores.totals_N.isnan().sum()), scores.totals_N.numel()))
    failed, total = (sum(numbers) for numbers in zip(*counts, strict=True))
    if failed > scorer.max_failures * total:
        scorer.check_failures(scores)
        raise RewardError(f"{failed} of {total} completions of all ranks have no score; see the other ranks' messages")


def add_fixed_logprobs(episode: Episode, policy: Policy, references: Sequence[Policy], temperature: float, *, several_steps: bool) -> None:
    """Log-probs that stay the same for the whole episode: the reference's, and the old ones where they are not the new ones.

    With a single optimizer step the old log-probs are the new ones, so there is no pass to make.
    """
    groups = episode.active_part().groups
    if several_steps:
        episode.old_logprobs_T = episode.scatter(policy.score_without_gradient(groups, temperature)[0])
    for reference in references:
        episode.ref_logprobs_T = episode.scatter(reference.score_without_gradient(groups, temperature)[0])


def work_metrics(rollout: Rollout, scores: Scores, episode: Episode, policy: Policy, seconds: float, world: int) -> Metrics:
    """Seconds, tokens and memory of an episode's sampling, and how much of its training is spared.

    `work/token_ratio` is the number of tokens of a padded training pass over that of the pass that is made, for the same completions.
    """
    groups = episode.active_part().groups
    packed = sum(len(group.prompt) + group.num_completion_tokens for group in groups)
    longest = max((len(group.prompt) for group in groups), default=0) + max((len(c) for g in groups for c in g.completions), default=0)
    padded = sum(len(group.completions) for group in groups) * longest
    return {
        "time/sample_s": (seconds, 1),
        "time/score_s": (scores.seconds, 1),
        "work/tokens_per_s": (int(rollout.lengths_N.sum()) / seconds, 1 / world),  # ranks add up
        "work/token_ratio": (padded, packed if policy.uses_packed_scoring else padded),
        "work/skipped": (len(rollout.texts) - int(episode.active_N.sum()), len(rollout.texts)),
        "memory/peak_mb": (peak_memory_mb(policy.device), 1),
    }
