"""Environments that do what they should not: none of it trains, and none of it changes what the others train."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from module_runs import fit, make_data, make_module, weights

from stateset_lightning.environments import EnvironmentConfig
from stateset_lightning.rewards import EnvironmentReward

HONEST = [{"prompt": f"What is {a} + 4?", "is_honest": True} for a in (3, 5)]
BROKEN = [{"prompt": f"What is {a} + 9?", "is_honest": False} for a in (4, 6)]


class Honest:
    """Asks for one more sum, and gives 1 for each answer with an even digit."""

    asks = 1

    def reset(self, scenario: Mapping[str, Any], seed: int) -> Any:
        self.asked = 0

    def step(self, text: str) -> Any:
        self.asked += 1
        return "What is 5 + 9?", float(any(c in "02468" for c in text)), self.asked > self.asks


class Leaves(BaseException):
    """No `Exception`, as what a signal raises."""


def fail(how: str) -> Any:
    match how:
        case "hangs":
            time.sleep(1.5)
        case "raises":
            raise RuntimeError("no more sums")
        case "exits":
            raise SystemExit(3)
        case "leaves":
            raise Leaves
    return None


async def hang(*_: Any) -> None:
    try:
        await asyncio.sleep(20)
    finally:
        Broken.cancelled += 1


class Broken(Honest):
    """Does one thing wrong, in one of its methods; well-behaved where the scenario says so."""

    cancelled: ClassVar[int] = 0

    def __init__(self, method: str, wrong: Any) -> None:
        self.method, self.wrong = method, wrong

    def _wrong(self, method: str) -> bool:
        return method == self.method and not self.scenario["is_honest"]

    def reset(self, scenario: Mapping[str, Any], seed: int) -> Any:
        self.scenario = scenario
        super().reset(scenario, seed)
        return self.wrong() if self._wrong("reset") else None

    def step(self, text: str) -> Any:
        return self.wrong() if self._wrong("step") else super().step(text)


class Scored(Broken):
    def get_reward(self) -> Any:
        return self.wrong() if self._wrong("get_reward") else float(self.asked)


FAILURES = {
    "hangs": lambda: fail("hangs"),
    "hangs and is async": hang,
    "raises": lambda: fail("raises"),
    "exits": lambda: fail("exits"),
    "leaves": lambda: fail("leaves"),
    "returns an object": object,
}
STEPS = {
    "returns nothing": lambda: None,
    "returns a text alone": lambda: "What is 1 + 1?",
    "returns too little": lambda: ("What is 1 + 1?", 1.0),
    "replies with a number": lambda: (5, 1.0, False),
    "replies as the assistant": lambda: ([{"role": "assistant", "content": "14"}], 1.0, False),
    "gives NaN": lambda: ("What is 1 + 1?", float("nan"), False),
    "gives a text as the reward": lambda: (None, "much", True),
    "is done in a word": lambda: ("What is 1 + 1?", 1.0, "no"),
    "is done by a number": lambda: (None, 1.0, 1),
    "is not done, without a reply": lambda: (None, 1.0, False),
    "is not done, with no turns": lambda: ([], 1.0, False),
}
REWARDS = {"gives NaN": lambda: float("nan"), "gives inf": lambda: float("inf"), "gives a text": lambda: "much"}
CASES = {
    f"{method} {what}": (method, wrong)
    for method, more in (("reset", {}), ("step", STEPS), ("get_reward", REWARDS))
    for what, wrong in {**FAILURES, **more}.items()
}


def run(folder: Path, factory: Any, rows: list[dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
    environment = EnvironmentConfig(factory, **{"max_turns": 3, "timeout": 0.5, **options})
    module = make_module(environment=environment, reward=EnvironmentReward(), max_reward_failures=1.0)
    data = make_data(train=rows, validation=None, batch_size=len(rows), shuffle=False)
    return weights(fit(folder, module, data, max_steps=1))


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> dict[type, dict[str, torch.Tensor]]:
    """Weights of runs without the scenarios whose environments fail."""
    folder = tmp_path_factory.mktemp("left-out")
    return {kind: run(folder, lambda kind=kind: kind("", None), HONEST) for kind in (Broken, Scored)}


@pytest.mark.parametrize("case", CASES)
def test_an_environment_that_fails_trains_as_if_its_conversations_were_left_out(
    tmp_path: Path, left_out: dict[type, dict[str, torch.Tensor]], case: str
) -> None:
    kind, cancelled = (Scored if case.startswith("get_reward") else Broken), Broken.cancelled
    trained = run(tmp_path, lambda: kind(*CASES[case]), HONEST + BROKEN)
    differ = [name for name, value in left_out[kind].items() if not torch.equal(trained[name], value)]
    assert not differ
    if "async" in case:
        assert Broken.cancelled == cancelled + 8  # at the time-out, all conversations of both scenarios


def test_where_all_environments_fail_nothing_trains(tmp_path: Path) -> None:
    untrained = make_module()
    untrained.configure_model()
    assert untrained.policy is not None
    for case in ("step raises", "get_reward gives NaN", "step is not done, without a reply"):
        kind = Scored if case.startswith("get_reward") else Broken
        trained = run(tmp_path, lambda kind=kind, case=case: kind(*CASES[case]), BROKEN)
        assert all(torch.equal(trained[f"policy.{name}"], p) for name, p in untrained.policy.named_parameters())


class NeverEnds(Honest):
    asks = 10**9


class RepliesAtTheEnd(Honest):
    """Is done with a reply, and would be done again."""

    late: ClassVar[list[str]] = []

    def step(self, text: str) -> Any:
        reply, reward, done = super().step(text)
        if self.asked > self.asks + 1:
            self.late.append(text)
        return [{"role": "tool", "content": "5"}, {"role": "user", "content": reply}], reward, done


class EndsSilently(Honest):
    def step(self, text: str) -> Any:
        reply, reward, done = super().step(text)
        turns = [{"role": "tool", "content": "5"}, {"role": "user", "content": reply}]
        return (None if done else turns), reward, done


@pytest.mark.parametrize(
    ("factory", "honest"),
    [(NeverEnds, Honest), (RepliesAtTheEnd, EndsSilently)],
    ids=["never ends", "is done with a reply"],
)
def test_what_an_environment_says_beyond_the_end_changes_nothing(tmp_path: Path, factory: Any, honest: Any) -> None:
    RepliesAtTheEnd.late.clear()
    trained = run(tmp_path, factory, HONEST, max_turns=2)
    assert all(torch.equal(trained[name], value) for name, value in run(tmp_path, honest, HONEST, max_turns=2).items())
    assert not RepliesAtTheEnd.late


class BeginsLate(Honest):
    begun, closed = threading.Event(), threading.Event()

    def reset(self, scenario: Mapping[str, Any], seed: int) -> Any:
        self.begun.wait(10)

    def close(self) -> None:
        assert self.begun.is_set()
        self.closed.set()


def test_an_environment_that_begins_after_its_time_out_is_closed(tmp_path: Path) -> None:
    run(tmp_path, BeginsLate, BROKEN)
    assert not BeginsLate.closed.is_set()
    BeginsLate.begun.set()
    assert BeginsLate.closed.wait(5)
