"""What a run does on a GPU, as far as a CPU can show: `benchmarks/gpu/stand_in.py`, check by check.

In a process of its own, since the device that stands in for a GPU is registered with PyTorch for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = (
    "mixed devices are noticed",
    "costs are counted",
    "a model is loaded without accelerate",
    "losses wait for nothing",
    "launches of score in buckets",
    "launches and uploads of score",
    "launches of a token",
    "a step in bf16-mixed",
    "a step in 16-mixed",
    "a step with a reference",
    "a step with an adapter",
    "launches of a step with more groups",
)
LONG_CHECKS = (
    "as on the CPU, a reference, steps as for a graph",
    "as on the CPU, KL in the reward, selected tokens, samples in validation",
    "as on the CPU, an adapter, steps as for a graph",
    "as on the CPU, a device without float64",
)

pytestmark = pytest.mark.slow


Results = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Called with names of checks, or with none for all of them: each one's line by its name."""
    return cache(partial(run_checks, tmp_path_factory))


def run_checks(tmp_path_factory: pytest.TempPathFactory, *names: str) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("stand_in")
    folders = (ROOT, ROOT / "benchmarks" / "gpu", ROOT / "tests")
    environment = {"OUT": str(out), "GPU_CHECK_DEVICE": "cpu", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment["GPU_CHECK_ONLY"] = "|".join(names)
    program = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "stand_in.py")]
    run = subprocess.run(program, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert (out / "results.jsonl").exists(), run.stderr[-2000:]
    lines = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {line["check"].removeprefix("stand-in for a GPU: "): line for line in lines}


@pytest.mark.parametrize("name", CHECKS)
def test_the_stand_in_for_a_gpu_shows(name: str, results: Results) -> None:
    check = results(*CHECKS)[name]
    assert check["state"] == "ok", check["detail"]


@pytest.mark.long  # whole runs, each on both devices
def test_runs_on_the_stand_in_are_those_of_the_cpu(results: Results) -> None:
    everything = results()
    assert tuple(everything) == CHECKS + LONG_CHECKS
    assert {name: everything[name]["detail"] for name in LONG_CHECKS if everything[name]["state"] != "ok"} == {}
