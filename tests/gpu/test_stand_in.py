"""What a run does on a GPU, as far as a CPU can show: `benchmarks/gpu/stand_in.py`, check by check.

In a process of its own, since the device that stands in for a GPU is registered with PyTorch for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    "as on the CPU, a reference, steps as for a graph",
    "as on the CPU, KL in the reward, selected tokens, samples in validation",
    "as on the CPU, an adapter, steps as for a graph",
    "as on the CPU, a device without float64",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each check's line by its name."""
    out = tmp_path_factory.mktemp("stand_in")
    folders = (ROOT, ROOT / "benchmarks" / "gpu", ROOT / "tests")
    environment = {"OUT": str(out), "GPU_CHECK_DEVICE": "cpu", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    program = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "stand_in.py")]
    run = subprocess.run(program, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert (out / "results.jsonl").exists(), run.stderr[-2000:]
    lines = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {line["check"].removeprefix("stand-in for a GPU: "): line for line in lines}


@pytest.mark.parametrize("name", CHECKS)
def test_the_stand_in_for_a_gpu_shows(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[name]["state"] == "ok", results[name]["detail"]


def test_no_check_is_forgotten(results: dict[str, dict[str, Any]]) -> None:
    assert tuple(results) == CHECKS
