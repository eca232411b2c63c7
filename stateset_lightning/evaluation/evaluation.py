"""All that an evaluation measures: the greedy completions' rewards, and what several samples of a prompt show."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stateset_lightning.evaluation.config import EvaluationConfig
from stateset_lightning.evaluation.estimators import majority, pass_at_k, pass_hat_k
from stateset_lightning.evaluation.means import PromptMeans
from stateset_lightning.types import NOT_APPLICABLE, Rollout, Scenario, Scores

# Weighted sums such as 0.6 + 0.3 + 0.1 fall short of 1 by rounding.
TOLERANCE = 1e-9


class Evaluation(PromptMeans):
    """The metrics of a split, exact over batches and ranks of any size.

    Of the greedy completions, one per prompt: `reward` (mean total of those without a failure) with `reward_ci95`,
    `reward/<name>` (mean over those that this reward scored), `reward_failures` (share that failed), `solved` with its
    interval, `mean_tokens` and `num_completions`. Of n samples per prompt, without those that failed: `pass@k` and
    `pass^k` over prompts with k samples or more, `avg@n` (mean total reward), `majority@n`; and `sample_failures`
    (share that failed).

    Args:
        rewards: Names of the rewards.
        config: What is sampled, and what counts as solved.
    """

    def __init__(self, rewards: Sequence[str], config: EvaluationConfig, **kwargs: Any) -> None:
        n = config.samples
        names = ["reward", *(f"reward/{name}" for name in rewards), "reward_failures", "mean_tokens", "solved"]
        names += [f"pass@{k}" for k in config.ks] + [f"pass^{k}" for k in config.ks[1:]]
        names += [f"avg@{n}", f"majority@{n}", "sample_failures"] if n else []
        means = ["reward", f"avg@{n}"] if n else ["reward"]
        super().__init__(names, intervals=means, shares=["solved"], **kwargs)
        self.config = config

    def update(  # type: ignore[override]
        self,
        scenarios: Sequence[Scenario],
        greedy: tuple[Rollout, Scores],
        samples: tuple[Rollout, Scores] | None = None,
    ) -> None:
        """Adds P prompts: a greedy completion of each, and `config.samples` sampled ones if there are any."""
        rollout, scores = greedy
        measures = {f"reward/{name}": values_P for name, values_P in zip(scores.names, scores.values_NF.T, strict=True)}
        measures |= {"reward": scores.totals_N, "reward_failures": ~scores.totals_N.isfinite()}
        measures |= {"mean_tokens": rollout.sampled_lengths_N, "solved": self._solved(scores)}
        if samples is not None:
            measures |= self._sampled(*samples)
        values_PM = torch.stack([measures[name].cpu().double() for name in self.names], dim=1)
        super().update(values_PM, [scenario.topic for scenario in scenarios])

    def _solved(self, scores: Scores) -> Tensor:
        """1 or 0 for each completion, float64 [N]; NaN where a reward failed or does not apply."""
        score_N = scores.totals_N
        if self.config.solved_by is not None:
            score_N = scores.values_NF[:, scores.names.index(self.config.solved_by)]
            score_N = score_N.where(score_N != NOT_APPLICABLE, torch.nan)
        solved_N = (score_N >= self.config.solved_at - TOLERANCE).double()
        return solved_N.where(score_N.isfinite(), torch.nan)

    def _sampled(self, rollout: Rollout, scores: Scores) -> dict[str, Tensor]:
        """The measures of the samples by name, [P]."""
        n = self.config.samples
        totals_PG = scores.totals_N.reshape(-1, n)
        measures: dict[str, list[float]] = defaultdict(list)
        for p, solved_G in enumerate(self._solved(scores).reshape(-1, n).tolist()):
            texts = rollout.texts[p * n : (p + 1) * n]
            scored = [(text, bool(ok)) for text, ok in zip(texts, solved_G, strict=True) if not math.isnan(ok)]
            right = [ok for _, ok in scored]
            for k in self.config.ks:
                measures[f"pass@{k}"].append(pass_at_k(len(right), sum(right), k))
                measures[f"pass^{k}"].append(pass_hat_k(len(right), sum(right), k))
            answers = [self.config.answer(text) for text, _ in scored]
            measures[f"majority@{n}"].append(majority(answers, right) if scored else math.nan)
        return {
            **{name: torch.tensor(values_P, dtype=torch.float64) for name, values_P in measures.items()},
            f"avg@{n}": totals_PG.nanmean(1),
            "sample_failures": totals_PG.isnan().double().mean(1),
        }
