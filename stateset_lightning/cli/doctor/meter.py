"""Seconds and peak memory of a phase of an episode; running out of either is a result.

Memory is what is allocated on a CUDA device, and elsewhere what is resident of the whole process.
"""

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from stateset_lightning.training.metrics import peak_memory_mb

# Seconds after which a phase is stopped: a large model on a CPU must not take hours.
LIMIT = 120.0

# The phases, and what to change where one runs out of memory.
#
# `log-probs`: the reference's and the old ones, computed once per episode; `training`: forward and backward of a
# micro-step; `update`: the optimizer's step.
REMEDIES = {
    "load": "set model.policy.lora (no second model for a reference) or trainer.precision, or choose a smaller model",
    "sampling": "lower model.rollout.max_batch_rows or model.rollout.max_new_tokens",
    "scoring": "lower data.batch_size, or use a smaller reward model",
    "log-probs": "lower model.rollout.max_new_tokens or data.max_prompt_tokens",
    "training": "raise data.steps_per_episode and trainer.accumulate_grad_batches alike, or set"
    " model.policy.gradient_checkpointing or model.policy.lora",
    "update": "set model.policy.lora, or choose an optimizer with less state",
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """Seconds, and peak memory in MB. `stopped`: the limit was reached, so both are lower bounds."""

    seconds: float
    peak_mb: float
    stopped: bool


class TooSlow(Exception):
    """A phase takes longer than its limit."""


class Meter:
    """Runs phases, prints what each costs, and keeps it in `costs` by (case, phase).

    Args:
        device: The one whose memory counts.
        problems: Gets a line for each phase that runs out of memory.
    """

    def __init__(self, device: torch.device, problems: list[str]) -> None:
        self.device = device
        self.problems = problems
        self.costs: dict[tuple[str, str], Cost] = {}

    def run(self, case: str, phase: str, work: Callable[[], Result], limit: float | None = None) -> Result | None:
        """The result of `work`; None if it was stopped or ran out of memory.

        It is stopped by a signal: when the operation that runs has ended, which may be a backward pass.

        Args:
            case: Which sizes are measured, in a word.
            phase: A key of `REMEDIES`.
            work: Called once, in the main thread.
            limit: Seconds, by default `LIMIT`; 0 for none.
        """

        def stop(*_: Any) -> None:
            raise TooSlow

        result, stopped = None, False
        garbage_collection_cuda()
        reset_peak_memory(self.device)
        before = signal.signal(signal.SIGALRM, stop)
        start = time.perf_counter()
        try:
            signal.setitimer(signal.ITIMER_REAL, LIMIT if limit is None else limit)
            result = work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except TooSlow:
            stopped = True
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            self.problems.append(f"out of memory on {self.device}, {case}, {phase}: {REMEDIES[phase]}")
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        seconds, peak = time.perf_counter() - start, peak_memory_mb(self.device)
        self.costs[case, phase] = Cost(seconds, peak, stopped)
        print(f"  {case:11} {phase:9} {'> ' * stopped}{seconds:,.2f} s, {peak:,.1f} MB", flush=True)
        return result


def reset_peak_memory(device: torch.device) -> None:
    """Begins a new peak, where the system can: a process outside Linux has one peak since its start."""
    if device.type == "cuda":
        torch.cuda.init()  # before it there are no statistics to reset
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc_pid_clear_refs(5)
