"""Retries: how often, how long between, after what, and what comes out in the end."""

import asyncio
import pickle
import time

import pytest
from timing import within

from stateset_lightning.cli import main
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import ExactMatch, FunctionReward, Retry, RewardFunction, Scorer, failure_counts
from stateset_lightning.rewards.interface import is_async
from stateset_lightning.types import Turn

TURNS = [Turn("user", "q"), Turn("assistant", "x")]


class RateLimitError(Exception):
    pass


class Flaky(RewardFunction):
    """Fails `failures` times, then scores 0.5."""

    def __init__(self, failures=2, error=ConnectionResetError, **options):
        super().__init__(**options)
        self.failures, self.error, self.calls = failures, error, 0

    def compute_reward(self, turns, context=None):
        self.calls += 1
        turns.clear()  # what an attempt does to its arguments must not reach the next
        if self.calls <= self.failures:
            raise self.error(f"call {self.calls}")
        return 0.5


class AsyncFlaky(Flaky):
    async def compute_reward(self, turns, context=None):
        await asyncio.sleep(0)
        return super().compute_reward(turns, context)


class LaterFlaky(Flaky):
    """A `def` that returns an awaitable."""

    def compute_reward(self, turns, context=None):
        return self._later(turns, context)

    async def _later(self, turns, context):
        return super().compute_reward(turns, context)


@pytest.fixture
def waits(monkeypatch):
    """The waits that are asked for, none of which takes time."""
    asked = []
    sleep = asyncio.sleep

    async def no_time(seconds, result=None):
        if seconds:
            asked.append(seconds)
        await sleep(0)

    monkeypatch.setattr(time, "sleep", asked.append)
    monkeypatch.setattr(asyncio, "sleep", no_time)
    return asked


def run(reward, completions=1):
    with Scorer(reward) as scorer:
        session = scorer.start(completions)
        for n in range(completions):
            session.submit(n, TURNS, {"target": "x"})
        return session.collect()


@pytest.mark.parametrize("kind", [Flaky, AsyncFlaky, LaterFlaky])
def test_it_tries_again_and_waits_twice_as_long_each_time(kind, waits):
    flaky = kind(failures=4)
    scores = run(Retry(flaky, retries=4, backoff=1.0, max_wait=5.0))
    assert scores.totals_N.tolist() == [0.5]
    assert flaky.calls == 5
    assert waits == [1.0, 2.0, 4.0, 5.0]


@pytest.mark.parametrize("kind", [Flaky, AsyncFlaky, LaterFlaky])
def test_the_last_failure_fails_the_completion_under_its_own_name(kind, waits):
    flaky = kind(failures=9, name="judge")
    scores = run(Retry(flaky, retries=2))
    assert scores.totals_N.isnan().all()
    assert flaky.calls == 3
    assert failure_counts(scores) == {"reward_failures/judge/ConnectionResetError": 1}
    assert scores.failures[0].message == "call 3"


@pytest.mark.parametrize("kind", [Flaky, AsyncFlaky, LaterFlaky])
def test_other_exceptions_are_not_tried_again(kind, waits):
    flaky = kind(failures=1, error=KeyError)
    assert failure_counts(run(Retry(flaky))) == {f"reward_failures/{flaky.name}/KeyError": 1}
    assert (flaky.calls, waits) == (1, [])


@pytest.mark.parametrize("name", ["RateLimitError", "test_retry.RateLimitError", "Exception"])
def test_exceptions_of_a_library_are_named(name, waits):
    RateLimitError.__module__ = "test_retry"
    flaky = Flaky(failures=1, error=RateLimitError)
    assert run(Retry(flaky, exceptions=[name])).totals_N.tolist() == [0.5]
    assert failure_counts(run(Retry(Flaky(failures=1, error=RateLimitError), exceptions=["other.RateLimitError"])))


def test_a_wrong_score_is_no_reason_to_try_again():
    calls = []

    def text(turns, context):
        calls.append(1)
        return "good"

    assert failure_counts(run(Retry(FunctionReward(text), exceptions=["Exception"]))) == {
        "reward_failures/text/RewardError": 1
    }
    assert len(calls) == 1


def test_name_weight_and_time_out_are_the_rewards_own():
    inner = Flaky(weight=0.25, name="judge", timeout=3.0)
    outer = Retry(inner)
    assert (outer.name, outer.weight, outer.timeout) == ("judge", 0.25, 3.0)
    assert (Retry(inner, name="again", weight=0.0, timeout=9).name, Retry(inner, weight=0.0).weight) == ("again", 0.0)
    assert not is_async(outer)
    assert is_async(Retry(AsyncFlaky()))


def test_the_time_out_covers_all_attempts():
    scores = within(2, lambda: run(Retry(AsyncFlaky(failures=99), backoff=0.05, retries=99, timeout=0.2)))
    assert failure_counts(scores) == {"reward_failures/async_flaky/TimeoutError": 1}


def test_async_waits_hold_up_nobody():
    def eight():
        return run([Retry(AsyncFlaky(failures=1, name=str(i)), backoff=0.1) for i in range(8)])

    assert within(0.6, eight).totals_N.tolist() == [4.0]  # 0.8 one after the other


def test_it_runs_in_a_worker_process_where_it_has_a_time_out():
    retry = Retry(ExactMatch(), timeout=20)
    assert pickle.loads(pickle.dumps(retry)).retries == 3
    assert run(retry).totals_N.tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "retries=-1 of reward 'flaky' must be at least 0"),
        ({"backoff": 0}, "backoff=0 .* above 0"),
        ({"exceptions": []}, "must be a list of exception names"),
        ({"exceptions": "TimeoutError"}, "must be a list of exception names"),
        ({"exceptions": [TimeoutError]}, "write the name of the type"),
        ({"exceptions": ["KeyboardInterrupt"]}, "no exception that a reward may survive"),
        ({"exceptions": ["print"]}, "no exception"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Retry(Flaky(), **options)


def test_it_stands_in_a_config(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest"])
    (tmp_path / "c.yaml").write_text(
        "model:\n  policy: {model_name: tiny}\n  reward:\n    - class_path: stateset_lightning.rewards.Retry\n     "
        " init_args:\n        reward: {class_path: stateset_lightning.rewards.ExactMatch}\n        retries: 5\n       "
        " exceptions: [TimeoutError]\n"
    )
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(tmp_path / "c.yaml"), "--print_config"])
    assert exit_.value.code == 0
    assert "retries: 5" in capsys.readouterr().out
