"""What is checked before the first step, and how long a run is."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from stateset_lightning.errors import ConfigError
from stateset_lightning.run_checks import (
    check_checkpoint,
    check_context,
    check_episode_fits_trainer,
    check_monitors,
    optimizer_steps_of_run,
)


def make_trainer(*, accumulate=1, limit=1.0, max_steps=-1, max_epochs=None, callbacks=(), **data):
    data = {"steps_per_episode": 1, "num_iterations": 1, "micro_steps_per_epoch": 12, "has_validation": True, "longest_prompt": 10, **data}
    return SimpleNamespace(
        datamodule=SimpleNamespace(**data),
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
        max_steps=max_steps,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"accumulate": 2, "steps_per_episode": 3}, "data.steps_per_episode to 4"),
        ({"accumulate": 4}, "data.steps_per_episode to 4"),
        ({"limit": 1, "num_iterations": 2}, "set it to 2"),
        ({"limit": 7, "num_iterations": 2, "steps_per_episode": 2}, "set it to 4"),
        ({"limit": 0.3, "num_iterations": 2}, "set it to 2"),
    ],
)
def test_what_cuts_an_episode_is_refused_with_the_remedy(options, remedy):
    with pytest.raises(ConfigError, match=remedy):
        check_episode_fits_trainer(make_trainer(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2, "steps_per_episode": 4},
        {"limit": 1},
        {"limit": 4, "num_iterations": 2},
        {"limit": 1.0, "num_iterations": 2},
        {"limit": 0.5, "num_iterations": 2},
        {"limit": 999, "num_iterations": 2},  # the whole epoch
    ],
)
def test_whole_episodes_pass(options):
    check_episode_fits_trainer(make_trainer(**options))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2}, 24),
        ({"max_epochs": 2, "max_steps": 7}, 7),
        ({"max_epochs": 1, "max_steps": 70}, 12),
        ({"max_epochs": 2, "accumulate": 4, "steps_per_episode": 4}, 6),
        ({"max_epochs": 2, "limit": 4}, 8),
        ({"max_epochs": 2, "limit": 0.5}, 12),
        ({"max_epochs": -1}, None),
        ({}, None),
    ],
)
def test_steps_of_a_run(options, steps):
    assert optimizer_steps_of_run(make_trainer(**options)) == steps


def test_monitors_get_their_metric():
    check_monitors(make_trainer(callbacks=[ModelCheckpoint(monitor="val/reward"), ModelCheckpoint()]), ["val/reward"])
    check_monitors(make_trainer(callbacks=[ModelCheckpoint(monitor="train/reward")], has_validation=False), ["val/reward"])
    with pytest.raises(ConfigError, match=r"EarlyStopping.monitor=val_reward.*it logs val/reward"):
        check_monitors(make_trainer(callbacks=[EarlyStopping("val_reward")]), ["val/reward"])
    with pytest.raises(ConfigError, match=r"nothing to validate on"):
        check_monitors(make_trainer(callbacks=[EarlyStopping("val/reward")], has_validation=False), ["val/reward"])


def test_the_longest_prompt_fits_with_its_completion():
    check_context(make_trainer(), 30, 20)
    check_context(make_trainer(), None, 10**9)
    with pytest.raises(ConfigError, match=r"max_new_tokens=21.*10 tokens.*30 positions: set data.max_prompt_tokens=9"):
        check_context(make_trainer(), 30, 21)
    with pytest.raises(ConfigError, match=r"positions: lower it"):
        check_context(make_trainer(), 30, 30)


def test_checkpoints_are_told_from_other_files(tmp_path):
    for name in ("last", "best", "hpc", "registry:model", "s3://bucket/x.ckpt", str(tmp_path)):
        check_checkpoint(name)
    good = tmp_path / "good.ckpt"
    torch.save({"state_dict": {}, "stateset": {}}, good)
    check_checkpoint(str(good))
    good.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged"):
        check_checkpoint(str(good))
