"""Console lines: which steps have one, and what it says."""

import re

import pytest
from module_runs import fit, make_data

from stateset_lightning.callbacks import ConsoleProgress
from stateset_lightning.errors import ConfigError

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
