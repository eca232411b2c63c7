"""Environments in worker processes: one that hangs, leaks or crashes takes its process with it, and not the run.

A process has the environments of several conversations, whose calls it answers one after another. One that takes too
long is stopped by killing its process, which fails its own conversation; others that live there lose their state, and
fail when they are called next. A fresh process takes the dead one's place. What waits for its process does not count as
an environment's time.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import Any

from stateset_lightning.environments.adapters import Driver, Settings
from stateset_lightning.environments.base import EnvironmentFailure, Opening, Reply
from stateset_lightning.environments.config import EnvironmentConfig
from stateset_lightning.environments.tool_calls import Call, Malformed
from stateset_lightning.environments.tools import UserCode
from stateset_lightning.workers import WorkerPool

_CALL, _CLOSE_SECONDS = "model.environment.factory", 1.0
_REMEDY = "; or leave model.environment.processes out: environments then run on threads of the trainer"
_LOST = "was lost when its process ended, by another conversation's environment or by what it holds in memory"

_drivers: dict[int, Driver] = {}  # of this worker process, by the number of the conversation


class Processes:
    """Worker processes with the environments of one play.

    Args:
        config: How many, and how long a call may take.
        make: A new environment; it is pickled.

    Raises:
        ConfigError: If the environment cannot be made in another process.
    """

    def __init__(self, config: EnvironmentConfig, make: Callable[[], Driver]) -> None:
        self._timeout = config.timeout
        self._pools = [WorkerPool(remedy=_REMEDY, num_workers=1) for _ in range(config.processes)]
        for pool in self._pools:
            pool.add(_CALL, partial(_call, make))

    def submit(self, n: int, method: str, *args: Any) -> Future[Any]:
        """Calls a method of a conversation's driver."""
        return self._pools[n % len(self._pools)].submit(_CALL, self._timeout, n, method, *args)

    def close(self) -> None:
        """Closes all environments, if they do so within a second, and kills the processes."""
        wait([pool.submit(_CALL, _CLOSE_SECONDS, -1, "close") for pool in self._pools], _CLOSE_SECONDS)
        for pool in self._pools:
            pool.close()


class HostedDriver(Driver):
    """Plays a conversation with an environment in a process; rewards cannot have the environment itself.

    Beside what a driver raises, its calls raise TimeoutError and WorkerDied.

    Args:
        processes: One of which has the environment.
        n: The number of the conversation.
        tokenizer: Which knows what tool calls look like. They are read here: a process does without torch.
        code: Whose thread waits for the process.
    """

    def __init__(self, processes: Processes, n: int, tokenizer: Any, code: UserCode) -> None:
        super().__init__(None, Settings(tokenizer), code)
        self._submit = partial(processes.submit, n)

    def reset(self, columns: Mapping[str, Any], seed: int) -> Opening:
        opening, self.schemas = self._submit("reset", dict(columns), seed).result()
        return opening

    def answer(self, text: str, calls: list[Call | Malformed]) -> Reply:
        return self._submit("answer", text, calls).result()

    def get_reward(self) -> float | None:
        return self._submit("get_reward").result()

    def _release(self) -> None:
        with suppress(RuntimeError):  # all of them are closed
            self._submit("close")


def _call(make: Callable[[], Driver], n: int, method: str, *args: Any) -> Any:
    """In a worker process: calls a method of a conversation's driver; -1 closes those of all."""
    if method == "close":
        for number in set(_drivers) if n == -1 else {n} & set(_drivers):
            _drivers.pop(number).close()
        return None
    if method == "reset":
        _drivers[n] = make()
        return _drivers[n].reset(*args), _drivers[n].schemas
    if n not in _drivers:
        raise EnvironmentFailure(_LOST)
    return getattr(_drivers[n], method)(*args)
