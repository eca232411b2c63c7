"""Seconds and peak memory of a phase, and the two ways in which it does not end: out of memory, out of time."""

import signal
import sys
import time

import pytest
import torch

from stateset_lightning.cli.doctor import measure
from stateset_lightning.cli.doctor.measure import Meter

CPU = torch.device("cpu")


def fill(megabytes):
    """Touches so much memory, and lets it go."""
    return torch.ones(megabytes * 2**20, dtype=torch.uint8).max()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux alone")
def test_each_phase_has_a_peak_of_its_own():
    meter = Meter(CPU, [])
    for case, megabytes in (("small", 1), ("large", 200), ("small again", 1)):
        meter.run(case, "training", lambda megabytes=megabytes: fill(megabytes))
    peaks = {case: peak for (case, _), (_, peak, _) in meter.costs.items()}
    assert 180 < peaks["large"] - peaks["small"] < 300
    assert peaks["small again"] - peaks["small"] < 100


def test_the_result_and_the_seconds_are_those_of_the_work(capsys):
    meter = Meter(CPU, [])
    assert meter.run("as sampled", "scoring", lambda: time.sleep(0.3) or 7) == 7
    seconds, peak_mb, stopped = meter.costs["as sampled", "scoring"]
    assert 0.3 <= seconds < 3
    assert not stopped
    assert f"as sampled  scoring   {seconds:.2f} s, {peak_mb:,.1f} MB" in capsys.readouterr().out


def test_running_out_of_memory_is_a_problem_that_says_what_to_lower():
    problems = []
    meter = Meter(CPU, problems)
    assert meter.run("worst case", "sampling", lambda: torch.empty(2**52)) is None
    assert problems == [
        "out of memory on cpu, worst case, sampling: lower model.rollout.max_batch_rows or"
        " model.rollout.max_new_tokens, or, as conversations are scored beside it, use a smaller reward model"
    ]
    assert meter.costs == {}
    with pytest.raises(RuntimeError, match="size of tensor"):  # any other error is ours
        meter.run("worst case", "sampling", lambda: torch.ones(2) + torch.ones(3))


def test_a_phase_that_takes_too_long_is_stopped_and_the_clock_with_it(monkeypatch, capsys):
    monkeypatch.setattr(measure, "LIMIT", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    meter = Meter(CPU, [])
    assert meter.run("as sampled", "scoring", lambda: time.sleep(30)) is None
    seconds, _, stopped = meter.costs["as sampled", "scoring"]
    assert stopped
    assert 0.2 <= seconds < 10
    assert "as sampled  scoring   > 0." in capsys.readouterr().out
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before
    assert meter.run("as sampled", "load", lambda: time.sleep(0.5) or 1, limit=0) == 1
