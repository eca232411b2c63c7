"""The guide's text classification, with the labels that it leaves out: `python examples/text_classification.py [STEPS]
[MODEL]`.

The bundled model knows arithmetic alone and answers in numbers, so the labels are numbers here. A second reward gives
some credit for whatever is a label at all: where no answer is right, all groups would be constant without it, and
nothing learned.
"""

import sys

from lightning.pytorch import Trainer, seed_everything
from torch.optim import AdamW

from stateset_lightning import EpisodeCallback, GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.rewards import ExactMatch, FunctionReward

LABELS = {"1": "negative", "2": "neutral", "3": "positive"}
TEXTS = {
    "This product is amazing!": "3",
    "Terrible service, very disappointed": "1",
    "It's okay, nothing special": "2",
}
INSTRUCTION = "Classify text sentiment: " + ", ".join(f"{number} for {label}" for number, label in LABELS.items())
SCENARIOS = [
    {"topic": "sentiment_analysis", "context": INSTRUCTION, "prompt": text, "target": label}
    for text, label in TEXTS.items()
]


def is_label(turns, context):
    """1 for a label, less the more is written beside it."""
    answer = turns[-1].content.strip()
    return 1 / len(answer) if any(label in answer for label in LABELS) else 0.0


class Printer(EpisodeCallback):
    def on_episode_end(self, episode, metrics):
        print(
            f"episode {episode}: reward {metrics['train/reward']:.3f}, of it right {metrics['reward/exact_match']:.3f}"
        )


def main(max_steps: int = 5, model: str = "tiny") -> None:
    seed_everything(42)
    module = GRPOLightningModule(
        model,
        reward=[ExactMatch(), FunctionReward(is_label, weight=0.2)],
        rollout=RolloutConfig(num_generations=16, max_new_tokens=8),
        optimizer=lambda parameters: AdamW(parameters, lr=1e-4 if model == "tiny" else 1e-6),
    )
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    trainer = Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[Printer()],
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, datamodule=ScenarioDataModule(train=SCENARIOS, batch_size=3))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, *sys.argv[2:])
