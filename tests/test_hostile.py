"""The short form of `benchmarks/hostile`: twenty hostile cases, each of which holds; all: `make hostile`."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "hostile"
CASES = {
    "rewards": (),
    "servers": (),
    "files": (),
    "signals": (),
    "disks": (),
    "whole": (),
}
"""Kind -> seeds."""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the harness says of all of them."""
    names = ",".join(f"{kind}:{seed}" for kind, seeds in CASES.items() for seed in seeds)
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, str(FOLDER / "hostile.py"), "--only", names, "--slack", "5", "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert f"{sum(map(len, CASES.values()))} cases: " in run.stdout, run.stdout + run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow  # imports torch and Lightning, and starts some forty commands
@pytest.mark.parametrize("case", [f"{kind}:{seed}" for kind, seeds in CASES.items() for seed in seeds])
def test_a_hostile_case_holds(case: str, printed: str) -> None:
    said = re.search(rf"^{case} FAILS.*?\n  again: .*?$", printed, re.MULTILINE | re.DOTALL)
    assert said is None, said and said[0]
