"""Every metric of a run: its name, what it says, and how it is added up over micro-steps and ranks.

A metric is a pair (sum, count): pairs add up over micro-steps and ranks and are divided once. All names stand here.
Most are counted below; those of a loss in `algorithm/`, of held-out prompts in `evaluation/`, of vLLM servers in
`rollout/`. Letters: P prompts, G completions per prompt, N = P * G completions, F rewards.

An episode

    episode                             number of the episode, from 0
    train/reward                        mean total reward of the completions that were scored
    train/reward_std                    mean over groups of the standard deviation of the total reward
    train/baseline_reward               mean total reward of the greedy completions that an algorithm compares with
    reward/<name>                       mean score of a reward over the completions that it scored
    reward_failures/<name>/<error>      completions for which a reward failed, by type of error
    cost/<name>/<what>                  what a reward has counted: requests, tokens, cache hits of a judge
    groups/all_right                    share of groups with one and the same total reward above 0
    groups/all_wrong                    share of groups with one and the same total reward of 0 or below
    groups/mixed                        share of groups whose total rewards differ
    groups/dropped                      share of groups with fewer than two scored completions
    groups/resampled                    share of groups that dynamic sampling replaced
    completion/mean_tokens              mean number of sampled tokens
    completion/min_tokens               the smallest number of sampled tokens
    completion/max_tokens               the largest number of sampled tokens
    completion/truncated                share of completions that were cut at max_new_tokens
    advantage/std                       root mean square of the advantages
    policy/kl_reward                    KL from the reference in the reward, summed over a completion, nats
    time/sample_s                       seconds that training waited for completions and scores
    time/score_s                        seconds of it that scoring took after the last completion was there
    time/sync_s                         seconds that the last transfer of weights to vLLM servers took
    mismatch/after_sync                 largest difference of a log-prob after it, between server and policy, nats
    work/tokens_per_s                   sampled tokens per second, of all ranks together
    work/token_ratio                    tokens of a padded training pass over those of the pass that was made
    work/skipped                        share of completions that need no training
    work/over_budget_tokens             tokens of micro-steps beyond max_tokens_per_step
    work/extra_prompts                  prompts that dynamic sampling drew
    work/sampled_ahead                  whether the episode was sampled while the one before was trained on
    work/server_restarts                how often a vLLM server came back since the episode before
    conversation/score_by_turns/<n>     mean total reward of the conversations of n turns that were scored
    conversation/<name>                 of conversations: turns, ends by cause, what environments count
    memory/peak_mb                      peak memory: allocated on a CUDA device, resident of the process elsewhere

An optimizer step

    policy/loss                         the loss: a sum over tokens of weight x per-token loss
    policy/entropy                      mean entropy of the policy's next-token distribution, nats
    policy/sampling_difference          mean absolute difference of log-probs between sampling and training, nats
    policy/grad_norm                    norm of the gradient before clipping; 0 of a skipped step
    policy/empty_steps                  whether the step had nothing to train
    policy/bad_steps                    whether the step was skipped because its gradient was not finite
    policy/ratio_mean                   mean importance ratio, of tokens or of completions as the loss has it
    policy/clip_low, policy/clip_high   share of them whose gradient the lower, the upper bound of the ratio removes
    policy/off_policy                   share of completions that off_policy_threshold leaves out
    policy/kl                           mean KL estimate per token, nats
    policy/teacher_kl                   mean log-prob of a sampled token minus the teacher's, about the reverse KL, nats
    policy/teacher_unknown              share of tokens whose log-prob the teacher's server does not know
    policy/divergence                   mean divergence of the policy's distributions from the teacher's, nats
    train/router_aux_loss               loss that balances experts, mean per token, without its coefficient
    policy/kl_coefficient               coefficient of the KL term, where it adapts
    policy/entropy_coefficient          coefficient of the entropy bonus, where it adapts
    mismatch/kl                         KL of the sampler from the trainer per token, nats
    mismatch/weight                     mean weight trainer over sampler
    mismatch/unknown                    share of tokens whose log-prob by the sampler is no finite number
    mismatch/ess                        effective sample size of the weights trainer over sampler, as a share
    mismatch/masked                     share of tokens that the correction leaves out
    lr                                  learning rate of the first parameter group
    time/step_s                         seconds of the optimizer step
    time/train_s                        seconds of it that were not sampling and scoring

Validation; of a test, `test/` takes the place of `val/`

    val/reward, val/reward_ci95         mean total reward of the greedy completions; half of its 95% interval
    val/reward/<name>                   mean score of a reward
    val/reward_failures                 share of greedy completions without a score
    val/solved                          share of prompts that the greedy completion solves
    val/solved_low, val/solved_high     its 95% interval
    val/mean_tokens                     mean number of sampled tokens of a greedy completion
    val/turns, val/score_by_turns/<n>   mean turns of the greedy conversations; mean total reward of those of n turns
    val/num_completions                 number of greedy completions
    val/pass@<k>, val/pass^<k>          chance that at least one, that all of k samples are right
    val/avg@<n>, val/avg@<n>_ci95       mean total reward of the n samples of a prompt; half of its 95% interval
    val/majority@<n>                    chance that the commonest answer of the n samples is right
    val/sample_failures                 share of samples without a score
    val/topic/<topic>/<what>            reward, solved and avg@<n> of the prompts of a topic

A loss or an engine of one's own may add more.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stateset_lightning.algorithm.advantages import is_constant, nan_std
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import failure_counts
from stateset_lightning.types import FinishReason, Metrics, Rollout, Scores

if TYPE_CHECKING:
    from stateset_lightning.policy import Policy
    from stateset_lightning.training.collect import Collection
    from stateset_lightning.training.episode import Episode
    from stateset_lightning.training.resample import Sample

# Those of the text above, `<name>` standing for anything; none if Python drops docstrings (-OO).
_FIRST_COLUMN = re.findall(r"^    (\S+(?:, \S+)?)  +\S", __doc__ or "", flags=re.MULTILINE)
NAMES = [name for names in _FIRST_COLUMN for name in names.split(", ")]

# Shown by Lightning's progress bars.
PROGRESS_BAR = ("train/reward", "completion/mean_tokens", "work/tokens_per_s")


def floats(values: Sequence[Tensor | float]) -> list[float]:
    """The values on the host; of those that lie on a GPU all of one dtype come at once, as each copy is a wait."""
    far: dict[torch.dtype, dict[int, Tensor]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor) and value.device.type != "cpu":
            far.setdefault(value.dtype, {})[i] = value
    copied: dict[int, float] = {}
    for same in far.values():
        copied.update(zip(same, torch.stack([*same.values()]).tolist(), strict=True))
    return [copied[i] if i in copied else float(value) for i, value in enumerate(values)]


class SumCounts:
    """Adds up (sum, count) pairs by name."""

    def __init__(self) -> None:
        self._totals: dict[str, list[Tensor | float]] = {}

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            sums = self._totals.setdefault(name, [0.0, 0.0])
            # Tensors stay on their device until `means`: an addition does not wait for the device, `.item()` does.
            sums[0] = sums[0] + total
            sums[1] = sums[1] + count

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Sum over count, over all ranks; names without any count are left out. Starts anew afterwards."""
        values = iter(floats([value for pair in self._totals.values() for value in pair]))
        mine: Metrics = dict(zip(self._totals, zip(values, values, strict=True), strict=True))
        self._totals = {}
        of_ranks = SumCounts()
        for of_rank in ranks.gather(mine):
            of_ranks.add(of_rank)
        return {name: float(total / count) for name, (total, count) in sorted(of_ranks._totals.items()) if count}


class RunMetrics:
    """The newest value of every metric, and what each optimizer step has to log."""

    def __init__(self) -> None:
        self.step = SumCounts()
        self._of_episode: dict[str, float] = {}
        self._of_step: dict[str, float] = {}
        self._unlogged: dict[str, float] = {}

    @property
    def last(self) -> dict[str, float]:
        """Of the newest episode and the newest optimizer step; nothing that only an earlier one had."""
        return {**self._of_episode, **self._of_step}

    def add_episode(self, metrics: Metrics, rollout: Rollout, index: int, ranks: Ranks) -> None:
        """An episode's metrics: known now, logged with its first optimizer step."""
        sums = SumCounts()
        sums.add(metrics)
        means = sums.means(ranks)
        means["advantage/std"] = math.sqrt(means.get("advantage/std", 0.0))  # was averaged as a square
        lengths_N = rollout.sampled_lengths_N
        ranges = ranks.gather((float(lengths_N.min()), float(lengths_N.max())))
        means["completion/min_tokens"] = min(low for low, _ in ranges)
        means["completion/max_tokens"] = max(high for _, high in ranges)
        self._of_episode = self._unlogged = {**means, "episode": float(index)}

    def end_step(self, ranks: Ranks) -> dict[str, float]:
        """One row for the loggers: the optimizer step's own metrics and, the first time, its episode's."""
        self._of_step = self.step.means(ranks)
        if "mismatch/ess" in self._of_step:  # sum(w) / sum(w^2) so far; never above 1 but for rounding
            self._of_step["mismatch/ess"] = min(self._of_step["mismatch/ess"] * self._of_step["mismatch/weight"], 1.0)
        row = {**self._unlogged, **self._of_step}
        self._unlogged = {}
        return row

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"episode": self._of_episode, "step": self._of_step}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self._of_episode, self._of_step = dict(state["episode"]), dict(state["step"])


# An episode -----------------------------------------------------------------------------------------------------------


def of_episode(collection: "Collection", episode: "Episode", scores: Scores, policy: "Policy", ranks: Ranks) -> Metrics:
    """What can be said of this rank's completions before they are trained on. Failed rewards enter no mean.

    Args:
        collection: What was sampled for the episode. Failures are counted over all of it.
        episode: What is trained on.
        scores: What the advantages were made of: with the KL as its last column, where that is part of the reward.
        policy: That is trained.
        ranks: Of the run.
    """
    sample = collection.sample
    everything = [each for each in (*collection.trained, collection.baseline) if each is not None]
    tokens = sum(int(each.rollout.sampled_T.sum()) for each in everything)
    seconds = max(collection.seconds, collection.seconds_ahead or 0.0)
    metrics: Metrics = {
        **sample_metrics(sample, episode.advantages_N),
        **work_metrics(episode, policy),
        **collection.engine_metrics,
        **sample.conversations,
        "time/sample_s": (collection.seconds, 1),
        "time/score_s": (sum(each.scores.seconds for each in everything), 1),
    }
    failures = sum((Counter(failure_counts(each.scores)) for each in everything), Counter[str]())
    counts: dict[str, float] = {**failures, **collection.costs, "work/tokens_per_s": tokens / seconds}
    if collection.seconds_ahead is not None:
        metrics["work/sampled_ahead"] = (float(collection.seconds_ahead > 0), 1)
    if scores.names[-1:] == ("kl",):
        metrics["policy/kl_reward"] = _mean(scores.values_NF[:, -1])
    if collection.baseline is not None:
        metrics["train/baseline_reward"] = _mean(collection.baseline.scores.totals_N)
    if collection.is_dynamic:
        drawn = [len(each.batch) for each in collection.trained[1:]]
        metrics["groups/resampled"] = (drawn[0] if drawn else 0, len(sample.batch))
        counts["work/extra_prompts"] = sum(drawn)
    if episode.tokens_over_budget is not None:
        counts["work/over_budget_tokens"] = episode.tokens_over_budget
    # a sum over ranks, not a mean
    return metrics | {name: (number, 1 / ranks.world) for name, number in counts.items()}


def sample_metrics(sample: "Sample", advantages_N: Tensor) -> Metrics:
    """What the completions that are trained on say. Failed rewards enter no mean."""
    rollout, scores = sample.rollout, sample.scores
    lengths_N, trained_N = rollout.sampled_lengths_N.double(), advantages_N.isfinite()
    count = len(lengths_N)
    return {
        "train/reward": _mean(scores.totals_N),
        "completion/mean_tokens": (lengths_N.sum(), count),
        "completion/truncated": (sum(reason == FinishReason.LENGTH for reason in rollout.finish_reasons), count),
        "advantage/std": (advantages_N[trained_N].square().sum(), int(trained_N.sum())),
        **reward_metrics(scores),
        **(group_metrics(sample.totals_PG) if rollout.num_generations > 1 else {}),  # a target has no group
    }


def reward_metrics(scores: Scores) -> Metrics:
    """Mean of each reward over the completions that it scored."""
    return {f"reward/{name}": _mean(column) for column, name in zip(scores.values_NF.T, scores.names, strict=True)}


def group_metrics(totals_PG: Tensor) -> Metrics:
    """Shares of groups: all right (constant, above zero), all wrong (constant, not above zero), mixed, dropped (under
    two survivors).
    """
    constant_P, dropped_P = constant_groups(totals_PG)
    highest_P = totals_PG.where(totals_PG.isfinite(), -torch.inf).amax(-1)
    std_P = nan_std(totals_PG, dim=-1).squeeze(-1).where(~constant_P, 0.0)  # exactly, which the mean itself is not
    count = len(totals_PG)
    return {
        "train/reward_std": (std_P.sum(), int((~dropped_P).sum())),
        "groups/all_right": ((constant_P & (highest_P > 0)).sum(), count),
        "groups/all_wrong": ((constant_P & (highest_P <= 0)).sum(), count),
        "groups/mixed": ((~constant_P & ~dropped_P).sum(), count),
        "groups/dropped": (dropped_P.sum(), count),
    }


def constant_groups(totals_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Which groups have one and the same total reward, and which are dropped (under two survivors); bool [P] each."""
    dropped_P = totals_PG.isfinite().sum(-1) < 2
    return is_constant(totals_PG) & ~dropped_P, dropped_P


def work_metrics(episode: "Episode", policy: "Policy") -> Metrics:
    """How much of an episode's training is spared, and the memory so far."""
    groups = episode.active_batch().groups
    packed = sum(len(group.prompt) + group.num_completion_tokens for group in groups)
    longest_prompt = max((len(group.prompt) for group in groups), default=0)
    longest_completion = max((len(c) for group in groups for c in group.completions), default=0)
    padded = sum(len(group.completions) for group in groups) * (longest_prompt + longest_completion)
    count = len(episode.active_N)
    return {
        "work/token_ratio": (padded, packed if policy.uses_packed_scoring else padded),
        "work/skipped": (count - int(episode.active_N.sum()), count),
        "memory/peak_mb": (peak_memory_mb(policy.device), 1),
    }


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: allocated on a CUDA device since the start, resident of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if (status := Path("/proc/self/status")).exists():  # Linux
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10  # kB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def _mean(values: Tensor) -> tuple[Tensor, int]:
    """(sum, count) of the values that are numbers: rewards that failed or do not apply are none."""
    known = values[values.isfinite()]
    return known.sum(), len(known)


# An optimizer step ----------------------------------------------------------------------------------------------------


def of_tokens(logprobs_T: Tensor, sampling_logprobs_T: Tensor | None, entropies_T: Tensor) -> Metrics:
    """What a micro-batch says of the policy, beside what its loss counts."""
    metrics: Metrics = {"policy/entropy": (entropies_T.sum(), entropies_T.numel())}
    if sampling_logprobs_T is not None:
        known_T = sampling_logprobs_T.isfinite()
        difference_T = (logprobs_T - sampling_logprobs_T).abs().where(known_T, 0.0)
        metrics["policy/sampling_difference"] = (difference_T.sum(), known_T.sum())
    return metrics


def of_gradient(norm: float, *, empty: bool, bad: bool) -> Metrics:
    """The gradient's norm before clipping; a skipped step's counts as 0."""
    values = {"empty_steps": float(empty), "bad_steps": float(bad), "grad_norm": 0.0 if empty or bad else norm}
    return {f"policy/{name}": (value, 1) for name, value in values.items()}


def of_step(lr: float, seconds: float, collect_seconds: float, coefficients: Mapping[str, float]) -> Metrics:
    """What is known when the optimizer has stepped; `coefficients`: the adaptive ones that it was made with."""
    values = {"lr": lr, "time/step_s": seconds, "time/train_s": seconds - collect_seconds}
    values |= {f"policy/{name}": value for name, value in coefficients.items() if name.endswith("_coefficient")}
    return {name: (value, 1) for name, value in values.items()}
