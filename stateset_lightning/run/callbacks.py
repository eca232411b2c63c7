"""Hooks at the start and the end of every episode, for Lightning callbacks and for plain objects alike."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import asyncio
import inspect
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stateset_lightning.errors import ConfigError, check_bounds
from stateset_lightning.run.folder import config_file, metrics_place, run_folder


class EpisodeCallback(Callback):
    """Calls `on_episode_start(episode)` and `on_episode_end(episode, metrics)` of an object; either may be missing or
    async.

    Without an object, override the two hooks in a subclass. Any Lightning callback that has them is called as well.

    Args:
        callback: An object with one or both of the hooks; any class will do.

    Example:
        >>> class Printer(EpisodeCallback):
        ...     def on_episode_end(self, episode, metrics):
        ...         print(f"episode {episode}: reward {metrics['train/reward']:.2f}")
        >>> Printer().on_episode_end(3, {"train/reward": 0.5})
        episode 3: reward 0.50
    """

    def __init__(self, callback: Any = None) -> None:
        if callback is not None and not any(hasattr(callback, hook) for hook in ("on_episode_start", "on_episode_end")):
            raise TypeError(f"{callback!r} has neither on_episode_start nor on_episode_end")
        self.callback = callback

    def on_episode_start(self, episode: int) -> Any:
        """Before the prompts of an episode are sampled. Episodes count from 0."""
        return self._call("on_episode_start", episode)

    def on_episode_end(self, episode: int, metrics: Mapping[str, float]) -> Any:
        """After the last optimizer step of an episode, with its newest metrics."""
        return self._call("on_episode_end", episode, metrics)

    def _call(self, hook: str, *args: Any) -> Any:
        return getattr(self.callback, hook)(*args) if hasattr(self.callback, hook) else None


def call_episode_hook(trainer: Trainer, hook: str, *args: Any) -> None:
    """Calls a hook of every callback that has it, in order, and waits for the async ones."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, hook):
            result = getattr(callback, hook)(*args)
            if inspect.iscoroutine(result):
                _wait_for(result)


def _wait_for(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Runs a coroutine to its end, also inside a running event loop (a notebook), where `asyncio.run` refuses."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, coroutine).result()


# MERGED: A reference policy that follows the trained one, a step at a time.


class ReferenceSync(Callback):
    """Mixes the policy into the reference every few optimizer steps (TR-DPO's soft update, arXiv:2404.09656, equation
    5).

    reference <- mixup * policy + (1 - mixup) * reference. `mixup` 1 is the hard update: the reference becomes the
    policy. An episode keeps the reference log-probs that it was made with; the next one sees the moved reference. The
    moved weights are in every checkpoint.

    Args:
        every_n_steps: Optimizer steps between updates.
        mixup: Share of the policy in the new reference.
    """

    def __init__(self, every_n_steps: Annotated[int, Ge(1)] = 64, mixup: Annotated[float, Gt(0), Le(1)] = 0.6) -> None:
        check_bounds("ReferenceSync", ReferenceSync.__init__, {"every_n_steps": every_n_steps, "mixup": mixup})
        self.every_n_steps = every_n_steps
        self.mixup = mixup
        self._reference: nn.Module | None = None
        self._last_step = 0  # the newest update; 0: none yet
        self._restored: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the reference; runs after a checkpoint was read.

        Raises:
            ConfigError: If there is no reference, or none with weights of its own.
        """
        policy, reference = getattr(pl_module, "policy", None), getattr(pl_module, "reference", None)
        if reference is None or policy is None:
            raise ConfigError(
                "ReferenceSync: the run has no reference policy to move; set model.algorithm.beta above 0, or remove"
                " the callback"
            )
        if any(isinstance(p, DTensor) for p in policy.parameters()):
            raise ConfigError(
                "ReferenceSync cannot mix sharded weights: remove the callback, or set trainer.strategy to ddp"
            )
        if not isinstance(reference, nn.Module):
            raise ConfigError(
                "ReferenceSync: the policy trains an adapter, and its reference is the policy as it started, with no"
                " weights of its own to move; nor is a mixture of two adapters' factors the mixture of the adapters."
                " Remove the callback, or train without adapter"
            )
        self._reference = reference
        if self._restored is not None:
            reference.load_state_dict(self._restored)
            self._restored = None

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Before ModelCheckpoint, which Lightning puts last: a checkpoint of this step holds the moved reference.
        step = trainer.global_step
        # further micro-steps of the next optimizer step, or its first
        if step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        assert self._reference is not None
        for mine, theirs in zip(self._reference.parameters(), pl_module.policy.parameters(), strict=True):  # type: ignore[union-attr]
            mine.lerp_(theirs, self.mixup)

    def state_dict(self) -> dict[str, Any]:
        """The newest update's step, and the reference's weights (not copied) once they have moved."""
        moved = self._reference is not None and self._last_step > 0
        return {
            "step": self._last_step,
            "reference": self._reference.state_dict() if moved and self._reference is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step, self._restored = state_dict["step"], state_dict["reference"]


# MERGED: What a run did and where its files are, printed when it ends.


class RunSummary(Callback):
    """Remembers all validations and prints the first and the last, with the places of checkpoints, samples, metrics and
    config.
    """

    def __init__(self) -> None:
        self.validations: list[tuple[int, dict[str, float]]] = []  # optimizer steps done, metrics without their `val/`

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and "val/reward" in trainer.callback_metrics:
            metrics = {
                name.removeprefix("val/"): float(v)
                for name, v in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
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
    """The total; each reward where there are several, so that a held-out one stands beside the trained ones; samples'
    measures.
    """
    rewards = [name for name in metrics if name.startswith("reward/")]
    return [
        "reward",
        *(rewards if len(rewards) > 1 else []),
        *(n for n in metrics if n.startswith(("pass@", "majority@"))),
    ]


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
