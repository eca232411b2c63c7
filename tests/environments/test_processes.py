"""Environments in processes of their own: what would end the trainer ends one of them."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from environments.harmful import Calls, Harmful, Waits
from module_runs import fit, make_data, make_module, weights

from stateset_lightning import RolloutConfig
from stateset_lightning.environments import EnvironmentConfig, EnvironmentFailure
from stateset_lightning.environments.adapters import Settings, as_environment
from stateset_lightning.environments.processes import HostedDriver, Processes
from stateset_lightning.environments.tools import UserCode
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import EnvironmentReward
from stateset_lightning.workers import WorkerDied


def processes_of(factory: Any, num_processes: int, timeout: float) -> Processes:
    config = EnvironmentConfig(factory, processes=num_processes, timeout=timeout)
    return Processes(config, partial(as_environment, factory, Settings()))


def pid_of(reply: Any) -> int:
    _, pid, _, torch_is_loaded = reply.turns[0].content.split()
    assert torch_is_loaded == "False"
    return int(pid)


@pytest.mark.parametrize(("harm", "says"), [("spins", "no result within 0.5 s"), ("exits", "ended with code 3")])
def test_what_would_end_the_trainer_ends_one_process(harm: str, says: str) -> None:
    processes = processes_of(Harmful, 2, 0.5)
    drivers = [HostedDriver(processes, n, None, UserCode()) for n in range(4)]
    try:
        for n, driver in enumerate(drivers):
            driver.reset({"harm": harm if n == 0 else "raises" if n == 3 else None}, seed=1)
        pids = [pid_of(driver.step("14")) for driver in drivers]
        assert pids[0] == pids[2] != pids[1] == pids[3] != os.getpid()
        with pytest.raises((TimeoutError, WorkerDied), match=says):
            drivers[0].step("14")
        with pytest.raises(EnvironmentFailure, match="was lost when its process ended"):  # it lived beside the first
            drivers[2].step("14")
        with pytest.raises(EnvironmentFailure, match="KeyError: 'target'"):
            drivers[3].step("14")
        assert drivers[1].step("14").done
        drivers[2].reset({"harm": None}, seed=1)  # in a fresh process
        assert drivers[2].step("14").reward == drivers[2].get_reward() == 1.0
    finally:
        processes.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[1], 0)
    drivers[1].close()


def test_waiting_for_a_process_is_not_the_environments_time() -> None:
    processes = processes_of(Waits, 1, 0.9)
    try:
        for n in range(4):
            HostedDriver(processes, n, None, UserCode()).reset({"harm": None}, seed=1)
        calls = [processes.submit(n, "step", "14") for n in range(4)]  # the last one waits for 1.5 s
        assert [call.result().reward for call in calls] == [1.0] * 4
    finally:
        processes.close()


def test_environments_are_closed_before_their_process_ends(tmp_path: Path) -> None:
    processes = processes_of(Harmful, 1, 5)
    for n in range(3):
        HostedDriver(processes, n, None, UserCode()).reset({"harm": str(tmp_path / "file")}, seed=1)
    driver = HostedDriver(processes, 0, None, UserCode())
    thread = driver.code.submit(threading.current_thread).result(10)
    driver.close()
    thread.join(10)
    assert not thread.is_alive()
    processes.close()
    assert (tmp_path / "file").read_text() == "closed\n" * 3


def test_a_run_goes_on_beside_a_process_that_ends(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {a} + 4?", "harm": harm} for a, harm in ((3, None), (5, "exits at once"))]
    options = {"validation": None, "shuffle": False, "num_iterations": 1}

    def run(rows: list[Any], processes: int) -> tuple[dict[str, torch.Tensor], float]:
        environment = EnvironmentConfig(Harmful, max_turns=2, processes=processes)
        rollout = RolloutConfig(num_generations=2, max_new_tokens=12)
        module = make_module(
            environment=environment, reward=EnvironmentReward(), max_reward_failures=1.0, rollout=rollout
        )
        trainer = fit(tmp_path, module, make_data(train=rows, batch_size=len(rows), **options), max_steps=1)
        return weights(trainer), module.metrics.last.get("conversation/ended_by_failure", 0.0)

    beside, failed = run(rows, processes=4)
    left_out, none = run(rows[:1], processes=0)
    assert (failed, none) == (0.5, 0.0)
    assert all(torch.equal(beside[name], value) for name, value in left_out.items())


def test_tools_are_called_in_the_process_and_one_that_ends_it_ends_no_other() -> None:
    processes = processes_of({"sums": Calls}, 2, 60)
    call = '<tool_call>{{"name": "{}", "arguments": {}}}</tool_call>'
    drivers = [HostedDriver(processes, n, None, UserCode()) for n in range(2)]
    try:
        for driver in drivers:
            driver.reset({"harm": None, "environment": "sums"}, seed=1)
            assert [schema["function"]["name"] for schema in driver.schemas] == ["add", "leave"]
        reply = drivers[0].step(call.format("add", '{"a": 2, "b": 3}') + call.format("add", "{"))
        first, second = (turn.content for turn in reply.turns)
        assert (first, second.startswith("error: this tool call is malformed")) == ("5", True)
        assert reply.counts == {"tool_calls": 1, "malformed_calls": 1, "tool_errors": 0, "tool_timeouts": 0}
        with pytest.raises(WorkerDied, match="ended with code 4"):
            drivers[0].step(call.format("leave", "{}"))
        assert drivers[1].step("12").turns[0].content.startswith("pid ")
    finally:
        processes.close()


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"factory runs in a worker process.*cannot be pickled.*leave model\.env"):
        processes_of(lambda: Harmful(), 1, 5)
