"""Small runs of the module, shared by its tests: data, rewards and a Trainer that is quiet and quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from stateset_lightning import GRPOLightningModule, RewardFunction, RolloutConfig, ScenarioDataModule
from stateset_lightning.algorithm import Clipped
from stateset_lightning.callbacks import SampleWriter
from stateset_lightning.policy import PolicyConfig

SCENARIOS = [{"prompt": f"What is {a} + {b}?", "target": str(a + b)} for a in range(3, 7) for b in (4, 9)]


class DigitReward(RewardFunction):
    """Varied on purpose, so that most groups are mixed: the share of even digits."""

    def compute_reward(self, turns: Any, context: Any = None) -> float:
        digits = [int(character) for character in turns[-1].content if character.isdigit()]
        return sum(digit % 2 == 0 for digit in digits) / max(len(digits), 1)


class GradientRecorder(Callback):
    """Keeps the gradient of every optimizer step, before clipping."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})


def make_module(policy: str | PolicyConfig = "tiny", **overrides: Any) -> GRPOLightningModule:
    options: dict[str, Any] = {
        "reward": DigitReward(),
        "rollout": RolloutConfig(num_generations=4, max_new_tokens=5),
        "algorithm": Clipped(),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        **overrides,
    }
    return GRPOLightningModule(policy, **options)


def make_data(**overrides: Any) -> ScenarioDataModule:
    return ScenarioDataModule(**{"train": SCENARIOS, "validation": SCENARIOS[:4], "batch_size": 4, **overrides})


def make_trainer(folder: Path, **overrides: Any) -> Trainer:
    options: dict[str, Any] = {
        "max_steps": 2,
        "max_epochs": -1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        "limit_val_batches": 0,
        **overrides,
    }
    return Trainer(**options)


def fit(
    folder: Path, module: GRPOLightningModule | None = None, data: ScenarioDataModule | None = None, **overrides: Any
) -> Trainer:
    """A whole run from seed 7; `trainer.lightning_module` is the trained module."""
    ckpt_path = overrides.pop("ckpt_path", None)
    seed_everything(7, verbose=False)
    trainer = make_trainer(folder, **overrides)
    trainer.fit(module or make_module(), datamodule=data or make_data(), ckpt_path=ckpt_path)
    return trainer


def accumulating_run(folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, **overrides: Any) -> Trainer:
    """A run of two micro-steps per optimizer step and 16 per epoch, with a metrics file and samples in
    `folder/run/version_0`.
    """
    model = {"reward": overrides.pop("reward")} if "reward" in overrides else {}
    module = make_module(**model)
    module.accept_changes = overrides.pop("accept_changes", ())
    data = make_data(num_iterations=2, steps_per_episode=4, eval_batch_size=2)
    options = {"accumulate_grad_batches": 2, "max_steps": 6, "logger": CSVLogger(folder, "run", version=0), **overrides}
    return fit(
        folder,
        module,
        data,
        callbacks=[*callbacks, SampleWriter(every_n_episodes=1)],
        ckpt_path=ckpt_path,
        **options,
    )


EndState = tuple[dict[str, torch.Tensor], str, list[list[str]]]


def end_state(folder: Path, trainer: Trainer) -> EndState:
    """Weights, samples, and the steady columns of the metrics, of a run in `folder/run/version_0`."""
    version = folder / "run" / "version_0"
    header, *rows = [line.split(",") for line in (version / "metrics.csv").read_text().splitlines()]
    steady = [i for i, name in enumerate(header) if not name.startswith(("time/", "memory/", "work/tokens_per_s"))]
    return (
        weights(trainer),
        (version / "samples.jsonl").read_text(),
        [[row[i] for i in steady] for row in [header, *rows]],
    )


def assert_same_end(expected: EndState, found: EndState) -> None:
    """Bit by bit."""
    assert all(torch.equal(found[0][name], value) for name, value in expected[0].items())
    assert found[1:] == expected[1:]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}


def relative_difference(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    assert mine.keys() == other.keys()
    if not mine:  # a step with nothing to train has no gradients
        return 0.0
    difference = sum(float((mine[name].double() - other[name].double()).square().sum()) for name in mine)
    size = sum(float(value.double().square().sum()) for value in other.values())
    return (difference / size) ** 0.5
