"""What counts as a score and what as a failure."""

import asyncio
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from stateset_lightning.errors import RewardError
from stateset_lightning.rewards.base import FunctionReward, RewardResult
from stateset_lightning.rewards.outcome import evaluate, evaluate_async, to_outcome
from stateset_lightning.types import NOT_APPLICABLE


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
        (RewardResult(None), "return None itself"),
    ],
)
def test_anything_else_is_a_failure_with_its_reason(output, message):
    outcome = evaluate(FunctionReward(lambda turns, context: output), [], {}, asyncio.run)
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
        (unprintable, "Unprintable", "could not be printed"),
    ],
)
def test_exceptions_are_failures_with_a_traceback(function, error, message):
    outcome = evaluate(FunctionReward(function), [], {}, asyncio.run)
    assert math.isnan(outcome.value)
    assert outcome.error == error
    assert message in outcome.message
    assert f"in {function.__name__}" in outcome.traceback


def test_an_awaitable_of_a_def_reward_is_awaited():
    async def later():
        await asyncio.sleep(0)
        return RewardResult(0.5, {"part": 1})

    outcome = evaluate(FunctionReward(lambda turns, context: later()), [], {}, asyncio.run)
    assert (outcome.value, outcome.breakdown) == (0.5, {"part": 1})


def test_async_rewards_fail_alike():
    async def exits(turns, context):
        raise SystemExit

    assert asyncio.run(evaluate_async(FunctionReward(exits), [], {})).error == "SystemExit"
    assert asyncio.run(evaluate_async(FunctionReward(lambda: None), [], {})).error == "TypeError"
