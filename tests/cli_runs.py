"""Small runs of the command line: their configs and overlays, where they start, and the metrics that they logged."""

import contextlib
import csv
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from stateset_lightning.cli.main import main
from stateset_lightning.policy import LoRAConfig, Policy, PolicyConfig, load_model, save_adapter

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
RUN_CONFIG = {
    "seed_everything": 3,
    "model": {
        "policy": {"model_name": "tiny"},
        "reward": [{"class_path": "stateset_lightning.rewards.ExactMatch"}],
        "rollout": {"num_generations": 4, "max_new_tokens": 4},
        "algorithm": {"class_path": "stateset_lightning.algorithm.DrGRPO"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
    },
    "data": {"train": "rows.jsonl", "validation": "rows.jsonl", "batch_size": 2},
    "trainer": {
        "max_steps": 3,
        "max_epochs": -1,
        "accelerator": "cpu",
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "r"}},
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "save_last": True},
            }
        ],
    },
}
"""Of a run that logs, validates and saves."""
CSV_LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "cli"}}


RUN = Path("runs/r/version_0")
"""Where the first run of `RUN_CONFIG` leaves its files."""


def run_model_folder(folder, patch, source, *flags):
    """In `folder`: a run of one step of the model in `model`, a copy of `source`, and an adapter in `adapter`."""
    config = {**RUN_CONFIG, "model": {**RUN_CONFIG["model"], "policy": {"model_name": "model"}}}
    config["trainer"] = {**RUN_CONFIG["trainer"], "max_steps": 1, "limit_val_batches": 0}
    start_in(folder, patch, config, 4)
    shutil.copytree(source, "model")
    main(["fit", "--config", "config.yaml", *flags])
    policy = PolicyConfig("model", lora=LoRAConfig(rank=2))
    save_adapter(Policy(load_model(policy), policy), Path("adapter"))


def start_in(folder, monkeypatch, config, num_rows):
    """Makes `folder` the working folder, with `config.yaml` and the rows that it names."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(folder)
    rows = [{"prompt": f"What is {i} + 1?", "target": str(i + 1)} for i in range(num_rows)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("config.yaml").write_text(yaml.safe_dump(config))


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


def logged(folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "memory/", "work/tokens_per_s"))}
        for row in rows
    ]
