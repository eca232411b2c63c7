"""Console lines: which steps have one, and what it says."""

import contextlib
import re
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback
from module_runs import fit, make_data

from stateset_lightning.callbacks import ConsoleProgress
from stateset_lightning.errors import ConfigError
from stateset_lightning.run import progress

VALIDATING = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


def test_console_lines_show_the_reward_and_the_time_left(tmp_path, capsys):
    fit(tmp_path, callbacks=[ConsoleProgress(every_n_steps=2)], max_steps=4, **VALIDATING)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    form = r"step \d/4  reward -?\d+\.\d{3}  mixed groups \d\.\d\d  tokens \d+\.\d  tokens/s \d+  \d+:\d\d left"
    assert [line[:8] for line in steps] == ["step 1/4", "step 2/4", "step 4/4"]
    assert all(re.fullmatch(form, line) for line in steps), steps
    assert steps[-1].endswith("0:00 left")
    validations = [line for line in lines if line.startswith("validation")]
    assert [line[:24] for line in validations] == ["validation after step 2:", "validation after step 4:"]
    assert all(re.fullmatch(r"validation after step \d: reward \d+\.\d{3}", line) for line in validations)


def test_a_step_of_several_micro_steps_has_one_line(tmp_path, capsys):
    data = make_data(steps_per_episode=2)
    fit(tmp_path, data=data, callbacks=[ConsoleProgress(1)], max_steps=2, accumulate_grad_batches=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines if line.startswith("step ")] == ["step 1/2", "step 2/2"]


def test_a_number_of_steps_below_one_is_refused():
    with pytest.raises(ConfigError, match="every_n_steps=0 must be at least 1"):
        ConsoleProgress(every_n_steps=0)


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is the time, for the callback and for the heartbeat."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


class Lasts(Callback):
    """Optimizer step k, from 1, takes `seconds(k)`."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def on_train_batch_start(self, trainer, *args):
        self.clock.now += self.seconds(trainer.global_step + 1)


def lines_of_steps(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_the_time_left_follows_from_recent_steps(tmp_path, capsys, clock):
    slow_start = Lasts(clock, lambda step: 1000 if step == 1 else 3 if step < 6 else 6)
    fit(tmp_path, callbacks=[slow_start, ConsoleProgress(1)], max_steps=14)
    left = [line.split()[-2] for line in lines_of_steps(capsys)]
    assert left[0] == "216:40"  # 13 steps of 1000 s
    assert left[4] == "0:27"  # 9 steps of 3 s, the median
    assert left[12] == "0:06"  # of the last ten steps, most took 6 s


@pytest.mark.parametrize(("seconds", "steps"), [(20, [1, 2, 3, 4, 5]), (6, [1, 3, 4]), (0.1, [1, 4])])
def test_slow_steps_have_a_line_each(tmp_path, capsys, clock, seconds, steps):
    fit(tmp_path, callbacks=[Lasts(clock, lambda step: seconds), ConsoleProgress(4)], max_steps=5)
    assert [int(line.split("/")[0].split()[1]) for line in lines_of_steps(capsys)] == steps


@pytest.mark.parametrize("fails", [False, True])
def test_no_line_comes_after_the_end(tmp_path, capsys, monkeypatch, fails):
    class Fail(Callback):
        def on_train_batch_end(self, *args):
            if fails:
                raise RuntimeError

    monkeypatch.setattr(progress.heartbeat, "seconds", 0.0)
    with contextlib.suppress(RuntimeError):
        fit(tmp_path, callbacks=[ConsoleProgress(), Fail()], max_steps=1)
    assert "training on episode 0, 0 s so far" in capsys.readouterr().out
    time.sleep(0.1)
    assert capsys.readouterr().out == ""
