"""What the parts of the GPU check share: where they run, a clock, and one line per check.

Environment: GPU_CHECK_DEVICE (cuda; cpu for a rehearsal with small sizes), GPU_CHECK_SECONDS (time of a part: checks
that would not fit are skipped), GPU_CHECK_ONLY (words between |: checks that have one in their name), OUT (folder of
results.jsonl, errors.txt and profiles).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu_check")
DEVICE = torch.device(os.environ.get("GPU_CHECK_DEVICE", "cuda"))
IS_GPU = DEVICE.type == "cuda"
ACCELERATOR = "gpu" if IS_GPU else "cpu"
BARE_RUN: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}
"""Options of a Trainer that leaves and prints nothing."""
FAILED: list[str] = []
_ONLY = os.environ.get("GPU_CHECK_ONLY", "").split("|")
_DEADLINE = time.monotonic() + float(os.environ.get("GPU_CHECK_SECONDS", "inf"))


def sync() -> None:
    """Waits until the device has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def append(name: str, text: str) -> None:
    """Adds a line to a file of OUT."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / name).open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def record(**values: Any) -> None:
    """Adds a measurement to results.jsonl."""
    append("results.jsonl", json.dumps(values, default=str))


def machine() -> str:
    """The card, and versions of what a difference could come from; recorded, too."""
    if IS_GPU:
        found = torch.cuda.get_device_properties(0)
        memory = f"{found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}"
        card = f"{found.name}, {memory}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    else:
        card = f"a CPU ({platform.machine()}), a rehearsal with small sizes"
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "lightning", "trl", "vllm"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    record(machine=card, date=date.today().isoformat(), versions=versions)
    return f"{card}; {', '.join(' '.join(pair) for pair in versions.items())}"


def check(name: str, function: Callable[[], str | None], seconds: float = 0.0) -> None:
    """Runs a check and prints one line; whatever happens in it, the next one runs.

    Args:
        name: What is checked.
        function: Returns what is to be printed; an AssertionError is a failure, any other exception an error.
        seconds: What it takes, roughly; skipped where less is left.
    """
    if not any(word in name for word in _ONLY):
        return
    start = time.monotonic()
    if _DEADLINE - start < seconds:
        state, detail = "SKIP", f"{_DEADLINE - start:.0f} s left, needs {seconds:.0f}"
    else:
        try:
            state, detail = "ok", function() or ""
            sync()
        except AssertionError as failure:
            state, detail = "FAIL", str(failure)
        except Exception as error:
            state, detail = "ERROR", f"{type(error).__name__}: {error}"[:600]
            append("errors.txt", f"== {name}\n{traceback.format_exc()}")
    if state in ("FAIL", "ERROR"):
        FAILED.append(name)
    if IS_GPU:
        torch.cuda.empty_cache()
    spent = time.monotonic() - start
    print(f"{state:5} {name} [{spent:.1f} s] {detail}", flush=True)
    record(check=name, state=state, detail=detail, seconds=round(spent, 2))


def exit_status() -> int:
    """1 if a check failed; says which."""
    if FAILED:
        print(f"failed: {'; '.join(FAILED)}", flush=True)
    return int(bool(FAILED))


def timed(function: Callable[[], Any], repeats: int = 3, warm_up: int = 1) -> float:
    """Median seconds of a call, the device's work included."""
    times = []
    for _ in range(warm_up + repeats):
        sync()
        start = time.perf_counter()
        function()
        sync()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def peak_gib() -> float:
    """Peak of the device's memory since `reset_peak`; 0 on a CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if IS_GPU else 0.0


def reset_peak() -> None:
    if IS_GPU:
        torch.cuda.reset_peak_memory_stats()
