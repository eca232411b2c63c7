"""Held-out prompts are answered, scored and measured: what `validate`, `test` and the validations of `fit` do."""

from dataclasses import replace

from stateset_lightning.evaluation import Evaluation
from stateset_lightning.policy import Policy
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import Scorer
from stateset_lightning.training.collect import Sampler, check_failures
from stateset_lightning.training.resample import Sample
from stateset_lightning.types import PromptBatch, Scores


class HeldOut:
    """A split, evaluated batch by batch.

    Args:
        metrics: What is measured.
    """

    def __init__(self, metrics: Evaluation) -> None:
        self.metrics = metrics
        self._scores: list[Scores] = []  # of the split so far

    def answer(self, sampler: Sampler, policy: Policy, batch: PromptBatch) -> Sample:
        """A greedy completion per prompt and, where the evaluation asks for them, samples; all enter the metrics."""
        greedy = sampler.sample(policy, batch, 1, greedy=True)
        samples = None
        if count := self.metrics.config.samples:
            drawn = replace(sampler, config=self.metrics.config.sampling(sampler.config)).sample(policy, batch, count)
            samples = (drawn.rollout, drawn.scores)
            self._scores.append(drawn.scores)
        if sampler.scorer.scores_alone:
            self._scores.append(greedy.scores)
        self.metrics.update(batch.scenarios, (greedy.rollout, greedy.scores), samples, [*map(len, greedy.turns)])
        return greedy

    def compute(self, scorer: Scorer, ranks: Ranks) -> dict[str, float]:
        """Every metric of the split by name, over all ranks; another split may follow.

        Raises:
            RewardError: If too many rewards failed: a mean over what little is left would choose the best checkpoint.
        """
        scores, self._scores = self._scores, []
        if scores:
            check_failures(scores, scorer.max_failures, ranks)
        return self.metrics.compute(ranks)
