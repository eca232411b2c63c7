"""The short form of `benchmarks/hostile`: twenty hostile cases that hold, and some that do not; all: `make hostile`."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stateset_lightning.rewards.functions import alarm_in, written

HARNESS = Path(__file__).parents[1] / "benchmarks" / "hostile" / "hostile.py"
SEEDS = {
    "rewards": (0, 4, 6, 12, 22),
    "servers": (3, 5, 11),
    "files": (1, 2, 5, 6, 15, 20, 45),
    "signals": (10, 20),
    "disks": (0, 1),
    "whole": (11,),
}
CASES = [f"{kind}:{seed}" for kind, seeds in SEEDS.items() for seed in seeds]
BROKEN = {
    "broken:0": "exit code 2, and not one of",
    "broken:1": "a traceback: .*RuntimeError: a mistake of ours",
    "broken:2": "the secret of DB_PASSWORD is in output",
    "broken:3": "the secret of api_key is in work/runs/header.txt",
    "broken:4": "work/rows.jsonl: was changed or left",
    "broken:5": "executed: was changed or left",
    "broken:6": "work/config.yaml: is gone",
}
"""What the harness has to find, and says of it."""


@pytest.fixture(scope="module")
def printed() -> str:
    """What the harness says of all of them."""
    command = [sys.executable, str(HARNESS), "--only", ",".join([*CASES, *BROKEN]), "--slack", "5"]
    environment = {**os.environ, "PYTHONPATH": str(HARNESS.parents[2])}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert f"{len(CASES) + len(BROKEN)} cases: " in run.stdout, run.stdout + run.stderr[-3000:]
    return run.stdout


def said_of(case: str, printed: str) -> str:
    """What is wrong with a case; empty if nothing is."""
    found = re.search(rf"^{case} FAILS.*?\n  again: .*?$", printed, re.MULTILINE | re.DOTALL)
    return found[0] if found else ""


@pytest.mark.parametrize("name", ["Hostile", "HostileAsync"])
def test_hostile_rewards_run_as_they_are_asked_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is found to set alarms would get a process, or be refused."""
    monkeypatch.syspath_prepend(HARNESS.parent)
    rewards = importlib.import_module("hostile_rewards")
    assert alarm_in(written(getattr(rewards, name)("never_ends"))) == ""


@pytest.mark.slow  # imports torch and Lightning, and starts some thirty commands
@pytest.mark.parametrize("case", CASES)
def test_a_hostile_case_holds(case: str, printed: str) -> None:
    assert not said_of(case, printed)


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_hold_is_found(case: str, printed: str) -> None:
    assert re.search(BROKEN[case], said_of(case, printed))
