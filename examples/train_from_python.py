"""Train from Python, validate before and after: `python examples/train_from_python.py [STEPS]`."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.algorithm import DrGRPO
from stateset_lightning.rewards import ExactMatch

ARITHMETIC = Path(__file__).parent / "arithmetic"


def main(max_steps: int = 20) -> None:
    seed_everything(1)
    data = ScenarioDataModule(
        train=str(ARITHMETIC / "train.jsonl"),
        validation=str(ARITHMETIC / "validation.jsonl"),
        batch_size=16,
        eval_batch_size=128,
    )
    module = GRPOLightningModule(
        "tiny",
        reward=ExactMatch(),
        rollout=RolloutConfig(num_generations=8, max_new_tokens=8),
        algorithm=DrGRPO(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    )
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    trainer = Trainer(max_steps=max_steps, accelerator="cpu", limit_val_batches=1.0, num_sanity_val_steps=0, **options)
    before = trainer.validate(module, datamodule=data, verbose=False)[0]["val/reward"]
    trainer.fit(module, datamodule=data)
    after = trainer.validate(module, datamodule=data, verbose=False)[0]["val/reward"]
    print(f"validation reward {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
