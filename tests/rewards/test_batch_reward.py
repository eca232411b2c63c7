"""Rewards that score a batch in one call: order, failures, and what stands beside them."""

import math
import time

import pytest

from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import BatchReward, Retry, RewardFunction, RewardResult, Scorer, failure_counts
from stateset_lightning.types import Turn


class Lengths(BatchReward):
    """The length of each answer; notes every call."""

    def __init__(self, output=None, **common):
        super().__init__(**common)
        self.output, self.calls = output, []

    def compute_rewards(self, conversations, contexts):
        self.calls.append(
            ([turns[-1].content for turns in conversations], [context["k"] for context in contexts], self.device)
        )
        if isinstance(self.output, Exception):
            raise self.output
        return self.output if self.output is not None else [len(turns[-1].content) for turns in conversations]


class Early(RewardFunction):
    def compute_reward(self, turns, context=None):
        self.begun = time.perf_counter()
        return 1.0


def run(rewards, texts, order=None, device="cpu", columns=None):
    with Scorer(rewards, timeout=None) as scorer:
        session = scorer.start(len(texts), device)
        for n in order or range(len(texts)):
            session.submit(n, [Turn("user", "q"), Turn("assistant", texts[n])], {"k": n, **(columns or {})})
        return session.collect()


def test_one_call_in_the_order_of_completions():
    reward = Lengths()
    scores = run(reward, ["a", "bb", "ccc"], order=[2, 0, 1], device="meta")
    assert scores.totals_N.tolist() == [1, 2, 3]
    assert reward.calls == [(["a", "bb", "ccc"], [0, 1, 2], "meta")]


def test_items_may_be_anything_a_reward_returns_or_an_exception():
    outputs = [RewardResult(2.0, {"part": 1}), None, KeyError("x"), math.nan, "text", 4]
    scores = run([Lengths(outputs), Early(weight=0.5)], ["x"] * 6)
    assert [value for value in scores.totals_N.tolist() if value == value] == [2.5, 0.5, 4.5]
    assert scores.breakdowns[0] == {"lengths": {"part": 1}}
    assert {failure.completion: failure.error for failure in scores.failures} == {
        2: "KeyError",
        3: "RewardError",
        4: "RewardError",
    }


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (RuntimeError("out of memory"), "RuntimeError"),
        ([1.0], "RewardError"),
        (7, "TypeError"),
        (iter([]), "RewardError"),
    ],
)
def test_a_call_that_fails_fails_all(output, error):
    scores = run([Lengths(output), Early()], ["a", "b"])
    assert scores.totals_N.isnan().all()
    assert failure_counts(scores) == {f"reward_failures/lengths/{error}": 2}


def test_a_config_error_ends_the_run():
    with pytest.raises(ConfigError, match="no such model"):
        run(Lengths(ConfigError("no such model")), ["a"])


def test_scenarios_choose_it_as_any_reward():
    reward = Lengths()
    assert run([reward, Early()], ["aa", "b"], columns={"rewards": ["early"]}).totals_N.tolist() == [1, 1]
    assert reward.calls == []


def test_alone_it_is_an_ordinary_reward():
    turns = [Turn("user", "q"), Turn("assistant", "abc")]
    assert Lengths().compute_reward(turns, {"k": 0}) == 3
    with pytest.raises(KeyError):
        Lengths([KeyError("x")]).compute_reward(turns, {"k": 0})
    with pytest.raises(ConfigError, match="'lengths' scores batches: leave Retry out"):
        Retry(Lengths())


def test_a_time_out_is_refused_or_not_applied():
    with pytest.raises(ConfigError, match="timeout=1 of reward 'lengths': it scores a whole batch"):
        Scorer(Lengths(timeout=1))
    with Scorer(Lengths(), timeout=0.01) as scorer:  # the default of the module is for the others
        session = scorer.start(1)
        session.submit(0, [Turn("assistant", "abc")], {"k": 0})
        assert session.collect().totals_N.tolist() == [3]


def test_counts_are_named_after_their_reward():
    class Counting(Early):
        def take_counts(self):
            return {"tokens": 5}

    with Scorer([Counting(name="mine"), Retry(Counting(name="again")), Early()]) as scorer:
        assert scorer.take_counts() == {"cost/mine/tokens": 5, "cost/again/tokens": 5}
