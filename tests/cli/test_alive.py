"""A slow run looks alive: whatever takes long, a log has a line about it; and its report can be made at any moment."""

import contextlib
import re
import sys
import time
from pathlib import Path

import pytest
from cli_runs import CSV_LOGGER, overlay

from stateset_lightning import module
from stateset_lightning.cli.main import main
from stateset_lightning.cli.report import render
from stateset_lightning.cli.report.run_data import read_run
from stateset_lightning.data import sources
from stateset_lightning.rewards import RewardFunction
from stateset_lightning.rollout import InProcessEngine
from stateset_lightning.run.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.threads import heartbeat
from stateset_lightning.training.step import TrainingStep

RUN = Path("runs/cli/version_0")
SLOW = 0.2  # seconds


class SlowReward(RewardFunction):
    def compute_reward(self, turns, context=None):
        time.sleep(SLOW)
        return float(len(turns[-1].content) % 2)


class Log:
    """A standard output that is no terminal; in each phase, a report of the run is made, if it has a folder yet."""

    def __init__(self):
        self.text = ""
        self.phases = set()

    def write(self, text):
        self.text += text
        phase = text.split(", ")[0]
        if RUN.exists() and phase not in self.phases:
            self.phases.add(phase)
            render(read_run(RUN))

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.fixture
def said(monkeypatch):
    """Runs a command in which every phase is slow, and returns what it has said."""

    def slow(owner, name):
        fast = getattr(owner, name)

        def call(*args, **options):
            time.sleep(SLOW)
            return fast(*args, **options)

        monkeypatch.setattr(owner, name, call)

    slow(sources, "read_file")
    slow(module, "load_model")
    slow(module, "load_tokenizer")
    slow(InProcessEngine, "generate")
    slow(TrainingStep, "check_gradient")
    slow(AtomicCheckpointIO, "save_checkpoint")
    monkeypatch.setattr(heartbeat, "seconds", 0.05)
    monkeypatch.setitem(sys.modules, "slow_rewards", sys.modules[__name__])
    SlowReward.__module__ = "slow_rewards"

    def run(*words):
        log = Log()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", log)
            with contextlib.suppress(SystemExit):  # of --print_config
                main(list(words))
        return log.text

    return run


def test_every_slow_phase_of_a_run_has_lines_and_at_each_of_them_a_report_can_be_made(config, said):
    checkpoints = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    changes = overlay(
        "slow.yaml",
        {
            "model": {"reward": {"class_path": "slow_rewards.SlowReward"}},
            "data": {"validation": "rows.jsonl", "eval_batch_size": 2},
            "trainer": {
                "logger": CSV_LOGGER,
                "callbacks": [checkpoints],
                "enable_checkpointing": True,
                "max_steps": 1,
                "val_check_interval": 1,
                "limit_val_batches": 1,
            },
        },
    )
    text = said("fit", "--config", config, "--config", changes)
    phases = list(dict.fromkeys(re.findall(r"^(.*), \d+ s so far$", text, flags=re.MULTILINE)))
    assert phases == [
        "fit",
        "reading the data",
        "loading the model",
        "sampling episode 0",
        "scoring episode 0",
        "training on episode 0",
        "sampling for validation",
        "scoring for validation",
        "saving a checkpoint",
    ]
    assert f"config: {RUN}/config.yaml" in text.splitlines()
    evaluated = said("validate", "--config", config, "--config", changes, "--ckpt_path", f"{RUN}/checkpoints/last.ckpt")
    assert {"validate, 0 s so far", "sampling for validation, 0 s so far"} <= set(evaluated.splitlines())


@pytest.mark.parametrize(
    "words",
    [["fit", "--config", "config.yaml", "--print_config"], ["generate", "--ckpt_path", "tiny", "--prompt", "1 + 1"]],
    ids=["a config", "an answer"],
)
def test_no_such_line_enters_what_is_written_to_a_file(config, said, words, capsys):
    text = said(*words)
    assert text
    assert "so far" not in text
    assert ("so far" in capsys.readouterr().err) == (words[0] == "generate")
