"""Hooks at the start and the end of every episode, for Lightning callbacks and for plain objects alike."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lightning.pytorch import Callback, Trainer


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
