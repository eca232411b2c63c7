"""Completions -> scores: run every reward on every completion, while others are still being sampled.

Async rewards run concurrently on an event loop of their own, blocking ones on threads, blocking ones with a time-out in
worker processes that can be killed, batched ones when all is sampled. The order of results never depends on which
reward is quicker.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from stateset_lightning.errors import ConfigError, DataError, RewardError
from stateset_lightning.rewards.background import EventLoopThread
from stateset_lightning.rewards.base import BatchReward, RewardFunction, as_rewards, check_timeout, is_async
from stateset_lightning.rewards.outcome import Outcome, evaluate, evaluate_batch
from stateset_lightning.rewards.worker_pool import WorkerPool
from stateset_lightning.threads import DaemonThreads
from stateset_lightning.types import NOT_APPLICABLE, RewardFailure, Scores, Turn

if TYPE_CHECKING:
    from torch import Tensor

Run = Callable[[Sequence[Turn], Mapping[str, Any]], Future[Outcome]]
"""Starts one reward on one completion and returns at once."""


_Waiting = tuple[int, Sequence[Turn], Mapping[str, Any], Future[Outcome]]
"""A completion that a batched reward has yet to score: its number, conversation, columns, and where the outcome
goes.
"""


class Scorer:
    """Scores completions with a list of rewards.

    Use it as a context manager, or call `close`: it holds threads and worker processes.

    Args:
        rewards: A `RewardFunction`, a function `f(turns, context)`, or a list of these.
        timeout: Seconds per completion for rewards that set none themselves, batched ones aside; None means no limit.
        max_concurrency: Async rewards, and blocking rewards without a time-out, that run at the same time.
        max_failures: `check_failures` raises if more than this share of completions failed.

    Raises:
        ConfigError: If an argument is unusable, or a blocking reward with a time-out cannot be sent to a worker
            process.
    """

    def __init__(
        self, rewards: Any, *, timeout: float | None = None, max_concurrency: int = 16, max_failures: float = 0.5
    ) -> None:
        check_timeout("timeout", timeout)
        if max_concurrency < 1:
            raise ConfigError(f"max_concurrency={max_concurrency} must be at least 1")
        if not 0 <= max_failures <= 1:
            raise ConfigError(
                f"max_reward_failures={max_failures} is a share of completions: give a number from 0 to 1"
            )
        self.rewards = as_rewards(rewards)
        self.names = tuple(reward.name for reward in self.rewards)
        self.max_failures = max_failures
        loop, threads = EventLoopThread(max_concurrency), DaemonThreads(max_concurrency, "blocking-rewards")
        limits = [
            reward.timeout if reward.timeout is not None or isinstance(reward, BatchReward) else timeout
            for reward in self.rewards
        ]
        timeouts = dict(zip(self.names, limits, strict=True))
        in_workers = [reward for reward in self.rewards if timeouts[reward.name] is not None and not is_async(reward)]
        workers = WorkerPool(in_workers)
        self._runs = [
            _run(reward, timeouts[reward.name], loop, threads, workers, in_workers) for reward in self.rewards
        ]
        # Also at interpreter exit and when the scorer is collected as garbage; workers first, since threads wait for
        # them.
        self._close = weakref.finalize(self, _close_all, (workers, loop, threads))

    def start(self, num_completions: int, device: Any = "cpu") -> ScoringSession:
        """Begin to score N completions; rewards that are models do so on `device`.

        Raises:
            RuntimeError: If the scorer is closed.
        """
        if not self._close.alive:
            raise RuntimeError("the scorer is closed")
        for reward in self.rewards:
            if isinstance(reward, BatchReward):
                reward.device = device
        return ScoringSession(self.rewards, self._runs, num_completions)

    def take_counts(self) -> dict[str, float]:
        """What rewards have counted since the last call, as `cost/<reward>/<key>`."""
        return {
            f"cost/{reward.name}/{key}": count for reward in self.rewards for key, count in reward.take_counts().items()
        }

    def check_failures(self, scores: Scores) -> None:
        """Raise RewardError if more than `max_failures` of the completions failed."""
        check_failures(scores, self.max_failures)

    def close(self) -> None:
        """Stop what runs, end all threads and kill all worker processes."""
        self._close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ScoringSession:
    """The scoring of one episode's N completions; made by `Scorer.start`.

    As a context manager it cancels what has not begun when an exception leaves the block; so does dropping it.
    """

    def __init__(self, rewards: Sequence[RewardFunction], runs: Sequence[Run], num_completions: int) -> None:
        self._rewards = rewards
        self._runs = runs
        self._names = tuple(reward.name for reward in rewards)
        self._batches: dict[int, list[_Waiting]] = {
            f: [] for f, reward in enumerate(rewards) if isinstance(reward, BatchReward)
        }
        self._futures_NF: list[list[Future[Outcome] | None] | None] = [None] * num_completions
        self._cancel = weakref.finalize(self, _cancel_all, self._futures_NF)

    def submit(
        self,
        n: int,
        turns: Sequence[Turn],
        context: Mapping[str, Any] | None = None,
        *,
        completion_tokens: int | None = None,
    ) -> None:
        """Start scoring completion `n` and return at once.

        Args:
            n: Which of the N completions; each is submitted once.
            turns: The conversation, the completion last.
            context: The scenario's columns. `context["rewards"]` names the rewards that score it; None means all.
            completion_tokens: The completion's number of tokens; rewards find it as `context["completion_tokens"]`.

        Raises:
            DataError: If `context["rewards"]` names a reward that does not exist.
        """
        assert self._futures_NF[n] is None, f"completion {n} was submitted twice"
        columns = dict(context or {})
        if completion_tokens is not None:
            columns["completion_tokens"] = completion_tokens
        chosen = self._chosen(columns.get("rewards"), columns.get("id"))
        # Each reward gets its own list and mapping: one that changes them must not disturb the others.
        self._futures_NF[n] = [
            self._start(f, n, list(turns), dict(columns)) if name in chosen else None
            for f, name in enumerate(self._names)
        ]

    def collect(self) -> Scores:
        """Run the batched rewards, and wait for all others of all completions.

        Raises:
            ConfigError: If a worker process could not load its rewards, or a batched reward its model.
        """
        begin = time.perf_counter()
        for f, waiting in self._batches.items():
            _run_batch(self._rewards[f], sorted(waiting, key=lambda item: item[0]))
        outcomes_NF = []
        for n, futures in enumerate(self._futures_NF):
            assert futures is not None, f"completion {n} was not submitted"
            outcomes_NF.append([Outcome(NOT_APPLICABLE) if future is None else future.result() for future in futures])
        return _scores(self._rewards, outcomes_NF, time.perf_counter() - begin)

    def close(self) -> None:
        """Cancel what has not begun."""
        self._cancel()

    def __enter__(self) -> ScoringSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, f: int, n: int, turns: Sequence[Turn], context: Mapping[str, Any]) -> Future[Outcome]:
        if f not in self._batches:
            return self._runs[f](turns, context)
        future: Future[Outcome] = Future()
        self._batches[f].append((n, turns, context, future))
        return future

    def _chosen(self, names: Iterable[str] | None, scenario: Any) -> set[str]:
        if names is None:
            return set(self._names)
        known = ", ".join(self._names)
        if isinstance(names, str) or not isinstance(names, list | tuple | set | frozenset):
            raise DataError(f"rewards={names!r} of scenario {scenario!r} must be a list of reward names ({known})")
        unknown = [name for name in names if name not in self._names]
        if unknown:
            raise DataError(
                f"rewards={list(names)!r} of scenario {scenario!r} names unknown rewards {unknown}; known are: {known}"
            )
        return set(names)


def failure_counts(scores: Scores) -> dict[str, int]:
    """How often each reward failed and how: `reward_failures/<reward>/<exception type>` -> count.

    A completion to which no reward applies counts as `reward_failures/all/NotApplicable`.
    """
    return dict(
        sorted(Counter(f"reward_failures/{failure.reward}/{failure.error}" for failure in scores.failures).items())
    )


def check_failures(scores: Scores, max_failures: float = 0.5) -> None:
    """Raise if more than `max_failures` of the completions have no score.

    Raises:
        RewardError: With the counts and the last failure's traceback.
    """
    total = scores.totals_N.numel()
    failed = int(scores.totals_N.isnan().sum())
    if failed <= max_failures * total:
        return
    counts = ", ".join(
        f"{key.removeprefix('reward_failures/')}: {count}" for key, count in failure_counts(scores).items()
    )
    message = (
        f"{failed} of {total} completions have no score, more than max_reward_failures={max_failures:g} allows"
        f" ({counts})."
    )
    if scores.failures:
        last = max(scores.failures, key=lambda failure: (bool(failure.traceback), failure.completion))
        message += (
            f" The last failure, of reward '{last.reward}' on completion {last.completion}: {last.error}:"
            f" {last.message}"
        )
        message += f"\n{last.traceback}".rstrip()
    raise RewardError(message)


def _run(
    reward: RewardFunction,
    timeout: float | None,
    loop: EventLoopThread,
    threads: DaemonThreads,
    workers: WorkerPool,
    in_workers: Sequence[RewardFunction],
) -> Run:
    """How this reward is started."""
    if is_async(reward):
        return lambda turns, context: loop.submit(reward, turns, context, timeout)
    if timeout is None:
        return lambda turns, context: threads.submit(evaluate, reward, turns, context, loop.run)
    index = next(i for i, other in enumerate(in_workers) if other is reward)
    return lambda turns, context: workers.submit(index, turns, context, timeout)


def _run_batch(reward: RewardFunction, waiting: Sequence[_Waiting]) -> None:
    if waiting:
        assert isinstance(reward, BatchReward)
        outcomes = evaluate_batch(
            reward, [turns for _, turns, _, _ in waiting], [context for _, _, context, _ in waiting]
        )
        for (_, _, _, future), outcome in zip(waiting, outcomes, strict=True):
            future.set_result(outcome)


def _scores(rewards: Sequence[RewardFunction], outcomes_NF: list[list[Outcome]], seconds: float) -> Scores:
    import torch  # here, since worker processes import this module and do without torch

    weights = [reward.weight for reward in rewards]
    names = tuple(reward.name for reward in rewards)
    failures: list[RewardFailure] = []
    for n, outcomes in enumerate(outcomes_NF):
        failures += [
            RewardFailure(n, name, o.error, o.message, o.traceback)
            for name, o in zip(names, outcomes, strict=True)
            if o.error
        ]
        if all(outcome.value == NOT_APPLICABLE for outcome, weight in zip(outcomes, weights, strict=True) if weight):
            failures.append(RewardFailure(n, "all", "NotApplicable", "no reward applies to this completion"))
    values_NF: Tensor = torch.tensor([[o.value for o in row] for row in outcomes_NF], dtype=torch.float64).reshape(
        -1, len(names)
    )
    totals_N: Tensor = torch.tensor([_total(row, weights) for row in outcomes_NF], dtype=torch.float64)
    breakdowns = [{name: o.breakdown for name, o in zip(names, row, strict=True) if o.breakdown} for row in outcomes_NF]
    return Scores(names, values_NF, totals_N, breakdowns, failures, seconds)


def _total(outcomes: Sequence[Outcome], weights: Sequence[float]) -> float:
    """The weighted sum over the rewards that apply; NaN if one failed (NaN adds up to NaN) or none applies. Held-out
    ones do not count.
    """
    parts = [
        weight * o.value for o, weight in zip(outcomes, weights, strict=True) if weight and o.value != NOT_APPLICABLE
    ]
    return sum(parts) if parts else math.nan


def _cancel_all(futures_NF: list[list[Future[Outcome] | None] | None]) -> None:
    # The last first: one that runs would make room, when it is cancelled, for one that waits.
    for future in reversed([future for futures in futures_NF for future in futures or [] if future is not None]):
        future.cancel()


def _close_all(parts: Iterable[WorkerPool | EventLoopThread | DaemonThreads]) -> None:
    for part in parts:
        part.close()
