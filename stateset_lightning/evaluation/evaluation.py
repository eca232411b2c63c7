"""All that an evaluation measures: the greedy completions' rewards, and what several samples of a prompt show.

Means over the prompts of a split, with intervals, and by topic: exact over batches and ranks. Letters: P prompts, M
measures.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from stateset_lightning.evaluation.config import EvaluationConfig
from stateset_lightning.evaluation.estimators import half_width, majority, pass_at_k, pass_hat_k, wilson_interval
from stateset_lightning.ranks import Ranks
from stateset_lightning.types import NOT_APPLICABLE, Rollout, Scenario, Scores

Scored = tuple[Rollout, Scores]

# Weighted sums such as 0.6 + 0.3 + 0.1 fall short of 1 by rounding.
TOLERANCE = 1e-9


class Evaluation:
    """The metrics of a split, exact over batches and ranks of any size.

    Of the greedy completions, one per prompt: `reward` (mean total of those without a failure), `reward/<name>` (mean
    over those that this reward scored), `reward_failures` (share that failed), `solved`, `mean_tokens` and
    `num_completions`. Of n samples per prompt, without those that failed: `pass@k` and `pass^k` over prompts with k
    samples or more, `avg@n` (mean total reward), `majority@n`; and `sample_failures` (share that failed). None is given
    that is finite for no prompt.

    `reward` and `avg@n` have a `<name>_ci95`, half of the mean's 95% interval by the normal approximation; `solved`,
    which is 0 or 1 for a prompt, has `solved_low` and `solved_high`, Wilson's 95% interval. Each of the three is also
    given as `topic/<topic>/<name>`. Prompts are taken as independent of each other.

    Args:
        rewards: Names of the rewards.
        config: What is sampled, and what counts as solved.
    """

    def __init__(self, rewards: Sequence[str], config: EvaluationConfig) -> None:
        self.config, n = config, config.samples
        self.names = ["reward", *(f"reward/{name}" for name in rewards), "reward_failures", "mean_tokens", "solved"]
        self.names += ["turns"] + [f"pass@{k}" for k in config.ks] + [f"pass^{k}" for k in config.ks[1:]]
        self.names += [f"avg@{n}", f"majority@{n}", "sample_failures"] if n else []
        self.intervals = ["reward", f"avg@{n}"] if n else ["reward"]
        self._prompts: list[tuple[str | None, list[float]]] = []  # of this rank: topic, and M measures

    def logged_names(self) -> list[str]:
        """Names of all that `compute` may give; `<topic>` stands for any."""
        names = [*self.names, *(f"{name}_ci95" for name in self.intervals), "solved_low", "solved_high"]
        names += [f"topic/<topic>/{name}" for name in (*self.intervals, "solved")]
        return [*names, "num_completions", "score_by_turns/<n>"]

    def update(
        self, scenarios: Sequence[Scenario], greedy: Scored, samples: Scored | None = None, turns: Sequence[int] = ()
    ) -> None:
        """Adds P prompts: a greedy completion of each, and `config.samples` sampled ones if there are any.

        `turns` says how many each greedy conversation had; empty where no environment answers.
        """
        rollout, scores = greedy
        measures = {f"reward/{name}": values_P for name, values_P in zip(scores.names, scores.values_NF.T, strict=True)}
        measures |= {"reward": scores.totals_N, "reward_failures": ~scores.totals_N.isfinite()}
        measures |= {"mean_tokens": rollout.sampled_lengths_N, "solved": self._solved(scores)}
        measures["turns"] = torch.tensor(turns or [math.nan] * len(scenarios), dtype=torch.float64)
        if samples is not None:
            measures |= self._sampled(*samples)
        values_PM = torch.stack([measures[name].cpu().double() for name in self.names], dim=1)
        self._prompts += zip([scenario.topic for scenario in scenarios], values_PM.tolist(), strict=True)

    def _solved(self, scores: Scores) -> Tensor:
        """1 or 0 for each completion, float64 [N]; NaN where a reward failed or does not apply."""
        score_N = scores.totals_N
        if self.config.solved_by is not None:
            score_N = scores.values_NF[:, scores.names.index(self.config.solved_by)]
            score_N = score_N.where(score_N != NOT_APPLICABLE, torch.nan)
        return (score_N >= self.config.solved_at - TOLERANCE).double().where(score_N.isfinite(), torch.nan)

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
        means = {f"avg@{n}": totals_PG.nanmean(1), "sample_failures": totals_PG.isnan().double().mean(1)}
        return means | {name: torch.tensor(values_P, dtype=torch.float64) for name, values_P in measures.items()}

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """Every metric by name, of the prompts of all ranks, which call it together. Starts anew afterwards."""
        prompts = [prompt for of_rank in ranks.gather(self._prompts) for prompt in of_rank]
        self._prompts = []
        result = {"num_completions": float(len(prompts))}
        if not prompts:
            return result
        topics, rows = zip(*prompts, strict=True)
        columns = dict(zip(self.names, torch.tensor(rows, dtype=torch.float64).T, strict=True))
        means = {**columns}
        for turns in sorted(set(_finite(columns["turns"]))):
            means[f"score_by_turns/{turns:g}"] = columns["reward"][columns["turns"] == turns]
        for topic in sorted(set(topics) - {None, ""}):
            rows_P = torch.tensor([other == topic for other in topics])
            means |= {f"topic/{topic}/{name}": columns[name][rows_P] for name in (*self.intervals, "solved")}
        for name, values in means.items():
            if known := _finite(values):
                result[name] = sum(known) / len(known)
            if name in self.intervals and len(known) > 1:
                result[f"{name}_ci95"] = half_width(known)
            if name == "solved" and known:
                result["solved_low"], result["solved_high"] = wilson_interval(result[name], len(known))
        return result


def _finite(values: Tensor) -> list[float]:
    return values[values.isfinite()].tolist()
