"""Threads for blocking calls that nobody can hurry: user code, servers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class DaemonThreads:
    """A pool of threads, started as calls come.

    `concurrent.futures.ThreadPoolExecutor` joins its threads at interpreter exit, so that one call that hangs would
    hang Ctrl-C as well. These are daemon threads.

    Args:
        max_threads: Calls that run at the same time; the others wait.
        name: Of the threads, with a number behind it.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        self._max_threads = max_threads
        self._name = name
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Runs a call; what it returns or raises is the future's."""
        if self._closed:
            raise RuntimeError(f"the threads '{self._name}' are closed")
        future: Future[Any] = Future()
        self._queue.put((future, function, args))
        if len(self._threads) < self._max_threads:
            thread = threading.Thread(
                target=_serve, args=(self._queue,), name=f"{self._name}-{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        return future

    def close(self, seconds: float = 1.0) -> None:
        """Cancels what waits, and waits this long for what runs; a thread that hangs longer is left behind."""
        self._closed = True
        while not self._queue.empty():
            try:
                item = self._queue.get_nowait()
            except queue.Empty:  # a thread was quicker
                break
            if item is not None:
                item[0].cancel()
        threads, self._threads = self._threads, []
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join(seconds / len(threads))


def _serve(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        future, function, args = call
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = function(*args)
        except BaseException as error:  # not swallowed: whoever waits for the future gets it
            future.set_exception(error)
        else:
            future.set_result(result)
        del call, future, function, args  # an idle thread must not keep a finished episode's texts alive
