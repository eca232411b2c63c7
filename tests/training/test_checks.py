"""What is checked before the first step, and how long a run is."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from module_runs import make_module

from stateset_lightning.algorithm import GKD, GRPO, RAFT, OnPolicyDistillation, ReinforcePlusPlus, ReMax
from stateset_lightning.errors import ConfigError, NonFiniteError
from stateset_lightning.evaluation import EvaluationConfig
from stateset_lightning.rewards import ExactMatch, FunctionReward, JsonValid, RelativeLength
from stateset_lightning.training import checks as run_checks
from stateset_lightning.training.checks import (
    check_context,
    check_dynamic_sampling,
    check_episode_fits_trainer,
    check_monitors,
    check_speed,
    checks_of_run,
    no_validation,
)
from stateset_lightning.training.schedule import optimizer_steps_of_run


def make_trainer(
    *, accumulate=1, limit=1.0, max_steps=-1, max_epochs=None, callbacks=(), validation=(1.0, 1, 1.0), **data
):
    interval, every_n_epochs, batches = validation
    data = {
        "steps_per_episode": 1,
        "num_iterations": 1,
        "micro_steps_per_epoch": 12,
        "is_given": lambda split: True,
        "longest_prompt": 10,
        "batch_size": 8,
        "replacements": None,
        **data,
    }
    return SimpleNamespace(
        datamodule=SimpleNamespace(**data),
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
        max_steps=max_steps,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        val_check_interval=interval,
        check_val_every_n_epoch=every_n_epochs,
        limit_val_batches=batches,
        world_size=1,
    )


def monitors(trainer):
    check_monitors(trainer, make_module())


def fits_trainer(trainer):
    check_episode_fits_trainer(trainer, trainer.datamodule)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"accumulate": 2, "steps_per_episode": 3}, "data.steps_per_episode to 4"),
        ({"accumulate": 4}, "data.steps_per_episode to 4"),
        ({"limit": 1, "num_iterations": 2}, "set it to 2"),
        ({"limit": 7, "num_iterations": 2, "steps_per_episode": 2}, "set it to 4"),
        ({"limit": 0.3, "num_iterations": 2}, "set it to 2"),
        ({"accumulate": 0}, "trainer.accumulate_grad_batches=0 must be above 0"),
        ({"accumulate": -1}, "trainer.accumulate_grad_batches=-1 must be above 0"),
        ({"validation": (0, 1, 1.0)}, "trainer.val_check_interval=0 must be above 0"),
        ({"validation": (1.0, 0, 1.0)}, "trainer.check_val_every_n_epoch=0 must be above 0"),
        (
            {"validation": (13, 1, 1.0)},
            "val_check_interval=13 is more than the 12 micro-steps of an epoch: .*check_val_every_n_epoch to null",
        ),
    ],
)
def test_what_cuts_an_episode_is_refused_with_the_remedy(options, remedy):
    with pytest.raises(ConfigError, match=remedy):
        fits_trainer(make_trainer(**options))


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
        {"validation": (12, 1, 1.0)},
        {"validation": (13, None, 1.0)},
        {"validation": (13, 1, 0)},
    ],
)
def test_whole_episodes_pass(options):
    fits_trainer(make_trainer(**options))


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


def check_of(callbacks, **module):
    """The check of monitors, as a run makes it."""
    module = make_module(**module)
    module.policy = SimpleNamespace(context_length=None, model=SimpleNamespace(dtype=torch.float32))
    trainer = make_trainer(callbacks=callbacks)
    trainer.optimizers = []
    return next(check for check in checks_of_run(trainer, module) if check.func is check_monitors)


BEST = {"monitor": "val/reward", "mode": "max"}
NEWEST = ModelCheckpoint(save_last=True, save_top_k=0)


def test_monitors_get_their_metric():
    monitors(make_trainer(callbacks=[ModelCheckpoint(**BEST), ModelCheckpoint()]))
    train = ModelCheckpoint(monitor="train/reward", mode="max")
    monitors(make_trainer(callbacks=[train], is_given=lambda split: False))
    with pytest.raises(ConfigError, match=r"EarlyStopping.monitor=val_reward.*it logs val/reward"):
        monitors(make_trainer(callbacks=[EarlyStopping("val_reward")]))
    with pytest.raises(ConfigError, match=r"nothing to validate on"):
        monitors(make_trainer(callbacks=[EarlyStopping("val/reward")], is_given=lambda split: False))


@pytest.mark.parametrize(
    ("run", "never"),
    [
        ({"validation": (1.0, 1, 0)}, "trainer.limit_val_batches=0"),
        ({"validation": (1.0, 1, 0.0)}, "trainer.limit_val_batches=0"),
        ({"validation": (7, None, 1.0), "max_steps": 6}, "val_check_interval=7, the run has 6 micro-steps"),
        ({"validation": (7, None, 1.0), "max_steps": 3, "accumulate": 2}, "the run has 6 micro-steps"),
        ({"validation": (1.0, 1, 1.0), "max_steps": 11}, "check_val_every_n_epoch=1, the run has 11"),
        ({"validation": (0.5, 1, 1.0), "max_steps": 5}, "the run has 5"),
        ({"validation": (1.0, 3, 1.0), "max_epochs": 2}, "check_val_every_n_epoch=3"),
        ({"validation": (7, None, 1.0), "max_steps": 7}, None),
        ({"validation": (0.5, 1, 1.0), "max_steps": 6}, None),
        ({"validation": (1.0, 3, 1.0), "max_epochs": 3}, None),
        ({"validation": (1.0, 3, 1.0)}, None),  # no end is known
    ],
)
@pytest.mark.parametrize("callback", [ModelCheckpoint(**BEST), EarlyStopping(**BEST)], ids=lambda c: type(c).__name__)
def test_a_monitor_of_a_validation_that_never_comes_is_refused(run, never, callback):
    with pytest.raises(ConfigError, match=f"validation never runs: .*{never}") if never else nullcontext():
        monitors(make_trainer(callbacks=[callback], **run))


def test_a_short_try_may_never_validate_if_its_newest_state_is_kept():
    never = {"validation": (1.0, 1, 0)}
    for keeps in (NEWEST, ModelCheckpoint(every_n_train_steps=2)):
        monitors(make_trainer(callbacks=[ModelCheckpoint(**BEST), keeps], **never))
    with pytest.raises(ConfigError, match="EarlyStopping"):
        monitors(make_trainer(callbacks=[EarlyStopping(**BEST), NEWEST], **never))


def test_a_validation_by_the_clock_may_come(tmp_path):
    trainer = Trainer(max_steps=1, val_check_interval="00:00:05:00", logger=False, default_root_dir=tmp_path)
    assert no_validation(trainer, make_trainer().datamodule) == ""


@pytest.mark.parametrize("callback", [ModelCheckpoint, EarlyStopping])
@pytest.mark.parametrize(
    ("monitor", "refused"),
    [
        ("train/reward", True),
        ("train/baseline_reward", True),
        ("reward/exact_match", True),
        ("val/reward", True),
        ("val/reward/exact_match", True),
        ("val/solved", True),
        ("val/solved_low", True),
        ("val/pass@2", True),
        ("val/pass^2", True),
        ("val/avg@4", True),
        ("val/majority@4", True),
        ("val/topic/sums/reward", True),
        ("val/topic/a/b/solved", True),
        ("val/topic/sums/avg@4", True),
        ("val/reward_ci95", False),
        ("val/reward/cost", False),  # of the user's own
        ("val/reward/penalty", False),  # its weight is negative
        ("val/mean_tokens", False),
        ("val/sample_failures", False),
        ("policy/loss", False),
    ],
)
def test_the_worst_is_not_kept_as_the_best(callback, monitor, refused):
    def cost(turns, context):
        return 1.0

    rewards = [ExactMatch(), FunctionReward(cost), JsonValid(weight=-1.0, name="penalty")]
    module = {"reward": rewards, "evaluation": EvaluationConfig(samples=4)}
    with pytest.raises(ConfigError, match="with mode=min takes the worst") if refused else nullcontext():
        check_of([callback(monitor=monitor, mode="min")], **module)()
    check_of([callback(monitor=monitor, mode="max")], **module)()


@pytest.mark.parametrize("monitor", ["val/reward", "val/reward/relative_length"])
def test_what_greedy_answers_cannot_have_is_no_monitor(monitor):
    rewards = [RelativeLength("exact_match"), ExactMatch(weight=0.0)]
    with pytest.raises(ConfigError, match=f"monitor={monitor}: validation logs no such metric; it logs .*val/solved"):
        check_of([EarlyStopping(monitor=monitor, mode="max")], reward=rewards)()


@pytest.mark.parametrize("callback", [ModelCheckpoint, EarlyStopping])
@pytest.mark.parametrize(
    ("monitor", "meant"),
    [
        ("train/rewards", "train/reward"),
        ("train_reward", "train/reward"),
        ("reward/exat_match", "reward/exact_match"),
        ("policy/kll", "policy/kl"),
        ("loss", "docs/metrics.md"),
        ("test/reward", "train/reward"),
    ],
)
def test_a_misspelt_metric_of_training_is_refused(callback, monitor, meant):
    with pytest.raises(ConfigError, match=f"monitor={monitor}: training logs no such metric; did you mean .*{meant}.*"):
        check_of([callback(monitor=monitor, mode="max")], reward=ExactMatch())()


def test_metrics_of_training_and_of_the_users_own_are_monitored():
    class Own(Callback):
        """May log anything."""

    good = ["train/reward_std", "reward/exact_match", "policy/kl", "lr", "cost/judge/requests", "step", "lr-AdamW"]
    callbacks = [ModelCheckpoint(monitor=monitor, mode="max") for monitor in good]
    check_of(callbacks, reward=ExactMatch())()
    check_of([EarlyStopping("mine"), Own()], reward=ExactMatch())()
    check_of([EarlyStopping("val/mine", mode="max"), Own()], reward=ExactMatch())()


@pytest.mark.parametrize(
    ("precision", "dtype", "device", "warns"),
    [
        ("32-true", torch.float32, "cuda", True),
        ("bf16-mixed", torch.float32, "cuda", False),
        ("32-true", torch.bfloat16, "cuda", False),
        ("32-true", torch.float32, "cpu", False),
    ],
)
def test_float32_on_a_gpu_is_told(precision, dtype, device, warns):
    trainer = SimpleNamespace(precision=precision, strategy=SimpleNamespace(root_device=torch.device(device)))
    quiet = warnings.catch_warnings(action="error")
    with pytest.warns(UserWarning, match="32-true on a GPU: bf16- or 16-mixed is") if warns else quiet:
        check_speed(trainer, dtype)


def test_the_longest_prompt_fits_with_its_completion():
    check_context(make_trainer().datamodule, 30, 20)
    check_context(make_trainer().datamodule, None, 10**9)
    with pytest.raises(
        ConfigError,
        match=r"of 10 tokens.*max_new_tokens=21.*30 positions: lower max_new_tokens to 20, or "
        r"shorten the prompt to 9 \(in a run: data.max_prompt_tokens=9 and data.overlong_prompts=drop\)$",
    ):
        check_context(make_trainer().datamodule, 30, 21)
    with pytest.raises(ConfigError, match=r"positions: lower max_new_tokens"):
        check_context(make_trainer().datamodule, 30, 30)


def test_more_optimizer_steps_than_prompts_are_refused():
    with pytest.raises(ConfigError, match=r"steps_per_episode=8 makes 8 optimizer steps of 4 prompts.*at most 4"):
        fits_trainer(make_trainer(steps_per_episode=8, batch_size=4, micro_steps_per_epoch=16))


def test_bad_steps_stop_the_run_only_when_they_do_not_end():
    run_checks.check_bad_steps(10, 10, step=20)
    with pytest.raises(NonFiniteError, match=r"11 optimizer steps in a row .*max_bad_steps=10.*, last at step 21"):
        run_checks.check_bad_steps(11, 10, step=21)


@pytest.mark.parametrize(
    "algorithm",
    [ReMax(), RAFT(minimum_reward=1), GKD(), OnPolicyDistillation(reward_weight=1), ReinforcePlusPlus()],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_dynamic_sampling_is_refused_where_constant_groups_teach(algorithm):
    trainer = make_trainer(replacements=None)
    check_dynamic_sampling(trainer.datamodule, 2, GRPO())  # whose KL holds the policy, and teaches nothing
    check_dynamic_sampling(trainer.datamodule, 0, algorithm)
    says = f"dynamic_sampling=2 replaces groups of equal rewards, from which {type(algorithm).__name__} learns"
    with pytest.raises(ConfigError, match=says):
        check_dynamic_sampling(trainer.datamodule, 2, algorithm)
