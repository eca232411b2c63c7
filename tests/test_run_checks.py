"""What is checked before the first step, and how long a run is."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from stateset_lightning import run_checks
from stateset_lightning.errors import ConfigError, NonFiniteError, SamplingError
from stateset_lightning.run_checks import (
    check_checkpoint,
    check_clipping,
    check_context,
    check_dynamic_sampling,
    check_episode_fits_trainer,
    check_monitors,
    check_sampling_difference,
    optimizer_steps_of_run,
)


def make_trainer(*, accumulate=1, limit=1.0, max_steps=-1, max_epochs=None, callbacks=(), val_check_interval=1.0, **data):
    data = {"steps_per_episode": 1, "num_iterations": 1, "micro_steps_per_epoch": 12, "has_validation": True, "longest_prompt": 10, **data}
    return SimpleNamespace(
        datamodule=SimpleNamespace(**data),
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
        max_steps=max_steps,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        val_check_interval=val_check_interval,
        world_size=1,
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


@pytest.mark.parametrize(
    ("precision", "clip", "fused", "refused"),
    [("bf16-mixed", 1.0, True, True), ("bf16-mixed", None, True, False), ("bf16-mixed", 1.0, False, False), ("32-true", 1.0, True, False)],
)
def test_what_lightning_cannot_clip_is_refused_at_the_start(precision, clip, fused, refused):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], fused=fused)
    trainer = Trainer(accelerator="cpu", precision=precision, gradient_clip_val=clip, logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match="fused AdamW") if refused else nullcontext():
        check_clipping(trainer, optimizer)
    with pytest.raises(RuntimeError, match="fused") if refused else nullcontext():  # that it is still so
        trainer.precision_plugin.clip_gradients(optimizer, clip or 0)


def test_the_longest_prompt_fits_with_its_completion():
    check_context(make_trainer(), 30, 20)
    check_context(make_trainer(), None, 10**9)
    with pytest.raises(ConfigError, match=r"max_new_tokens=21.*10 tokens.*30 positions: set data.max_prompt_tokens=9"):
        check_context(make_trainer(), 30, 21)
    with pytest.raises(ConfigError, match=r"positions: lower it"):
        check_context(make_trainer(), 30, 30)


def test_checkpoints_are_told_from_other_files(tmp_path):
    for name in ("hpc", "registry:model", "s3://bucket/x.ckpt", str(tmp_path)):
        check_checkpoint(name)
    good = tmp_path / "good.ckpt"
    torch.save({"state_dict": {}, "stateset": {}}, good)
    check_checkpoint(str(good))
    good.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged"):
        check_checkpoint(str(good))


def test_more_optimizer_steps_than_prompts_are_refused():
    with pytest.raises(ConfigError, match=r"steps_per_episode=8 makes 8 optimizer steps of 4 prompts.*at most 4"):
        run_checks.check_episode_fits_trainer(make_trainer(steps_per_episode=8, batch_size=4, micro_steps_per_epoch=16))


def test_a_reward_name_that_nobody_has_is_refused_with_its_place():
    trainer = make_trainer(named_rewards=lambda: {"data.train: a": ("exact_match",), "data.train: b": ("exact_mtach",)})
    with pytest.raises(ConfigError, match=r"1 scenarios name rewards .*\(exact_match\): data.train: b: exact_mtach"):
        run_checks.check_reward_names(trainer, ["exact_match"])


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"seed": 2}, "seed_everything=2 differs from the checkpoint's 1"),
        ({"accumulate": 1}, "accumulate_grad_batches=1 differs"),
        ({"world": 2}, "an episode of 1 ranks and cannot be resumed by 2"),
    ],
)
def test_a_run_that_cannot_go_on_exactly_is_refused(now, message):
    state = {"seed": 1, "episode": [{}], "accumulate": 2}
    with pytest.raises(ConfigError, match=message):
        run_checks.check_resumable(state, **{"seed": 1, "accumulate": 2, "world": 1, **now})


def test_bad_steps_stop_the_run_only_when_they_do_not_end():
    run_checks.check_bad_steps(10, 10, step=20)
    with pytest.raises(NonFiniteError, match=r"11 optimizer steps in a row .*max_bad_steps=10.*, the last of them step 21"):
        run_checks.check_bad_steps(11, 10, step=21)


@pytest.mark.parametrize(
    ("difference", "dtype", "temperature", "stops"),
    [
        (9e-4, torch.float32, 1.0, False),
        (2e-3, torch.float32, 1.0, True),
        (2e-3, torch.float32, 0.4, False),  # the temperature divides the logits, and multiplies their error
        (2e-3, torch.float64, 2.0, True),
        (0.05, torch.bfloat16, 1.0, False),
        (0.2, torch.bfloat16, 1.0, True),
        (0.05, torch.float16, 1.0, True),
    ],
)
def test_a_sampler_may_differ_by_float_error_alone(difference: float, dtype: torch.dtype, temperature: float, stops: bool) -> None:
    metrics = {"policy/sampling_difference": difference}
    if stops:
        with pytest.raises(SamplingError, match=r"nats per token, where float error .* Set model\.policy\.scoring to padded"):
            check_sampling_difference(metrics, dtype, temperature)
    else:
        check_sampling_difference(metrics, dtype, temperature)
    check_sampling_difference({}, dtype, temperature)  # nothing trained


def test_dynamic_sampling_is_refused_where_constant_groups_teach():
    trainer = make_trainer(replacements=None)
    check_dynamic_sampling(trainer, 2, needs_greedy_baseline=False)
    check_dynamic_sampling(trainer, 0, needs_greedy_baseline=True)
    with pytest.raises(ConfigError, match=r"model\.rollout\.dynamic_sampling=2 replaces groups of equal rewards"):
        check_dynamic_sampling(trainer, 2, needs_greedy_baseline=True)
