import json
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401 (here, so that its log handlers do not hold the stream of the first test)
import pytest
import yaml

from stateset_lightning.cli.main import main

REWARDS = """
import time

from stateset_lightning import RewardFunction

class Raises(RewardFunction):
    def compute_reward(self, turns, context=None):
        raise KeyError("no such column")

class Silent(RewardFunction):
    def compute_reward(self, turns, context=None):
        return None

class Asks:
    def __init__(self, fails=False, seconds=0):
        self.fails, self.seconds = fails, seconds

    def reset(self, scenario, seed):
        self.asked = 0

    def step(self, text):
        self.asked += 1
        time.sleep(self.seconds)
        if self.fails and self.asked == 2:
            raise RuntimeError("no board")
        return "Sure?", 0.25, self.asked == 2
"""
CONFIG = {
    "seed_everything": 3,
    "model": {
        "policy": {"model_name": "tiny"},
        "reward": [{"class_path": "stateset_lightning.rewards.ExactMatch"}],
        "rollout": {"num_generations": 4, "max_new_tokens": 5},
        "algorithm": {"class_path": "stateset_lightning.algorithm.DrGRPO"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
    },
    "data": {"train": "rows.jsonl", "batch_size": 2},
    "trainer": {
        "max_steps": 6,
        "accelerator": "cpu",
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "runs", "name": "doctor"},
        },
    },
}


@pytest.fixture
def examine(tmp_path, monkeypatch, capsys):
    """`examine(*flags, rows=None, **overlay)` -> exit code and output, in a folder that stays as it was."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("doctor_rewards.py").write_text(REWARDS)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))

    def examine(*flags, rows=None, **overlay):
        rows = rows or [
            {"prompt": f"What is {i} + 1?", "target": str(i + 1), "topic": "even" if i % 2 else "odd"} for i in range(8)
        ]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("overlay.yaml").write_text(yaml.safe_dump(overlay))
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            main(["doctor", "--config", "config.yaml", "--config", "overlay.yaml", *flags])
        assert snapshot(tmp_path) == before
        captured = capsys.readouterr()
        return stopped.value.code, captured.out + captured.err

    return examine


def snapshot(folder):
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }, {path for path in folder.rglob("*") if path.is_dir() and path.name != "__pycache__"}
