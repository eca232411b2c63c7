"""The parent's side of worker processes: start them, hand them completions, kill and replace those that take too
long.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import worker
from stateset_lightning.rewards.base import RewardFunction
from stateset_lightning.rewards.outcome import Outcome, failure
from stateset_lightning.threads import DaemonThreads
from stateset_lightning.types import Turn

MAX_WORKERS = 4
LEAK_BYTES = 2**30
_LONGEST_POLL = 2e6  # seconds; the system call takes no more than some 2.1 million
_START_SECONDS = 120.0  # importing a user's module may take long, on a cold disk in particular
_REMEDY = (
    "define it at the top level of a module that can be imported, without lambdas, open files or clients as attributes;"
    " or write compute_reward as `async def`; or drop the time-out"
)


class WorkerDied(Exception):
    """The process that ran a reward ended by itself (`os._exit`, a segmentation fault, out of memory)."""


class WorkerPool:
    """Runs blocking rewards with time-outs in a few persistent worker processes, started when they are needed.

    Args:
        rewards: The rewards that workers run; a request names one by its index.
        num_workers: Workers at most; by default the number of processors, at most 4.

    Raises:
        ConfigError: If a reward cannot be pickled or is defined where a worker cannot import it.
    """

    def __init__(self, rewards: Sequence[RewardFunction], num_workers: int | None = None) -> None:
        if rewards and worker.inside_worker:
            raise ConfigError(
                f"a reward worker imports the training script, where reward '{rewards[0].name}' is defined, and the"
                " script starts training again: put what starts it under `if __name__ == '__main__':`, or move the"
                " reward to a module of its own"
            )
        self._setup = worker.setup_message([_pickled(reward) for reward in rewards])
        self._threads = DaemonThreads(num_workers or min(MAX_WORKERS, os.cpu_count() or 1), "reward-worker")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._started: set[_Worker] = set()
        self._closed = False

    def submit(self, index: int, turns: Sequence[Turn], context: Mapping[str, Any], timeout: float) -> Future[Outcome]:
        """Score one completion with reward `index`; the time-out (seconds) counts from when a worker begins."""
        return self._threads.submit(self._run, index, turns, context, timeout)

    def close(self) -> None:
        """Kill all workers, whatever they do."""
        with self._lock:
            self._closed = True
            workers, self._started, self._idle = self._started, set(), []
        for process in workers:
            process.kill()
        self._threads.close()

    def _run(self, index: int, turns: Sequence[Turn], context: Mapping[str, Any], timeout: float) -> Outcome:
        try:
            request = pickle.dumps((index, turns, context, timeout))
        except Exception as error:  # what a user's column holds may fail in any way
            return failure(error)
        process = self._take()
        outcome = process.call(request, timeout)
        if process.has_grown():
            process.kill()
        with self._lock:
            if process.alive and not self._closed:
                self._idle.append(process)
            else:
                self._started.discard(process)
        return outcome

    def _take(self) -> _Worker:
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.alive:
                    return process
                self._started.discard(process)  # it ended between two calls
            if self._closed:
                raise RuntimeError("the worker pool is closed")
            process = _Worker()
            self._started.add(process)
        process.set_up(self._setup)
        return process


class _Worker:
    """One worker process. Used by one thread at a time, except for `kill`."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        # A session of its own: Ctrl-C reaches the parent only, and what a reward starts is killed with it.
        self._process = subprocess.Popen(
            worker.command(theirs.fileno()),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        theirs.close()
        self._first_resident = 0

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def set_up(self, message: bytes) -> None:
        """Hand over the rewards and wait until they are loaded.

        Raises:
            ConfigError: If the worker cannot load them.
        """
        try:
            self._connection.send_bytes(message)
            answer = (
                self._connection.recv_bytes() if self._connection.poll(_START_SECONDS) else b"it did not start in time"
            )
        except (EOFError, OSError):
            self.kill()
            answer = f"the process ended with code {self._process.returncode}".encode()
        if answer != worker.READY:
            self.kill()
            raise ConfigError(
                "a worker process, which runs the rewards that have a time-out, could not load them. For each of them: "
                f"{_REMEDY}. What the worker says:\n{answer.decode(errors='replace')}"
            )

    def call(self, request: bytes, timeout: float) -> Outcome:
        """Run one request; the worker is killed if it takes longer than `timeout` seconds."""
        try:
            self._connection.send_bytes(request)
            if not self._connection.poll(None if timeout is None else min(timeout, _LONGEST_POLL)):
                self.kill()
                return failure(TimeoutError(f"no result within {timeout:g} s; the worker process was killed"))
            answer = self._connection.recv_bytes()
        except (EOFError, OSError):
            self.kill()
            return failure(
                WorkerDied(f"the worker process ended with code {self._process.returncode} while the reward ran")
            )
        try:
            outcome = pickle.loads(answer)
        except Exception as error:  # the breakdown holds a class that only the worker could import
            return failure(error)
        assert isinstance(outcome, Outcome)
        return outcome

    def has_grown(self) -> bool:
        """Whether it holds a GiB more than after its first call: a reward that leaks gets a fresh process. Linux only;
        elsewhere false.
        """
        try:
            resident = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):  # no /proc, or the process has ended
            return False
        self._first_resident = self._first_resident or resident
        return resident > self._first_resident + LEAK_BYTES

    def kill(self) -> None:
        """Kill the process and all that it started."""
        below = _descendants(self._process.pid)
        # not yet waited for, so its process group is still its own, even if it has ended
        if self._process.returncode is None:
            # only the ended process is left in the group (macOS: PermissionError)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for pid in below:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def _descendants(pid: int) -> list[int]:
    """The processes below one, also those that were started in sessions of their own. Linux only; elsewhere none."""
    below: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended meanwhile
            for child in map(int, children.read_text().split()):
                below += [child, *_descendants(child)]
    return below


def _pickled(reward: RewardFunction) -> bytes:
    why = f"reward '{reward.name}' is blocking (`def`) and has a time-out, so it runs in a worker process"
    try:
        message = pickle.dumps(reward)
    except Exception as error:  # what a user's object holds may fail in any way
        raise ConfigError(f"{why}, but it cannot be pickled ({error}): {_REMEDY}") from error
    if b"__main__" in message and not worker.main_script():
        raise ConfigError(
            f"{why}, but it is defined in a notebook or in typed-in code, which a worker cannot import: {_REMEDY}"
        )
    return message
