"""The guide's question answering, without right answers: `python examples/question_answering.py [STEPS] [MODEL]`.

The bundled model knows arithmetic alone; with it this only shows that everything runs. Name a model that speaks, on a
GPU, to see it learn.
"""

import sys

from lightning.pytorch import Trainer, seed_everything
from torch.optim import AdamW

from stateset_lightning import EpisodeCallback, GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.rewards import HelpfulnessReward

SCENARIOS = [
    {
        "topic": "science_qa",
        "context": "Answer science questions accurately",
        "user_responses": ["What is photosynthesis?", "Explain gravity", "What are atoms?"],
    }
]


class Printer(EpisodeCallback):
    def on_episode_end(self, episode, metrics):
        print(
            f"episode {episode}: reward {metrics['train/reward']:.3f}, {metrics['completion/mean_tokens']:.1f} tokens"
        )


def main(max_steps: int = 5, model: str = "tiny") -> None:
    seed_everything(42)
    module = GRPOLightningModule(
        model,
        reward=HelpfulnessReward(),
        rollout=RolloutConfig(num_generations=8, max_new_tokens=16 if model == "tiny" else 128),
        optimizer=lambda parameters: AdamW(parameters, lr=5e-5 if model == "tiny" else 1e-6),
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
