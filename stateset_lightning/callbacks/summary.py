"""What a run did and where its files are, printed when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.callbacks.run_folder import config_file, metrics_place, run_folder


class RunSummary(Callback):
    """Remembers all validations and prints the first and the last, with the places of checkpoints, samples, metrics and config."""

    def __init__(self) -> None:
        self.validations: list[tuple[int, dict[str, float]]] = []  # optimizer steps done, metrics without their `val/`

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and "val/reward" in trainer.callback_metrics:
            metrics = {name.removeprefix("val/"): float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
            self.validations.append((trainer.global_step, metrics))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print("\n".join(self.lines(trainer)), flush=True)

    def lines(self, trainer: Trainer) -> list[str]:
        lines = [f"trained for {trainer.global_step} optimizer steps"]
        if self.validations:
            (first_step, first), (last_step, last) = self.validations[0], self.validations[-1]
            for name in _headlines(last):
                if last_step != first_step and name in first:
                    gain = f"-> {last[name]:.3f} after step {last_step} ({last[name] - first[name]:+.3f})"
                    lines.append(f"validation {name}: {first[name]:.3f} after step {first_step} {gain}")
                else:
                    lines.append(f"validation {name}: {last[name]:.3f} after step {last_step}")
        return lines + [f"{name}: {place}" for name, place in _places(trainer)]

    def state_dict(self) -> dict[str, Any]:
        return {"validations": [list(pair) for pair in self.validations]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validations = [(int(step), dict(metrics)) for step, metrics in state["validations"]]


def _headlines(metrics: Mapping[str, float]) -> list[str]:
    """The total; each reward where there are several, so that a held-out one stands beside the trained ones; samples' measures."""
    rewards = [name for name in metrics if name.startswith("reward/")]
    return ["reward", *(rewards if len(rewards) > 1 else []), *(n for n in metrics if n.startswith(("pass@", "majority@")))]


def _places(trainer: Trainer) -> Iterator[tuple[str, str | Path]]:
    """What the run left, by name, if it is there."""
    names = ("best_model_path", "last_model_path")
    best, last = (next((p for c in trainer.checkpoint_callbacks if (p := getattr(c, name, ""))), "") for name in names)
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
