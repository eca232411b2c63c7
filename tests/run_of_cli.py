"""A small run of the command line, shared by tests: its config, and the rows of metrics that it has logged."""

import csv

CONFIG = {
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


def logged(folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "memory/", "work/tokens_per_s"))}
        for row in rows
    ]
