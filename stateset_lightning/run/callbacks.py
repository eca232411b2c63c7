"""Callbacks of a run: hooks around every episode, a reference policy that moves, lines of progress, and a summary."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from stateset_lightning.environments.player import TurnTaken
from stateset_lightning.errors import ConfigError, bounded
from stateset_lightning.run.folder import METRICS, SAMPLES, config_file, run_folder
from stateset_lightning.threads import heartbeat
from stateset_lightning.training.schedule import optimizer_steps_of_run


class EpisodeCallback(Callback):
    """Calls an object's hooks: `on_episode_start(episode)`, `on_episode_end(episode, metrics)` and `on_turn_end`.

    Each may be missing, or async. Without an object, override them in a subclass. Any other Lightning callback that has
    them is called as well.

    Args:
        callback: An object with one of the hooks or more; any class will do.

    Example:
        >>> class Printer(EpisodeCallback):
        ...     def on_episode_end(self, episode, metrics):
        ...         print(f"episode {episode}: reward {metrics['train/reward']:.2f}")
        >>> Printer().on_episode_end(3, {"train/reward": 0.5})
        episode 3: reward 0.50
    """

    def __init__(self, callback: Any = None) -> None:
        hooks = "on_episode_start", "on_episode_end", "on_turn_end"
        if callback is not None and not any(hasattr(callback, hook) for hook in hooks):
            raise TypeError(f"{callback!r} has none of {', '.join(hooks)}")
        self.callback = callback

    def on_episode_start(self, episode: int) -> Any:
        """Before the prompts of an episode are sampled. Episodes count from 0."""
        return self._call("on_episode_start", episode)

    def on_episode_end(self, episode: int, metrics: Mapping[str, float]) -> Any:
        """After the last optimizer step of an episode, with its newest metrics."""
        return self._call("on_episode_end", episode, metrics)

    def on_turn_end(self, trainer: Trainer, pl_module: Any, turn: int, conversations: Sequence[TurnTaken]) -> Any:
        """After each turn of a batch's conversations, which counts from 1, in training and evaluation.

        `conversations` are those of this rank that took it, each with `id` (the scenario's), `text` (the model's),
        `reply` (the environment's turns) and `ended`. A run that samples ahead calls it on the thread that samples.
        """
        return self._call("on_turn_end", trainer, pl_module, turn, conversations)

    def _call(self, hook: str, *args: Any) -> Any:
        return getattr(self.callback, hook)(*args) if hasattr(self.callback, hook) else None


@bounded("ReferenceSync")
class ReferenceSync(Callback):
    """Mixes the policy into the reference every few optimizer steps: TR-DPO's soft update, arXiv:2404.09656, eq. 5.

    reference <- mixup * policy + (1 - mixup) * reference. `mixup` 1 is the hard update: the reference becomes the
    policy. An episode keeps the reference log-probs that it was made with; the next one sees the moved reference. The
    moved weights are in every checkpoint.

    Args:
        every_n_steps: Optimizer steps between updates.
        mixup: Share of the policy in the new reference.
    """

    def __init__(self, every_n_steps: Annotated[int, Ge(1)] = 64, mixup: Annotated[float, Gt(0), Le(1)] = 0.6) -> None:
        self.every_n_steps = every_n_steps
        self.mixup = mixup
        self._reference: nn.Module | None = None
        self._last_step = 0  # of the newest update; 0: none yet
        self._restored: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the reference; runs after a checkpoint was read.

        Raises:
            ConfigError: If there is no reference, or none with unsharded weights of its own.
        """
        reference: Any = getattr(pl_module, "reference", None)
        problem = ""
        if reference is None:
            problem = "finds no reference policy to move; set model.algorithm.beta above 0, or"
        elif pl_module.is_sharded:
            problem = "cannot mix sharded weights; set trainer.strategy to ddp, or"
        elif not isinstance(reference, nn.Module):
            # Nor is a mixture of two adapters' factors the mixture of the adapters.
            problem = "finds a reference with no weights of its own to move: the policy trains an adapter;"
        if problem:
            raise ConfigError(f"ReferenceSync {problem} remove the callback")
        self._reference = reference
        if self._restored is not None:
            reference.load_state_dict(self._restored)
            self._restored = None

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        # Before ModelCheckpoint, which Lightning puts last: a checkpoint of this step holds the moved reference.
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._last_step:  # a step may have further micro-steps
            self._last_step = step
            assert self._reference is not None
            for mine, theirs in zip(self._reference.parameters(), pl_module.policy.parameters(), strict=True):  # type: ignore[union-attr]
                mine.lerp_(theirs, self.mixup)

    def state_dict(self) -> dict[str, Any]:
        """The newest update's step, and the reference's weights (not copied) once they have moved."""
        moved = self._reference.state_dict() if self._reference is not None and self._last_step else None
        return {"step": self._last_step, "reference": moved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step, self._restored = state_dict["step"], state_dict["reference"]


# Progress, as plain lines: in logs and pipes a bar that redraws itself shows nothing ----------------------------------

# Of a line: label, metric, format.
FIELDS = [("reward", "train/reward", ".3f"), ("mixed groups", "groups/mixed", ".2f")]
FIELDS += [("tokens", "completion/mean_tokens", ".1f"), ("tokens/s", "work/tokens_per_s", ".0f")]


@bounded("ConsoleProgress")
class ConsoleProgress(Callback):
    """Prints a line every few optimizer steps: reward, mixed groups, completion length, tokens per second, time left.

    Where steps are slow, after every one that ends 10 s or more after the last line; and at least every 30 s
    a line that says what the run is doing. The time left follows from the newest steps.

    Args:
        every_n_steps: Optimizer steps between lines.
    """

    def __init__(self, every_n_steps: Annotated[int, Ge(1)] = 20) -> None:
        self.every_n_steps = every_n_steps
        self._step = 0  # the newest one that has ended
        self._ended = 0.0  # when, of `time.monotonic`
        self._seconds: deque[float] = deque(maxlen=10)  # of the newest optimizer steps, with what lies between them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            heartbeat.start("loading the model")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: Any) -> None:
        heartbeat.stop()

    on_exception = teardown  # type: ignore[assignment]  # Lightning leaves `teardown` out then

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        heartbeat.doing("saving a checkpoint")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._ended = trainer.global_step, time.monotonic()
        self._seconds.clear()

    def on_train_batch_start(self, *args: Any) -> None:
        heartbeat.doing("training")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step, now = trainer.global_step, time.monotonic()
        if step == self._step:  # it may have further micro-steps
            return
        self._seconds.append(now - self._ended)
        self._step, self._ended = step, now
        if trainer.is_global_zero and (step % self.every_n_steps == 0 or step == 1 or now - heartbeat.spoke >= 10):
            heartbeat.say(self._line(trainer, step))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        reward = trainer.callback_metrics.get("val/reward")
        if reward is not None and trainer.is_global_zero and not trainer.sanity_checking:
            heartbeat.say(f"validation after step {pl_module.weights_step}: reward {reward:.3f}")

    def _line(self, trainer: Trainer, step: int) -> str:
        total, metrics = optimizer_steps_of_run(trainer), trainer.callback_metrics
        fields = [f"step {step}" + (f"/{total}" if total else "")]
        fields += [f"{label} {format(float(metrics[name]), form)}" for label, name, form in FIELDS if name in metrics]
        if total:
            seconds = int(median(self._seconds) * (total - step))
            fields.append(f"{seconds // 60}:{seconds % 60:02d} left")
        return "  ".join(fields)


class RunSummary(Callback):
    """Prints the first and the last validation at the run's end, and where its files are."""

    def __init__(self) -> None:
        self.validations: list[tuple[int, dict[str, float]]] = []  # optimizer steps done, metrics without their `val/`

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {key[4:]: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        if "reward" in metrics and not trainer.sanity_checking:
            self.validations.append((trainer.global_step, metrics))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            heartbeat.say("\n".join(self.lines(trainer)))

    def lines(self, trainer: Trainer) -> list[str]:
        lines = [f"trained for {trainer.global_step} optimizer steps"]
        if self.validations:
            (first_step, first), (last_step, last) = self.validations[0], self.validations[-1]
            for name in _headlines(last):
                told = f"{last[name]:.3f} after step {last_step}"
                if last_step != first_step and name in first:
                    told = f"{first[name]:.3f} after step {first_step} -> {told} ({last[name] - first[name]:+.3f})"
                lines.append(f"validation {name}: {told}")
        return lines + [f"{name}: {place}" for name, place in _places(trainer).items() if place]

    def state_dict(self) -> dict[str, Any]:
        return {"validations": [list(pair) for pair in self.validations]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validations = [(int(step), dict(metrics)) for step, metrics in state["validations"]]


def _headlines(metrics: Mapping[str, float]) -> list[str]:
    """The total; each reward where there are several, so that a held-out one stands beside the others; pass@k."""
    rewards = [name for name in metrics if name.startswith("reward/")]
    of_samples = [name for name in metrics if name.startswith(("pass@", "majority@"))]
    return ["reward", *(rewards if len(rewards) > 1 else []), *of_samples]


def _places(trainer: Trainer) -> dict[str, Path | str]:
    """Where the run left what; empty where it left nothing."""
    best = next(filter(None, (getattr(c, "best_model_path", "") for c in trainer.checkpoint_callbacks)), "")
    last = next(filter(None, (getattr(c, "last_model_path", "") for c in trainer.checkpoint_callbacks)), "")
    folder = run_folder(trainer)
    files = {"samples": folder / SAMPLES, "metrics": folder / METRICS, "config": config_file(trainer)}
    places: dict[str, Path | str] = {"checkpoint": best or last, "last checkpoint": "" if best in ("", last) else last}
    return places | {name: file for name, file in files.items() if file.exists()}
