"""Threads for calls that block, an event loop on a thread of its own for coroutines, and a sign of life.

The first two serve user code, which may fork, and servers that may hang for ever. All threads are daemon threads: a
call that hangs keeps neither the interpreter from ending nor Ctrl-C from working. A wait for such a call is
`interruptible`: a signal cuts it off.
"""

import asyncio
import inspect
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import IO, Any

_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]
_CLOSE_SECONDS = 1.0  # an event loop that is blocked for longer than this is left to its daemon thread
_WAIT_SECONDS = 3.0  # that a wait may go on once a signal has asked for the end
_LOOK_SECONDS = 1.0  # of a wait that looks whether a signal has come


class Interruption(SystemExit):
    """A signal has asked for the end, and what is waited for has not come in time."""

    code: int


class _MainThread:
    """Handlers of signals run in the main thread alone, wherever it is."""

    waits = False
    exit_code = 0  # that a signal asked for; 0: none


def cut_off_waits(exit_code: int) -> None:
    """From now on each `interruptible` wait raises `Interruption(exit_code)` after 3 seconds; with 0 none does.

    To be called in the main thread, by a handler of signals say. It takes the alarm signal.
    """
    if exit_code:
        signal.signal(signal.SIGALRM, _cut_off)
    before, _MainThread.exit_code = _MainThread.exit_code, exit_code
    if exit_code or before:  # a timer that outlived its handler would end the process
        _set_timer()


def _set_timer() -> None:
    """To be called only where a signal has come: one that comes just now sets it itself."""
    signal.setitimer(signal.ITIMER_REAL, _WAIT_SECONDS if _MainThread.exit_code and _MainThread.waits else 0)


@contextmanager
def interruptible() -> Iterator[None]:
    """A block that waits for user code or for a server, which may hang for ever.

    Raises:
        Interruption: After `cut_off_waits`. In other threads than the main one never.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waited, _MainThread.waits = _MainThread.waits, True
    if _MainThread.exit_code:
        _set_timer()
    try:
        yield
    finally:
        _MainThread.waits = waited
        if _MainThread.exit_code:
            _set_timer()


def _cut_off(*_: object) -> None:
    if _MainThread.waits:
        raise Interruption(_MainThread.exit_code)


class DaemonThreads(AbstractContextManager["DaemonThreads"]):
    """A pool of threads, started as calls come.

    `concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter exits, so one call that hangs would
    block the exit. This pool does not.

    Args:
        max_threads: Calls that run at the same time; the others wait.
        name: Name of the threads; each has a number appended.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        self._max_threads = max_threads
        self._name = name
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()  # a forked child has none of the threads
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)  # counts threads without a call

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run `function(*args)` on a thread. The future gets what it returns or raises.

        Raises:
            RuntimeError: If the pool is closed.
        """
        if self._closed:
            raise RuntimeError(f"the threads '{self._name}' are closed")
        if self._process != os.getpid():
            self._begin()
        future: Future[Any] = Future()
        self._queue.put((future, function, args))
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._max_threads:
            name, calls = f"{self._name}-{len(self._threads)}", (self._queue, self._idle)
            self._threads.append(threading.Thread(target=_serve, args=calls, name=name, daemon=True))
            self._threads[-1].start()
        return future

    @property
    def are_here(self) -> bool:
        """Whether this is called on one of the threads."""
        return threading.current_thread() in self._threads

    def __exit__(self, *exception: object) -> None:
        self.close(0)

    def close(self, seconds: float = 1.0) -> None:
        """Cancel the calls that wait, and give those that run `seconds` to end; a thread that hangs is left behind."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                if (call := self._queue.get_nowait()) is not None:
                    call[0].cancel()
        threads, self._threads = self._threads, []
        for _ in threads:
            self._queue.put(None)
        for thread in {*threads} - {threading.current_thread()}:
            thread.join(seconds / len(threads))


def wait_for(future: Future[Any], deadline: float = math.inf) -> Future[Any]:
    """The future, once it is done, or at `deadline`, of `time.monotonic`.

    It looks each second: a signal that comes just as a wait begins does not wake the main thread (CPython's own race).
    """
    while not future.done() and (seconds := deadline - time.monotonic()) > 0:
        wait([future], min(seconds, _LOOK_SECONDS))
    return future


def as_they_end(futures: Collection[Future[Any]]) -> Iterator[Future[Any]]:
    """The futures, each once it is done. Looks each second, see `wait_for`."""
    waiting = set(futures)
    while waiting:
        with suppress(TimeoutError):
            for future in as_completed(waiting, _LOOK_SECONDS):
                waiting.remove(future)
                yield future


def _serve(calls: queue.SimpleQueue[_Call | None], idle: threading.Semaphore) -> None:
    while (call := calls.get()) is not None:
        future, function, args = call
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*args))
            except BaseException as error:  # not swallowed: the future raises it for whoever waits
                future.set_exception(error)
        del call, future, function, args  # an idle thread must not keep a finished episode's texts alive
        idle.release()


class EventLoopThread:
    """Runs coroutines concurrently on an event loop of its own.

    So the caller may be inside a running loop (a notebook). The thread starts with the first call.

    Args:
        max_concurrency: Calls that run at the same time; the others wait.
        name: Name of the thread.
    """

    def __init__(self, max_concurrency: int, name: str) -> None:
        self._slots = asyncio.Semaphore(max_concurrency)
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, function: Callable[..., Awaitable[Any]], *args: Any, timeout: float | None = None) -> Future[Any]:
        """Await `function(*args)` on the loop. The future gets what it returns or raises.

        Args:
            function: Called on the loop's thread.
            args: Its arguments.
            timeout: Seconds until the call is cancelled and the future raises TimeoutError. Waiting for other calls
                does not count. None means no limit.

        Raises:
            RuntimeError: If the loop is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the event loop '{self._name}' is closed")
            if self._loop is None or self._loop.is_closed():
                runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
                self._loop = runner.get_loop()
                self._thread = threading.Thread(target=self._serve, args=(runner,), name=self._name, daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(self._run(function, args, timeout), self._loop)

    def close(self) -> None:
        """Cancel all calls and end the thread."""
        with self._lock:
            loop, self._loop, self._closed = self._loop, None, True
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(_CLOSE_SECONDS)

    def _serve(self, runner: asyncio.Runner) -> None:
        with suppress(BaseException), runner:  # which cancels all calls at its end; one that swallows it keeps it
            while not (self._closed or runner.get_loop().is_closed()):
                with suppress(BaseException):  # what a coroutine calls back may stop the loop, or raise SystemExit
                    runner.run(asyncio.Event().wait())

    async def _run(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...], timeout: float | None) -> Any:
        async with self._slots:
            task = asyncio.ensure_future(function(*args))
            try:
                # Not `wait_for`: it waits until the cancelled call has ended, and one that swallows cancellation never
                # does.
                await asyncio.wait({task}, timeout=timeout)
                if not task.done():
                    raise TimeoutError(f"no result within {timeout:g} s")
                return task.result()
            finally:
                task.cancel()


@contextmanager
def forked_child_ends() -> Iterator[None]:
    """End the child of a function that forked and let the child return, too: it would go on as a second caller."""
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(0)


def call_episode_hook(trainer: Any, hook: str, *args: Any) -> None:
    """Calls a hook of every callback that has it, in order, and waits for the async ones."""
    for callback in trainer.callbacks:
        result = getattr(callback, hook)(*args) if hasattr(callback, hook) else None
        if inspect.iscoroutine(result):
            # In a thread, since `asyncio.run` refuses inside a running event loop (a notebook).
            with ThreadPoolExecutor(1) as pool:
                pool.submit(asyncio.run, result).result()


# A sign of life -------------------------------------------------------------------------------------------------------


class Heartbeat:
    """A line whenever there was none for `seconds`: what the program is doing, and for how long.

    A log so shows that a slow run is alive. There is one for the process, `heartbeat`, since there is one log. A forked
    child has none until it starts its own.

    Args:
        seconds: Of silence, before a line is printed.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.spoke = 0.0  # when the last line was printed, of `time.monotonic`
        self._doing = ("", 0.0)  # what, and since when
        self._thread = threading.Thread()

    def start(self, what: str, file: IO[str] | None = None) -> None:
        """Begins to print, on the standard output of the moment unless a file is given."""
        self.doing(what)
        if not self._thread.is_alive():
            self.spoke, self._stopped = time.monotonic(), threading.Event()
            self._thread = threading.Thread(target=self._beat, args=(file, self._stopped), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Nothing is printed any more."""
        if self._thread.is_alive():  # not in a forked child, where the event's lock may be held for ever
            self._stopped.set()
            self._thread.join(_CLOSE_SECONDS)  # not for ever: it may be printing to a pipe that nobody reads

    def doing(self, what: str) -> None:
        """What the main thread does from now on; other threads work beside it."""
        if what != self._doing[0] and threading.current_thread() is threading.main_thread():
            self._doing = (what, time.monotonic())

    def say(self, line: str, file: IO[str] | None = None) -> None:
        """Prints a line at once, and in one piece, as another thread may print too."""
        self.spoke = time.monotonic()
        print(f"{line}\n", end="", file=file, flush=True)

    def _beat(self, file: IO[str] | None, stopped: threading.Event) -> None:
        with suppress(OSError, ValueError):  # the output is closed: the main thread's next line will tell
            while not stopped.wait(self.spoke + self.seconds - time.monotonic()):
                what, since = self._doing
                if (now := time.monotonic()) >= self.spoke + self.seconds:
                    self.say(f"{what}, {now - since:.0f} s so far", file)


heartbeat = Heartbeat(seconds=25)  # with what a print may take, a line at least every 30 s
