"""A pool of worker processes, from the parent's side: start them, give them calls, kill and replace them."""

import os
import pickle
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from multiprocessing import Pipe, spawn
from pathlib import Path
from typing import Any
from weakref import WeakSet

from stateset_lightning.errors import ConfigError, told_as
from stateset_lightning.threads import DaemonThreads
from stateset_lightning.workers import process

MAX_WORKERS = 4
LEAK_BYTES = 2**30
_START_SECONDS = 120.0  # importing a user's module may take long, from a cold disk in particular
_END_SECONDS = 5.0  # that the guard of a worker may take to end all that the worker started
_REMEDY = "define it at the top level of a module that can be imported, without lambdas, open files or clients in it"


class WorkerDied(Exception):
    """The worker process ended during a call (`os._exit`, a segmentation fault, out of memory)."""


class WorkerPool:
    """Runs functions with a time-out in a few persistent worker processes, which start when they are needed.

    A call that takes too long is stopped by killing its process, with all processes that it started. So are all workers
    when this process ends, however it does.

    Args:
        remedy: What else a user may do if a function cannot be sent to a worker; it ends such an error's message.
        num_workers: Workers at most; by default the number of processors, at most 4.
    """

    def __init__(self, *, remedy: str = "", num_workers: int | None = None) -> None:
        self._remedy = _REMEDY + remedy
        self._functions: dict[str, bytes] = {}
        self._threads = DaemonThreads(num_workers or min(MAX_WORKERS, os.cpu_count() or 1), "worker")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._started: WeakSet[_Worker] = WeakSet()  # those that run, or may run
        self._closed = False

    def add(self, name: str, function: Callable[..., Any]) -> None:
        """Add a function that workers can run, before the first call. It may be async.

        It is pickled here, once, and loaded when a worker starts, before any time-out begins.

        Args:
            name: For `submit` and for error messages: `reward 'judge'`.
            function: Any callable that can be pickled.

        Raises:
            ConfigError: If it cannot be pickled, or is defined where a worker cannot import it.
        """
        if process.inside_worker:
            why = f"{name} is defined in the training script, which starts training again where a worker imports it"
            raise ConfigError(f"{why}: put what starts it under `if __name__ == '__main__':`")
        why = f"{name} runs in a worker process, which can be killed at its time-out"
        # What a user's object holds may fail in any way.
        with told_as(ConfigError, f"{why}, but it cannot be pickled (", after=f"): {self._remedy}"):
            self._functions[name] = pickle.dumps(function)
        if b"__main__" in self._functions[name] and not _main_script():
            raise ConfigError(f"{why}, but it is defined in a notebook or in typed-in code: {self._remedy}")

    def submit(self, name: str, timeout: float, *args: Any) -> Future[Any]:
        """Call a function in a worker.

        The future gets what the function returns or raises. It raises TimeoutError after `timeout` seconds, which count
        from when a worker begins; WorkerDied if the process ended; ConfigError if the worker could not load its
        functions; or what pickling raises if arguments or result cannot be sent.

        Raises:
            RuntimeError: If the pool is closed.
        """
        return self._threads.submit(self._call, name, timeout, args)

    def close(self) -> None:
        """Kill all workers, whatever they do."""
        with self._lock:
            self._closed = True
        for worker in list(self._started):
            worker.kill()
        self._threads.close()

    def _call(self, name: str, timeout: float, args: tuple[Any, ...]) -> Any:
        request = pickle.dumps((name, args))
        worker = self._take()
        try:
            return worker.call(request, timeout)
        finally:
            if worker.has_grown():
                worker.kill()
            self._idle.append(worker)

    def _take(self) -> "_Worker":
        with self._lock:
            while self._idle:
                if (worker := self._idle.pop()).alive:
                    return worker
            if self._closed:
                raise CancelledError("the worker pool is closed")
            worker = _Worker()
            self._started.add(worker)
        script = _main_script() if any(b"__main__" in function for function in self._functions.values()) else {}
        try:
            worker.pid = worker.call(pickle.dumps((process.LOAD, (script, self._functions))), _START_SECONDS)
        except Exception as error:  # importing a user's code may raise anything
            worker.kill()
            names, said = ", ".join(self._functions), "".join(traceback.format_exception_only(error))
            raise ConfigError(f"a worker, which runs {names}, could not load them: {self._remedy}.\n{said}") from error
        return worker


class _Worker:
    """One worker process, behind its guard. Used by one thread at a time, except for `kill`."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        number, nothing = theirs.fileno(), subprocess.DEVNULL
        # In a session of its own: Ctrl-C reaches the trainer only.
        self._process = subprocess.Popen(
            process.command(number), pass_fds=[number], stdin=nothing, stdout=nothing, start_new_session=True
        )
        theirs.close()
        self.pid = 0  # known when it has loaded its functions
        self._first_resident = 0

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, request: bytes, timeout: float) -> Any:
        """Send a call and wait for its result; the process is killed after `timeout` seconds."""
        token, begun = os.urandom(16), time.monotonic()
        timer = threading.Timer(min(timeout, threading.TIMEOUT_MAX), self.kill)  # ends whatever this thread waits for
        timer.daemon = True
        timer.start()
        try:
            self._connection.send_bytes(token)
            self._connection.send_bytes(request)
            answer = self._connection.recv_bytes(process.LARGEST_ANSWER)
            if not answer.startswith(token):
                raise OSError("the function wrote into the worker's pipe")
        except (EOFError, OSError) as error:
            self.kill()
            if time.monotonic() - begun >= timeout:
                raise TimeoutError(f"no result within {timeout:g} s; the worker process was killed") from None
            why = f": {error}" if str(error) else ""
            code = self._process.returncode
            raise WorkerDied(f"the worker process ended with code {code} during the call{why}") from None
        finally:
            timer.cancel()
            timer.join()
        succeeded, value = pickle.loads(answer.removeprefix(token))
        if not succeeded:
            raise value
        return value

    def has_grown(self) -> bool:
        """Whether it holds a GiB more than after its first call: a function that leaks gets a fresh process.

        Linux only; elsewhere false.
        """
        try:
            resident = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):  # no /proc, or the process has ended
            return False
        self._first_resident = self._first_resident or resident
        return resident > self._first_resident + LEAK_BYTES

    def kill(self) -> None:
        """Kill the process and all that it started."""
        for number in (signal.SIGCONT, signal.SIGTERM):  # a function may have stopped the guard
            self._process.send_signal(number)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the worker ends with its guard
        # One that nobody could end may still hold the other end.
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)


def _main_script() -> dict[str, Any]:
    """Where the parent's `__main__` comes from; empty if it has no file (a notebook, `python -c`)."""
    data: dict[str, Any] = dict(spawn.get_preparation_data("worker"))
    script = {key: value for key, value in data.items() if key == "sys_argv" or key.startswith("init_main")}
    return script if len(script) > 1 else {}
