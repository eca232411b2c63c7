"""`data.steps_per_episode: auto`: what is chosen follows from memory, and changes nothing but memory."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LambdaCallback, ModelCheckpoint
from module_runs import GradientRecorder, fit, make_data, make_module, relative_difference, weights

from stateset_lightning.environments import EnvironmentConfig
from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import Policy, PolicyConfig, load_model
from stateset_lightning.training import micro_steps
from stateset_lightning.training.micro_steps import kept_bytes, longest_completion


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`memory(share)`: what is free is this share of what a whole episode of `make_data` would need."""
    needed = []
    monkeypatch.setattr(micro_steps, "SHARE", 1.0)

    def limit(share: float) -> None:
        def measured(*args: Any) -> tuple[int, float]:
            constant, per_token = kept_bytes(*args)
            data = args[1].datamodule
            tokens = micro_steps.most_tokens(1, data, 4, args[3], packed=True)
            state = 3 * sum(p.nbytes for p in args[0].parameters())
            needed[:] = [state + constant + share * tokens * per_token]
            return constant, per_token

        monkeypatch.setattr(micro_steps, "kept_bytes", measured)
        monkeypatch.setattr(micro_steps, "free_bytes", lambda device: needed[0])

    return limit


@pytest.mark.parametrize(
    ("options", "longest"),
    [
        (None, 5),
        ({"max_turns": 3}, 1024),
        ({"max_turns": 200}, 2000),
        ({"max_turns": 3, "max_tokens": 12}, 12),
        ({"max_tokens": 3}, 5),
        ({}, 1024),
    ],
)
def test_a_conversation_is_as_long_as_it_may_be(options: dict[str, Any] | None, longest: int) -> None:
    module, data = make_module(), make_data()
    module.environment = None if options is None else EnvironmentConfig("nowhere.Nothing", **options)
    for context, most in (
        (None, longest),
        (128, min(longest, 128)),
        (40, min(longest, 40)),
    ):  # this data has no prompts yet
        policy: Any = SimpleNamespace(context_length=context)
        assert longest_completion(policy, data, module) == most


@pytest.mark.parametrize(("share", "count"), [(1.0, 1), (0.5, 2), (0.3, 4)])
def test_the_gradient_the_steps_and_the_intervals_are_those_of_one_micro_step(
    tmp_path: Path, memory: Any, share: float, count: int
) -> None:
    memory(share)
    recorders, validated = [], []
    for steps in (1, "auto"):
        recorder, validated_at = GradientRecorder(), list[int]()
        note = LambdaCallback(on_validation_end=lambda trainer, _, at=validated_at: at.append(trainer.global_step))
        data = make_data(steps_per_episode=steps)
        options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1}
        trainer = fit(tmp_path, data=data, callbacks=[recorder, note], max_steps=4, **options)
        recorders.append(recorder.steps)
        validated.append(validated_at)
    assert (data.steps_per_episode, trainer.accumulate_grad_batches) == (count, count)
    assert validated[0] == validated[1] == [2, 4]
    assert len(recorders[0]) == len(recorders[1]) == 4
    assert relative_difference(recorders[1][0], recorders[0][0]) < 1e-5


def test_a_run_goes_on_with_the_number_that_its_checkpoint_has(tmp_path: Path, memory: Any) -> None:
    def run(steps: int, **options: Any) -> Trainer:
        keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
        data = make_data(steps_per_episode="auto", num_iterations=2)
        callbacks = {"callbacks": [keep], "enable_checkpointing": True}
        return fit(tmp_path, data=data, max_steps=steps, **callbacks, **options)

    memory(0.5)
    straight = weights(run(5))
    run(3)  # inside the second episode
    memory(1.0)
    resumed = run(5, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.accumulate_grad_batches == 2
    assert relative_difference(weights(resumed), straight) == 0


@pytest.mark.parametrize(
    "given",
    [{"accumulate_grad_batches": 2}, {"callbacks": [GradientAccumulationScheduler({0: 1, 2: 4})]}],
    ids=["number", "schedule"],
)
def test_a_value_of_the_users_is_not_overruled(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"auto chooses trainer.accumulate_grad_batches, too: leave it out"):
        fit(tmp_path, data=make_data(steps_per_episode="auto"), **copy.copy(given))


def test_what_is_kept_grows_with_the_tokens_and_shrinks_with_checkpointing() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    found = []
    for recomputes in (False, True):
        config = PolicyConfig("tiny", gradient_checkpointing=recomputes)
        policy = Policy(load_model(config), config)
        before = torch.get_rng_state()
        constant, per_token = kept_bytes(policy, trainer, 40, 20)
        assert torch.equal(torch.get_rng_state(), before)
        hidden = policy.model.config.hidden_size * 4
        assert constant < 200 * hidden
        assert per_token > hidden * policy.model.config.num_hidden_layers
        assert kept_bytes(policy, trainer, 80, 20)[1] == pytest.approx(per_token, rel=0.5)
        found.append(per_token)
    assert found[1] < found[0] / 2


def test_nothing_is_chosen_where_a_number_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_steps, "free_bytes", None)
    data = make_data(steps_per_episode=2)
    assert fit(tmp_path, make_module(), data, max_steps=1).accumulate_grad_batches == 1
    with pytest.raises(ConfigError, match=r"data\.steps_per_episode=0 must be at least 1"):
        make_data(steps_per_episode=0)
