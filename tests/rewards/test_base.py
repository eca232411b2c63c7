"""The reward interface: names, what built-in rewards read, what counts as a score and what as a failure."""

import asyncio
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from stateset_lightning.errors import DataError, RewardError
from stateset_lightning.rewards import FunctionReward, RewardFunction, RewardResult
from stateset_lightning.rewards.base import (
    call,
    call_async,
    completion,
    snake_case,
    target_of,
    target_texts,
    to_outcome,
)
from stateset_lightning.types import NOT_APPLICABLE, Turn


class CustomSingleTurnReward(RewardFunction):  # the guide's, word for word
    async def compute_reward(self, turns, context=None):
        # Custom logic for single-turn scoring
        response = turns[-1].get("content", "") if turns else ""
        score = len(response) / 100.0  # Example: reward longer responses

        return RewardResult(score=min(1.0, score), breakdown={"length": len(response)}, metadata={"type": "custom"})


class OwnInit(RewardFunction):
    def __init__(self, letters):
        self.letters = letters

    def compute_reward(self, turns, context=None):
        return 1.0


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("CustomSingleTurnReward", "custom_single_turn"),
        ("JSONValid", "json_valid"),
        ("NumericAnswer", "numeric_answer"),
        ("Reward", "reward"),
    ],
)
def test_names_are_snake_case_without_the_suffix(class_name, name):
    assert snake_case(class_name) == name


def test_a_subclass_needs_no_super_init():
    reward = OwnInit("abc")
    assert (reward.weight, reward.timeout, reward.name, reward.letters) == (1.0, None, "own_init", "abc")
    reward.name = "mine"
    assert reward.name == "mine"


def test_constructor_sets_weight_name_and_timeout():
    reward = CustomSingleTurnReward(weight=0.5, name="length", timeout=3)
    assert (reward.weight, reward.name, reward.timeout) == (0.5, "length", 3)


def test_the_completion_is_the_last_turn():
    turns = [Turn("user", "one"), Turn("assistant", "a"), Turn("user", "two"), Turn("assistant", "b")]
    assert (completion(turns), completion([])) == ("b", "")
    assert completion([{"role": "assistant", "content": "as a mapping"}]) == "as a mapping"


def test_a_missing_target_is_a_data_error():
    with pytest.raises(
        DataError, match="reward 'exact_match' needs an answer, but target=None of scenario 'q7' is missing"
    ):
        target_of({"id": "q7", "target": None}, "exact_match", list, "is empty")
    with pytest.raises(DataError, match="add the column, or leave this reward out of the row's 'rewards'"):
        target_of(None, "exact_match", list, "is empty")


def test_a_target_that_cannot_be_used_is_shown():
    with pytest.raises(DataError) as caught:
        target_of({"id": "q7", "target": "x"}, "numeric", lambda target: [], "holds no number")
    assert str(caught.value) == "reward 'numeric' needs an answer, but target='x' of scenario 'q7' holds no number"
    assert target_of({"target": "x"}, "numeric", lambda target: [target, 2], "holds no number") == ["x", 2]


def test_targets_are_texts():
    assert target_texts({"target": 72}, "r") == ["72"]
    assert target_texts({"target": ("a", 1)}, "r") == ["a", "1"]
    with pytest.raises(DataError, match="empty"):
        target_texts({"target": []}, "r")


@pytest.mark.parametrize(
    ("output", "value"),
    [
        (0.5, 0.5),
        (2, 2.0),
        (True, 1.0),
        (False, 0.0),
        (None, NOT_APPLICABLE),
        (np.float32(0.25), 0.25),
        (np.int64(3), 3.0),
        (torch.tensor(0.75), 0.75),
        (torch.tensor([0.5]), 0.5),
        (Fraction(1, 4), 0.25),
        (Decimal("0.5"), 0.5),
        (RewardResult(0.1), 0.1),
        (RewardResult(np.float64(0.1)), 0.1),
    ],
)
def test_numbers_are_scores(output, value):
    assert to_outcome(output).value == value


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (math.nan, "returned nan, which is no finite"),
        (math.inf, "returned inf"),
        (-math.inf, "returned -inf"),
        (1e39, "no finite float32 number"),
        (10**400, "no finite number"),
        ("0.5", "returned the str '0.5', which is no number"),
        (np.str_("0.5"), "which is no number"),
        (b"1", "returned the bytes"),
        (1j, "complex"),
        ([1.0], "list"),
        ({}, "dict"),
        (torch.tensor([1.0, 2.0]), "Tensor"),
        (torch.tensor(math.nan), "returned nan"),
        (RewardResult(math.nan), "returned nan"),
        (RewardResult(None), "or None"),
    ],
)
def test_anything_else_is_a_failure_with_its_reason(output, message):
    outcome = call(FunctionReward(lambda turns, context: output), [], {})
    assert math.isnan(outcome.value)
    assert outcome.error == "RewardError"
    assert message in outcome.message
    with pytest.raises(RewardError):
        to_outcome(output)


def raising(turns, context):
    raise KeyError("missing")


def exiting(turns, context):
    raise SystemExit(3)


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError


def unprintable(turns, context):
    raise Unprintable


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (raising, "KeyError", "'missing'"),
        (exiting, "SystemExit", "3"),
        (unprintable, "Unprintable", "str() failed"),
    ],
)
def test_exceptions_are_failures_with_a_traceback(function, error, message):
    outcome = call(FunctionReward(function), [], {})
    assert math.isnan(outcome.value)
    assert outcome.error == error
    assert message in outcome.message
    assert f"in {function.__name__}" in outcome.traceback


def test_an_awaitable_of_a_def_reward_is_awaited():
    async def later():
        await asyncio.sleep(0)
        return RewardResult(0.5, {"part": 1})

    outcome = asyncio.run(call(FunctionReward(lambda turns, context: later()), [], {}))
    assert (outcome.value, outcome.breakdown) == (0.5, {"part": 1})


def test_async_rewards_fail_alike():
    async def exits(turns, context):
        raise SystemExit

    assert asyncio.run(call_async(FunctionReward(exits), [], {})).error == "SystemExit"
    assert asyncio.run(call_async(FunctionReward(lambda turns: turns(1)), [], {})).error == "TypeError"
