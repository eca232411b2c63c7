"""What a run did and where its files are, printed when it ends."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.callbacks.run_folder import run_folder


class RunSummary(Callback):
    """Remembers the first and the last validation and prints both, with the places of checkpoint, samples and metrics."""

    def __init__(self) -> None:
        self.validations: list[tuple[int, float]] = []  # optimizer steps done, mean reward

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and "val/reward" in trainer.callback_metrics:
            self.validations.append((trainer.global_step, float(trainer.callback_metrics["val/reward"])))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print("\n".join(self.lines(trainer)), flush=True)

    def lines(self, trainer: Trainer) -> list[str]:
        lines = [f"trained for {trainer.global_step} optimizer steps"]
        if self.validations:
            (first_step, first), (last_step, last) = self.validations[0], self.validations[-1]
            if last_step != first_step:
                lines.append(f"validation reward: {first:.3f} after step {first_step} -> {last:.3f} after step {last_step} ({last - first:+.3f})")
            else:
                lines.append(f"validation reward: {last:.3f} after step {last_step}")
        folder = run_folder(trainer)
        checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "") if trainer.checkpoint_callback else ""
        places = {"checkpoint": checkpoint, "samples": folder / "samples.jsonl", "metrics": folder / "metrics.csv", "config": folder / "config.yaml"}
        from pathlib import Path

        lines += [f"{name}: {place}" for name, place in places.items() if str(place) and Path(place).exists()]
        return lines

    def state_dict(self) -> dict[str, list[list[float]]]:
        return {"validations": [list(pair) for pair in self.validations]}

    def load_state_dict(self, state: dict[str, list[list[float]]]) -> None:
        self.validations = [(int(step), reward) for step, reward in state["validations"]]
