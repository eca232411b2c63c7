"""A model learns to call a Python function, without a config: `python examples/tools_from_python.py [STEPS]`."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.environments import EnvironmentConfig, Tools
from stateset_lightning.rewards import NumericAnswer

CALCULATOR = Path(__file__).parent / "calculator"  # a model that can call tools, and cannot multiply


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


class ShowCalls(Callback):
    """Prints, of the first turn of every fifth episode, a conversation in which a tool answered."""

    def __init__(self) -> None:
        self.episodes = 0

    def on_turn_end(self, trainer, pl_module, turn, conversations):
        if turn > 1 or not trainer.training:
            return
        called = [taken for taken in conversations if taken.reply]
        if self.episodes % 5 == 0:
            print(f"episode {self.episodes}: {len(called)} of {len(conversations)} call")
            for taken in called[:1]:
                print(f"  {taken.text.strip()} -> {taken.reply[0].content}")
        self.episodes += 1


def main(max_steps: int = 60) -> None:
    seed_everything(1)
    data = ScenarioDataModule(
        train=str(CALCULATOR / "train.jsonl"),
        validation=str(CALCULATOR / "validation.jsonl"),
        batch_size=32,
        eval_batch_size=128,
    )
    module = GRPOLightningModule(
        str(CALCULATOR / "model"),
        reward=NumericAnswer(),
        environment=EnvironmentConfig(Tools, {"functions": [multiply]}, max_turns=2),
        rollout=RolloutConfig(num_generations=8, max_new_tokens=20),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.0),
    )
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
    }
    trainer = Trainer(max_steps=max_steps, accelerator="cpu", gradient_clip_val=1.0, callbacks=[ShowCalls()], **options)
    before = trainer.validate(module, datamodule=data, verbose=False)[0]["val/reward"]
    trainer.fit(module, datamodule=data)
    after = trainer.validate(module, datamodule=data, verbose=False)[0]["val/reward"]
    print(f"validation reward {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
