"""The one reduction rule, through the real module: for every preset and aggregation the gradient of an optimizer step
is the same however the step is split into micro-steps and over ranks."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from module_runs import GradientRecorder, fit, make_data, relative_difference

from stateset_lightning import GRPOLightningModule, RewardFunction, RolloutConfig, algorithm
from stateset_lightning.algorithm import KL, Algorithm, Clipped, OnPolicyDistillation
from stateset_lightning.algorithm.aggregation import Aggregation
from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import Policy

PRESETS = [value for value in vars(algorithm).values() if isinstance(value, type) and issubclass(value, Algorithm)]
OPTIONS: dict[str, Any] = {"PassK": {"k": 2}}  # with the default, the group of four would have nothing to compare
STOP = list("abcdefghijklmnopqrstuvwxyz0123456789")  # so that lengths differ, and some completions are truncated
STEPS = 4  # two passes of two optimizer steps
TOLERANCE = 1e-6


class ByteSum(RewardFunction):
    """Some number from 0 to 1/2, so that most groups are mixed, some are not, and totals stay below one."""

    def compute_reward(self, turns: Any, context: Any = None) -> float:
        return sum(turns[-1].content.encode()) % 3 / 4


class Length(RewardFunction):
    def compute_reward(self, turns: Any, context: Any = None) -> float:
        return len(turns[-1].content) % 4 / 6


def algorithms() -> Iterator[tuple[str, Algorithm]]:
    """Every preset with every aggregation that it takes, and the options that add terms or leave tokens out."""
    for preset in PRESETS:
        for aggregation in get_args(Aggregation):
            try:
                yield (
                    f"{preset.__name__}-{aggregation}",
                    preset(aggregation=aggregation, **OPTIONS.get(preset.__name__, {})),
                )
            except (TypeError, ConfigError):  # the preset's formula fixes its aggregation
                continue
        yield preset.__name__, preset(**OPTIONS.get(preset.__name__, {}))
    yield "top_entropy", Clipped(top_entropy=0.4)
    yield "distillation_and_reward", OnPolicyDistillation(reward_weight=0.5, top_entropy=0.4)
    yield "kl_in_reward", Clipped(beta=0.1, kl=KL(estimator="k1", place="reward"))
    yield "kl_in_loss", Clipped(beta=0.1, kl=KL(estimator="k3_unbiased"))
    yield "entropy_bonus", Clipped(entropy_coefficient=0.01)
    yield "mask_truncated", Clipped(mask_truncated=True)


ALGORITHMS = dict(algorithms())
QUICK = [name for name in ALGORITHMS if "-" not in name or name.startswith("Clipped-")]
"""Each preset as published, and each aggregation once."""
MATRIX = [name for name in ALGORITHMS if "-" in name or f"{name}-token_mean" not in ALGORITHMS]
"""Each preset with each aggregation that it takes, and the options; a preset as published is among them."""


class Disturbed(GradientRecorder):
    """Moves the weights before the second pass, by the same noise in every run, so that ratios leave one; puts them
    back at the end.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = copy.deepcopy(pl_module.policy.state_dict())  # type: ignore[union-attr, operator]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch.micro_step == batch.steps_per_episode:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.add_(0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.policy.load_state_dict(self.before)  # type: ignore[union-attr, operator]


class GoesOn:
    """Has a conversation go on for as many turns as its first answer's length says: groups are uneven."""

    def reset(self, scenario: Any, seed: int) -> None:
        self.left: int | None = None

    def step(self, text: str) -> tuple[str, None, bool]:
        self.left = len(text) % 3 if self.left is None else self.left - 1
        return "Go on, and say more.", None, self.left == 0


class Masked(Disturbed):
    """Makes all values of tokens that were not sampled NaN, after the first micro-step has made the episode."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch.micro_step == 1:
            episode: Any = pl_module.episode
            assert not episode.sampled_T.all()
            for name, value_T in vars(episode).items():
                if name.endswith("_T") and value_T is not None and value_T.is_floating_point():
                    value_T[~episode.sampled_T] = torch.nan


def gradients(
    folder: Path,
    chosen: Algorithm,
    model: Path,
    policy: Policy | None = None,
    *,
    accumulate: int = 1,
    environment: type | None = None,
    recorder: Disturbed | None = None,
    **trainer: Any,
) -> tuple[list[dict[str, torch.Tensor]], Policy]:
    """Gradients of the four optimizer steps of one episode of eight prompts; the policy may be used again."""
    module = GRPOLightningModule(
        str(model),
        reward=[ByteSum(), Length()],
        rollout=RolloutConfig(num_generations=4, max_new_tokens=6, stop=STOP),
        algorithm=chosen,
        teacher="tiny" if chosen.needs_teacher else None,
        environment=environment,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    module.policy = policy
    recorder = recorder or Disturbed()
    data = make_data(
        batch_size=8 // trainer.get("devices", 1), steps_per_episode=2 * accumulate, num_iterations=2, validation=None
    )
    fit(folder, module, data, max_steps=STEPS, accumulate_grad_batches=accumulate, callbacks=[recorder], **trainer)
    assert module.policy is not None
    return recorder.steps, module.policy


def all_gradients(
    folder: Path, model: Path, policy: Policy | None = None, **options: Any
) -> dict[str, list[dict[str, torch.Tensor]]]:
    results = {}
    for name in MATRIX:
        results[name], policy = gradients(folder, ALGORITHMS[name], model, policy, **options)
    return results


@pytest.fixture(scope="module")
def model(model_folder: Any) -> Path:
    return model_folder("llama", hidden_size=16, intermediate_size=16)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Policy:
    return gradients(tmp_path_factory.mktemp("policy"), Clipped(), model)[1]


def check_equal(name: str, mine: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> None:
    assert sum(map(bool, other)) >= 3, f"{name}: hardly anything trains"
    for step, (split, whole) in enumerate(zip(mine, other, strict=True)):
        assert relative_difference(split, whole) < TOLERANCE, f"{name}, optimizer step {step}"


@pytest.mark.parametrize("name", QUICK)
def test_micro_steps_do_not_change_the_gradient(tmp_path: Path, name: str, model: Path, policy: Policy) -> None:
    whole, split = (
        gradients(tmp_path, ALGORITHMS[name], model, policy, accumulate=accumulate)[0] for accumulate in (1, 4)
    )
    check_equal(name, split, whole)


OF_CONVERSATIONS = ["Clipped-sequence_mean", "Clipped-token_mean", "Clipped-constant_length", "GSPO", "GMPO"]
OF_CONVERSATIONS += ["ClipCov", "KLCov", "top_entropy", "kl_in_reward", "kl_in_loss", "entropy_bonus"]


@pytest.mark.parametrize("name", OF_CONVERSATIONS)
def test_micro_steps_do_not_change_the_gradient_of_conversations(
    tmp_path: Path, name: str, model: Path, policy: Policy
) -> None:
    """And an environment's tokens are read only: whatever else is known of them changes nothing."""
    whole, split = (
        gradients(tmp_path, ALGORITHMS[name], model, policy, accumulate=n, environment=GoesOn, recorder=recorder)[0]
        for n, recorder in ((1, Disturbed()), (4, Masked()))
    )
    check_equal(name, split, whole)


SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_reduction import all_gradients
results = all_gradients(Path({folder!r}), Path({model!r}), accumulate=2, devices=2, strategy="ddp")
if torch.distributed.get_rank() == 0:
    torch.save(results, Path({folder!r}) / "two.pt")
"""


@pytest.mark.long  # a minute and a half: every preset with every aggregation, in two further processes
def test_ranks_and_micro_steps_do_not_change_the_gradient(tmp_path: Path, model: Path, policy: Policy) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), model=str(model)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    results = torch.load(tmp_path / "two.pt", weights_only=True)
    whole = all_gradients(tmp_path, model, policy)
    assert results.keys() == whole.keys()
    for name, mine in results.items():
        check_equal(name, mine, whole[name])
