"""A reference that moves: by hand, in checkpoints, and exactly resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from module_runs import fit, make_data, make_module, weights

from stateset_lightning.algorithm import GRPO
from stateset_lightning.callbacks import ReferenceSync
from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import LoRAConfig, PolicyConfig

NAME = "policy.model.model.norm.weight"


class Watch(Callback):
    """A weight of the policy and of the reference, before training and after each optimizer step."""

    def __init__(self) -> None:
        self.policy: list[torch.Tensor] = []
        self.reference: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._look(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self._look(pl_module)

    def _look(self, module: Any) -> None:
        self.policy.append(module.state_dict()[NAME].clone())
        self.reference.append(module.reference.state_dict()[NAME.removeprefix("policy.")].clone())


def run(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    options = {"max_steps": 4, **options}
    return fit(folder, make_module(algorithm=GRPO(beta=0.1)), callbacks=list(callbacks), **options)


def test_every_second_step_by_hand(tmp_path: Path) -> None:
    watch = Watch()
    run(tmp_path, ReferenceSync(every_n_steps=2, mixup=0.25), watch)
    policy, reference = watch.policy, watch.reference
    assert torch.equal(reference[0], policy[0])
    assert torch.equal(reference[1], policy[0])
    torch.testing.assert_close(reference[2], 0.25 * policy[2] + 0.75 * policy[0])
    assert torch.equal(reference[3], reference[2])
    torch.testing.assert_close(reference[4], 0.25 * policy[4] + 0.75 * reference[2])
    assert not torch.equal(policy[2], policy[0])


def test_a_full_update_makes_the_reference_the_policy_and_micro_steps_do_not_count(tmp_path: Path) -> None:
    watch = Watch()
    fit(
        tmp_path,
        make_module(algorithm=GRPO(beta=0.1)),
        make_data(steps_per_episode=2),
        callbacks=[ReferenceSync(every_n_steps=1, mixup=1.0), watch],
        max_steps=2,
        accumulate_grad_batches=2,
    )
    assert torch.equal(watch.reference[1], watch.policy[0])
    assert torch.equal(watch.reference[2], watch.policy[2])
    assert torch.equal(watch.reference[4], watch.policy[4])


def test_a_moved_reference_is_in_the_checkpoint_and_goes_on_exactly(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = run(tmp_path, ReferenceSync(every_n_steps=2, mixup=0.5), keep, enable_checkpointing=True, max_steps=5)
    states = [
        torch.load(tmp_path / "kept" / f"step={step}.ckpt", weights_only=True)["callbacks"]["ReferenceSync"]
        for step in (1, 3)
    ]
    assert states[0]["reference"] is None  # it has not moved: nothing to keep
    assert set(states[1]["reference"]) == set(straight.lightning_module.reference.state_dict())
    for step in (1, 2, 3):
        resumed = run(
            tmp_path,
            ReferenceSync(every_n_steps=2, mixup=0.5),
            max_steps=5,
            ckpt_path=tmp_path / "kept" / f"step={step}.ckpt",
        )
        ours = straight.lightning_module.reference.state_dict()
        assert all(
            torch.equal(value, ours[name]) for name, value in resumed.lightning_module.reference.state_dict().items()
        )
        assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(resumed).items())


def test_without_a_reference_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no reference policy to move; set model\.algorithm\.beta above 0"):
        fit(tmp_path, callbacks=[ReferenceSync()])


def test_a_reference_without_weights_of_its_own_is_refused(tmp_path: Path) -> None:
    module = make_module(PolicyConfig("tiny", lora=LoRAConfig(rank=2)), algorithm=GRPO(beta=0.1))
    with pytest.raises(ConfigError, match="with no weights of its own to move"):
        fit(tmp_path, module, callbacks=[ReferenceSync()])


@pytest.mark.parametrize(("options", "message"), [({"every_n_steps": 0}, "at least 1"), ({"mixup": 1.5}, "at most 1")])
def test_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReferenceSync(**options)
