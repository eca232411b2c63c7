"""Completions -> scores: run every reward on every completion, while others are still being sampled.

Async rewards run concurrently on an event loop of their own, blocking ones on threads, blocking ones with a time-out in
worker processes that can be killed, batched ones when all completions are sampled, and those that compare the
completions of a prompt when the others have scored them. The order of results never depends on which reward is quicker.
"""

# No `from __future__ import annotations`: bounds would be lost from annotated types that are read from text.
import inspect
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import groupby, zip_longest
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from stateset_lightning.errors import ConfigError, DataError, bounded, log, tell_once
from stateset_lightning.rewards import base
from stateset_lightning.rewards.base import BatchReward, Context, Given, Outcome, RewardFunction, Turns, failure
from stateset_lightning.rewards.functions import alarm_in, is_async, written
from stateset_lightning.rewards.group import GroupReward
from stateset_lightning.rewards.reward_list import as_rewards
from stateset_lightning.threads import DaemonThreads, EventLoopThread, interruptible, wait_for
from stateset_lightning.types import NOT_APPLICABLE, RewardFailure, Scores
from stateset_lightning.workers import WorkerPool

ALARM_SECONDS = 10.0  # of a reward that needs a process and names no time-out


@bounded("scorer")
@dataclass(eq=False)
class Scorer(AbstractContextManager["Scorer"]):
    """Scores completions with a list of rewards.

    Use it as a context manager, or call `close`: it holds threads and worker processes.

    Args:
        rewards: A `RewardFunction`, a function `f(turns, context)`, or a list of these.
        timeout: Seconds per completion for rewards that set none themselves, except batched ones; None means no limit.
        max_concurrency: Async rewards that run at the same time, and blocking rewards without a time-out that do.
        max_failures: Share of an episode's completions that may fail: for `training.collect`.

    Raises:
        ConfigError: If an argument is unusable, or a blocking reward with a time-out cannot be sent to a worker
            process.
    """

    rewards: Any
    _: KW_ONLY
    timeout: Annotated[float, Gt(0), Lt(math.inf)] | None = None
    max_concurrency: Annotated[int, Ge(1)] = 16
    max_failures: Annotated[float, Ge(0), Le(1)] = 0.5

    def __post_init__(self) -> None:
        self.rewards = as_rewards(self.rewards)
        self.names = tuple(reward.name for reward in self.rewards)
        # Whether a completion without others of its prompt gets a total.
        self.scores_alone = any(reward.weight and not isinstance(reward, GroupReward) for reward in self.rewards)
        loop = EventLoopThread(self.max_concurrency, "async-rewards")
        threads = DaemonThreads(self.max_concurrency, "blocking-rewards")
        workers = WorkerPool(remedy="; or, where it sets no alarms, write it as `async def` or drop the time-out")
        # Each starts a reward on a completion and returns at once.
        self.starts: list[Callable[..., Future[Any]]] = []
        for reward in self.rewards:
            if self.timeout is None:
                _set_timeout(reward)
            limit = self.timeout if reward.timeout is None and not isinstance(reward, BatchReward) else reward.timeout
            if is_async(reward):
                self.starts.append(partial(loop.submit, base.call_async, reward, timeout=limit))
            elif limit is None:
                self.starts.append(partial(threads.submit, _call_on_thread, loop, reward))
            else:
                if getattr(reward, "takes_environments", False):
                    why = "takes environments, which live in this process: only async def can have a time-out there"
                    raise ConfigError(f"reward '{reward.name}' {why}; leave out timeout and model.reward_timeout")
                workers.add(f"reward '{reward.name}'", partial(base.call, reward))
                self.starts.append(partial(workers.submit, f"reward '{reward.name}'", limit))
        # `close()` stops what runs, ends all threads and kills all worker processes. So do the interpreter's exit and
        # the garbage collector. Workers first: threads wait for them.
        parts = ExitStack()
        for part in (threads, loop, workers):
            parts.callback(part.close)
        self.close = weakref.finalize(self, parts.close)

    def start(self, num_completions: int, device: Any = "cpu", num_generations: int = 1) -> "ScoringSession":
        """Begin to score N completions; rewards that are models compute on `device`.

        Args:
            num_completions: N.
            device: The policy's.
            num_generations: G: completion n belongs to prompt n // G. All of a prompt are here, on this rank.

        Raises:
            RuntimeError: If the scorer is closed.
        """
        if not self.close.alive:
            raise RuntimeError("the scorer is closed")
        for reward in self.rewards:
            if isinstance(reward, BatchReward):
                reward.device = device
        return ScoringSession(self, num_completions, num_generations)

    def take_counts(self) -> dict[str, float]:
        """What rewards have counted since the last call, as `cost/<reward>/<key>`."""
        return {f"cost/{r.name}/{key}": count for r in self.rewards for key, count in r.take_counts().items()}

    def __exit__(self, *exception: object) -> None:
        self.close()


class ScoringSession(AbstractContextManager["ScoringSession"]):
    """The scoring of one episode's N completions; made by `Scorer.start`.

    As a context manager it cancels what has not begun when an exception leaves the block; so does dropping it.
    """

    def __init__(self, scorer: Scorer, num_completions: int, num_generations: int) -> None:
        assert num_completions % num_generations == 0, f"{num_completions} completions in groups of {num_generations}"
        self._scorer = scorer
        self._num_completions, self._num_generations = num_completions, num_generations
        self._given: dict[int, tuple[Turns, dict[str, Any]]] = {}  # of each completion
        self._futures: dict[int, list[Future[Outcome]]] = {}  # of each completion: one per reward
        self._cancel = weakref.finalize(self, _cancel_all, self._futures)

    def submit(self, n: int, turns: Turns, context: Context = None, *, completion_tokens: int | None = None) -> None:
        """Start scoring completion `n` and return at once.

        Args:
            n: Which of the N completions; each is submitted once.
            turns: The conversation, the completion last.
            context: The scenario's columns. `context["rewards"]` names the rewards that score it; None means all.
                `context["environments"]` may be a function, which gives the environment in a list.
            completion_tokens: The completion's number of tokens; rewards find it as `context["completion_tokens"]`.

        Raises:
            DataError: If `context["rewards"]` names a reward that does not exist.
        """
        assert n not in self._futures, f"completion {n} was submitted twice"
        columns = dict(context or {})
        if completion_tokens is not None:
            columns["completion_tokens"] = completion_tokens
        chosen = self._chosen(columns.get("rewards"), columns.get("id"))
        self._given[n] = turns, columns
        self._futures[n] = [self._start(f, n, name in chosen) for f, name in enumerate(self._scorer.names)]

    def fail(self, n: int, error: BaseException) -> None:
        """Completion `n` has no score: there is no conversation that could be scored."""
        self._given[n] = (), {}
        self._futures[n] = [_done(failure(error)) for _ in self._scorer.rewards]

    @interruptible()
    def collect(self) -> Scores:
        """Run the batched rewards, wait for all others, and run those that compare.

        Raises:
            ConfigError: If a worker process could not load its rewards, or a batched reward its model.
        """
        begin, scorer, rewards = time.perf_counter(), self._scorer, self._scorer.rewards
        together = [f for f, reward in enumerate(rewards) if reward.scores_several]
        for f in sorted(together, key=lambda f: isinstance(rewards[f], GroupReward)):  # those last
            self._score_together(f)
        outcomes_NF = [[_outcome(future) for future in self._futures[n]] for n in range(self._num_completions)]
        changed = {name for row in outcomes_NF for name, o in zip(scorer.names, row, strict=True) if o.changed}
        for name in sorted(changed):
            tell_once(f"reward '{name}' changes its columns or its conversation: copies, which nothing else sees")
        return _scores(rewards, outcomes_NF, time.perf_counter() - begin)

    def __exit__(self, *exception: object) -> None:
        self._cancel()

    def _start(self, f: int, n: int, is_chosen: bool) -> Future[Outcome]:
        """Start a reward on a completion; the future of one that scores several gets its outcome when all are there."""
        if is_chosen and not self._scorer.rewards[f].scores_several:
            return self._scorer.starts[f](*self._seen(f, n))
        return Future() if is_chosen else _done(Outcome(NOT_APPLICABLE))

    def _seen(self, f: int, n: int) -> tuple[Turns, dict[str, Any]]:
        """What a reward sees of a completion: no environments, which no process can be sent, unless it asks."""
        reward, (turns, columns) = self._scorer.rewards[f], self._given[n]
        if not callable(columns.get("environments")):  # a single turn
            return turns, columns
        if not getattr(reward, "takes_environments", False):
            columns = {name: value for name, value in columns.items() if name != "environments"}
        return base.joined(turns, columns["num_turns"]) if reward.turns == "all" else turns, columns

    def _score_together(self, f: int) -> None:
        """Run a reward that scores several completions in a call: all of them, or those of a prompt."""
        reward, calls = self._scorer.rewards[f], list[Future[Any]]()
        size = self._num_generations if isinstance(reward, GroupReward) else self._num_completions
        waiting = [n for n in sorted(self._futures) if not self._futures[n][f].done()]
        parts = [list(part) for _, part in groupby(waiting, lambda n: n // size)]
        if isinstance(reward, GroupReward) and size == 1:
            tell_once(f"reward '{reward.name}' compares the completions of a prompt: it scores none alone")
        else:
            calls += [self._scorer.starts[f](*self._given_together(f, part)) for part in parts]
        for part, call in zip_longest(parts, calls):
            found = _outcome(call) if call else Outcome(NOT_APPLICABLE)
            for n, outcome in zip(part, found if isinstance(found, list) else [found] * len(part), strict=True):
                self._futures[n][f].set_result(outcome)

    def _given_together(self, f: int, part: Sequence[int]) -> Given:
        rewards = self._scorer.rewards
        turns, contexts = map(list, zip(*(self._seen(f, n) for n in part), strict=True))
        if not isinstance(rewards[f], GroupReward):
            return turns, contexts
        others = [(i, other.name) for i, other in enumerate(rewards) if not isinstance(other, GroupReward)]
        values = {name: [_outcome(self._futures[n][i]).value for n in part] for i, name in others}
        scores = {name: [None if v == NOT_APPLICABLE else v for v in of_name] for name, of_name in values.items()}
        num_tokens = [context.get("completion_tokens") for context in contexts]
        return turns, {**contexts[0], "completion_tokens": num_tokens}, scores

    def _chosen(self, names: Iterable[str] | None, scenario: Any) -> Iterable[str]:
        if names is None:
            return self._scorer.names
        if unknown := [name for name in names if name not in self._scorer.names]:
            known = ", ".join(self._scorer.names)
            raise DataError(f"rewards of scenario {scenario!r} names unknown rewards {unknown}; known are: {known}")
        return names


def failure_counts(scores: Scores) -> dict[str, int]:
    """How often each reward failed and how: `reward_failures/<reward>/<exception type>` -> count.

    A completion to which no reward applies counts as `reward_failures/all/NotApplicable`.
    """
    return dict(sorted(Counter(f"reward_failures/{f.reward}/{f.error}" for f in scores.failures).items()))


def _set_timeout(reward: RewardFunction) -> None:
    """A reward that sets alarms, as math-verify does, gets a time-out, with which it runs in a process.

    Alarms are signals: in a thread they raise, and what catches that, as many functions do, scores 0 for ever.

    Raises:
        ConfigError: If it cannot have a time-out.
    """
    if reward.timeout is not None or not (found := alarm_in(written(reward))):
        return
    why = f"reward '{reward.name}' uses {found}, whose time-outs are signals, which work in no thread"
    if is_async(reward) or isinstance(reward, BatchReward):
        raise ConfigError(f"{why}: write it as a plain `def` that scores one completion, with timeout: {ALARM_SECONDS}")
    log.warning("%s: each call gets a process and %d s; set its timeout to choose", why, ALARM_SECONDS)
    reward.timeout = ALARM_SECONDS


def _call_on_thread(loop: EventLoopThread, reward: RewardFunction, *given: Any) -> Any:
    with ExitStack() as modes:
        if isinstance(reward, BatchReward):
            import torch  # not where workers would import it, too

            # A thread has neither the gradient mode nor the device of the one that has started it.
            modes.enter_context(torch.no_grad())
            if torch.device(reward.device).type == "cuda":
                modes.enter_context(torch.cuda.device(reward.device))
        outcome = base.call(reward, *given)
    return loop.submit(lambda: outcome).result() if inspect.iscoroutine(outcome) else outcome


def _done(outcome: Outcome) -> Future[Outcome]:
    future: Future[Outcome] = Future()
    future.set_result(outcome)
    return future


def _outcome(future: Future[Any]) -> Any:
    """Wait for an outcome, or a list of outcomes.

    A time-out, a dead worker, or a result that cannot be pickled is a failure of the reward.
    """
    try:
        error = wait_for(future).exception()  # not `result`, which raises what a signal raises here, too
    except CancelledError as cancelled:  # a reward can cancel whatever runs beside it
        error = cancelled
    if isinstance(error, ConfigError):
        raise error
    return failure(error) if error else future.result()


def _scores(rewards: Sequence[RewardFunction], outcomes_NF: list[list[Outcome]], seconds: float) -> Scores:
    import torch  # here, since worker processes import this module and do without torch

    names = tuple(reward.name for reward in rewards)
    values_NF = torch.tensor([[o.value for o in row] for row in outcomes_NF], dtype=torch.float64)
    values_NF = values_NF.reshape(-1, len(names))
    # The weighted sum over the rewards that apply: NaN if one failed (NaN adds up to NaN) or none applies. Held-out
    # rewards, of weight 0, do not count.
    weights_F = torch.tensor([reward.weight for reward in rewards], dtype=torch.float64)
    counts_NF = (values_NF != NOT_APPLICABLE) & (weights_F != 0)
    totals_N = torch.where(counts_NF, values_NF * weights_F, 0.0).sum(1)
    totals_N[~counts_NF.any(1)] = math.nan
    failures: list[RewardFailure] = []
    for n, outcomes in enumerate(outcomes_NF):
        named = zip(names, outcomes, strict=True)
        failures += [RewardFailure(n, name, o.error, o.message, o.traceback) for name, o in named if o.error]
        if not counts_NF[n].any():
            failures.append(RewardFailure(n, "all", "NotApplicable", "no reward applies to this completion"))
    breakdowns = [{name: o.breakdown for name, o in zip(names, row, strict=True) if o.breakdown} for row in outcomes_NF]
    return Scores(names, values_NF, totals_N, breakdowns, failures, seconds)


def _cancel_all(futures: Mapping[int, list[Future[Outcome]]]) -> None:
    # The last first: one that runs would make room, when it is cancelled, for one that waits.
    for future in reversed([future for of_completion in futures.values() for future in of_completion]):
        future.cancel()
