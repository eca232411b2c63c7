"""A small config, and overlays of it, for the tests of the command line."""

import contextlib
import io
from pathlib import Path

import pytest
import yaml

from stateset_lightning.cli.main import main

CONFIG = {
    "seed_everything": 3,
    "model": {
        "policy": {"model_name": "tiny"},
        "reward": [{"class_path": "stateset_lightning.rewards.ExactMatch"}],
        "rollout": {"num_generations": 2, "max_new_tokens": 3},
        "algorithm": {"class_path": "stateset_lightning.algorithm.DrGRPO"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
    },
    "data": {"train": "rows.jsonl", "batch_size": 2},
    "trainer": {
        "max_steps": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "default_root_dir": "out",
    },
}
CSV_LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "cli"}}


def overlay(name, content):
    Path(name).write_text(yaml.safe_dump(content))
    return name


def printed_config(*args):
    """What --print_config prints, parsed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        main([*args, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(out.getvalue())


def with_checkpoints(tmp_name="ck.yaml", **model):
    checkpoints = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_last": True, "every_n_train_steps": 1},
    }
    trainer = {"logger": CSV_LOGGER, "enable_checkpointing": True, "callbacks": [checkpoints]}
    return overlay(tmp_name, {"trainer": trainer, "model": model})


LAST = "runs/cli/version_0/checkpoints/last.ckpt"
