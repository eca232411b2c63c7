"""What a run did and where its files are, printed when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.callbacks.run_folder import config_file, metrics_place, run_folder


class RunSummary(Callback):
    """Remembers the first and the last validation and prints both, with the places of checkpoints, samples, metrics and config."""

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
                gain = f"-> {last:.3f} after step {last_step} ({last - first:+.3f})"
                lines.append(f"validation reward: {first:.3f} after step {first_step} {gain}")
            else:
                lines.append(f"validation reward: {last:.3f} after step {last_step}")
        return lines + [f"{name}: {place}" for name, place in _places(trainer)]

    def state_dict(self) -> dict[str, list[list[float]]]:
        return {"validations": [list(pair) for pair in self.validations]}

    def load_state_dict(self, state: dict[str, list[list[float]]]) -> None:
        self.validations = [(int(step), reward) for step, reward in state["validations"]]


def _places(trainer: Trainer) -> Iterator[tuple[str, str | Path]]:
    """What the run left, by name, if it is there."""
    checkpoints = trainer.checkpoint_callback
    best, last = (getattr(checkpoints, name, "") for name in ("best_model_path", "last_model_path"))
    if best or last:
        yield "checkpoint", best or last
    if best and last and best != last:
        yield "last checkpoint", last
    samples, config = run_folder(trainer) / "samples.jsonl", config_file(trainer)
    if samples.exists():
        yield "samples", samples
    if metrics := metrics_place(trainer):
        yield "metrics", metrics
    if config.exists():
        yield "config", config
