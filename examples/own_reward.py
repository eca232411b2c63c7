"""A reward and an episode callback of one's own: `python examples/own_reward.py [STEPS]`."""

import sys

from lightning.pytorch import Trainer, seed_everything

from stateset_lightning import (
    EpisodeCallback,
    GRPOLightningModule,
    RewardFunction,
    RewardResult,
    RolloutConfig,
    ScenarioDataModule,
)


class CloseNumber(RewardFunction):
    """1 for the right number, less the further away; answers that are no number are wrong, not failed."""

    def compute_reward(self, turns, context=None):
        answer = turns[-1].content.strip()
        if not answer.isdigit():
            return RewardResult(score=0.0, breakdown={"number": False})
        distance = abs(int(answer) - int(context["target"]))
        return RewardResult(score=1 / (1 + distance), breakdown={"number": True, "distance": distance})


class Printer(EpisodeCallback):
    def on_episode_end(self, episode, metrics):
        print(f"episode {episode}: reward {metrics['train/reward']:.3f}, mixed groups {metrics['groups/mixed']:.2f}")


def main(max_steps: int = 5) -> None:
    seed_everything(1)
    scenarios = [{"prompt": f"What is {a} + {b}?", "target": str(a + b)} for a in range(10, 18) for b in range(10, 18)]
    module = GRPOLightningModule(
        "tiny", reward=CloseNumber(), rollout=RolloutConfig(num_generations=8, max_new_tokens=8)
    )
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    trainer = Trainer(
        max_steps=max_steps, accelerator="cpu", callbacks=[Printer()], use_distributed_sampler=False, **options
    )
    trainer.fit(module, datamodule=ScenarioDataModule(train=scenarios, batch_size=8))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
