"""All that an evaluation measures of its completions: rewards of the greedy ones, and what several samples of a prompt
show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stateset_lightning.evaluation.config import EvaluationConfig
from stateset_lightning.evaluation.estimators import majority, pass_at_k, pass_hat_k
from stateset_lightning.evaluation.means import PromptMeans, RewardMeans
from stateset_lightning.types import NOT_APPLICABLE, Rollout, Scenario, Scores

TOLERANCE = 1e-9
"""Weighted sums such as 0.6 + 0.3 + 0.1 fall short of 1 by rounding."""


class Evaluation(nn.Module):
    """The metrics of a split.

    Of the greedy completions: those of `RewardMeans`, `reward_ci95`, `solved` with its interval. Of n samples per
    prompt, failed ones left out: `pass@k` and `pass^k` over prompts with k samples or more, `avg@n` (mean total
    reward), `majority@n`, `sample_failures` (share without a score).

    Args:
        rewards: Names of the rewards.
        config: What is sampled, and what counts as solved.
    """

    def __init__(self, rewards: Sequence[str], config: EvaluationConfig) -> None:
        super().__init__()
        self.config = config
        self.names = tuple(rewards)
        n = config.samples
        sampled = [f"pass@{k}" for k in config.ks] + [f"pass^{k}" for k in config.ks[1:]]
        sampled += [f"avg@{n}", f"majority@{n}", "sample_failures"] if n else []
        means = [f"avg@{n}"] if n else []
        self.rewards = RewardMeans(rewards)
        self.prompts = PromptMeans(
            ["reward", "solved", *sampled],
            intervals=["reward", *means],
            shares=["solved"],
            by_topic=["reward", "solved", *means],
        )

    def logged_names(self) -> list[str]:
        """Names of all that `compute` may give."""
        return list(dict.fromkeys([*RewardMeans.logged_names(self.names), *self.prompts.logged_names()]))

    def update(
        self,
        scenarios: Sequence[Scenario],
        greedy: tuple[Rollout, Scores],
        samples: tuple[Rollout, Scores] | None = None,
    ) -> None:
        """Adds P prompts: a greedy completion of each, and `config.samples` sampled ones if there are any."""
        rollout, scores = greedy
        device = self.rewards.device
        self.rewards.update(scores.values_NF.to(device), scores.totals_N.to(device), rollout.lengths_N.to(device))
        values_PM = torch.stack([scores.totals_N.double(), self._solved(scores)], dim=1)
        if samples is not None:
            values_PM = torch.cat([values_PM, self._sampled(*samples)], dim=1)
        self.prompts.update(values_PM, [scenario.topic for scenario in scenarios])

    def compute(self) -> dict[str, float]:
        """Every metric by name, over all ranks."""
        return {**self.prompts.compute(), **self.rewards.compute()}

    def reset(self) -> None:
        self.rewards.reset()
        self.prompts.reset()

    def _solved(self, scores: Scores) -> Tensor:
        """1 or 0 for each completion, float64 [N]; NaN where a reward failed or does not apply."""
        score_N = scores.totals_N
        if self.config.solved_by is not None:
            score_N = scores.values_NF[:, scores.names.index(self.config.solved_by)]
            score_N = score_N.where(score_N != NOT_APPLICABLE, torch.nan)
        solved_N = (score_N >= self.config.solved_at - TOLERANCE).double()
        return solved_N.where(score_N.isfinite(), torch.nan)

    def _sampled(self, rollout: Rollout, scores: Scores) -> Tensor:
        """The measures of the samples, float64 [P, M], in the order of their names."""
        n, ks = self.config.samples, self.config.ks
        solved_PG, totals_PG = self._solved(scores).reshape(-1, n), scores.totals_N.reshape(-1, n)
        rows = []
        for p, (solved_G, totals_G) in enumerate(zip(solved_PG, totals_PG, strict=True)):
            known = solved_G.isfinite().tolist()
            drawn, right = sum(known), int(solved_G.nansum())
            answers = [
                self.config.answer(text)
                for text, ok in zip(rollout.texts[p * n : (p + 1) * n], known, strict=True)
                if ok
            ]
            votes = (
                majority(answers, [bool(value) for value in solved_G.tolist() if value == value]) if drawn else math.nan
            )
            row = [pass_at_k(drawn, right, k) for k in ks] + [pass_hat_k(drawn, right, k) for k in ks[1:]]
            rows.append([*row, float(totals_G.nanmean()), votes, float(totals_G.isnan().double().mean())])
        return torch.tensor(rows, dtype=torch.float64)
