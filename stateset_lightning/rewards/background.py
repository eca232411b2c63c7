"""Where async rewards run: an event loop on its own thread, started by its first use, that does not keep the
interpreter alive.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from stateset_lightning.rewards.base import RewardFunction
from stateset_lightning.rewards.outcome import Outcome, evaluate_async, failure
from stateset_lightning.types import Turn

_CLOSE_SECONDS = 1.0  # what cannot be stopped within this (user code that blocks) is left to its daemon thread


class EventLoopThread:
    """Runs async rewards concurrently. It has its own loop, so the caller may be inside a running one (a notebook).

    Args:
        max_concurrency: Rewards that run at the same time; the others wait, and waiting does not count as their time.
    """

    def __init__(self, max_concurrency: int) -> None:
        self._max_concurrency = max_concurrency
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._lock = threading.Lock()

    def submit(
        self, reward: RewardFunction, turns: Sequence[Turn], context: Mapping[str, Any], timeout: float | None
    ) -> Future[Outcome]:
        loop = self._started()
        return asyncio.run_coroutine_threadsafe(self._bounded(reward, turns, context, timeout), loop)

    def run(self, coroutine: Coroutine[Any, Any, Outcome]) -> Outcome:
        """Run a coroutine on the loop and wait for it; called from another thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._started()).result()

    def close(self) -> None:
        """Cancel what runs and end the thread."""
        with self._lock:
            loop, self._loop, self._closed = self._loop, None, True
        if loop is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop)
        loop.call_soon_threadsafe(lambda: loop.call_later(0.01, loop.stop))
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            loop.close()

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise RuntimeError("the event loop of the async rewards is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._slots = asyncio.Semaphore(self._max_concurrency)
                self._thread = threading.Thread(target=self._loop.run_forever, name="async-rewards", daemon=True)
                self._thread.start()
            return self._loop

    async def _bounded(
        self, reward: RewardFunction, turns: Sequence[Turn], context: Mapping[str, Any], timeout: float | None
    ) -> Outcome:
        async with self._slots:
            task = asyncio.ensure_future(evaluate_async(reward, turns, context))
            try:
                # Not `wait_for`: it waits until the cancelled reward has ended, which one that swallows cancellation
                # never does.
                await asyncio.wait({task}, timeout=timeout)
                if not task.done():
                    return failure(TimeoutError(f"no result within {timeout:g} s"))
                return (
                    failure(asyncio.CancelledError("the reward cancelled itself"))
                    if task.cancelled()
                    else task.result()
                )
            finally:
                task.cancel()


async def _cancel_others() -> None:
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
