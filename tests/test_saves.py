"""The short form of `benchmarks/saves.py`: some ways to save, stopped at some moments; all: `make saves-test`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow  # some thirty short runs, and an import of torch and lightning
def test_no_step_is_lost_whatever_is_saved_and_whenever_the_run_is_stopped() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/saves.py", "--cases", "6", "--config-cases", "2", "--seed", "5"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-3000:]
    assert "8 cases: " in run.stdout
    assert "all of them hold" in run.stdout
