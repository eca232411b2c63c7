"""The worker process: runs one call at a time in its main thread, under the eyes of a guard.

A worker is started with `command`. Each message names a function and its arguments; the answer is a result or an
exception, behind the token of its call: a function may write into the pipe. The first call is of `LOAD`, which brings
the other functions. The process may be killed at any moment: it holds no state that matters.

It is a fresh interpreter and no `multiprocessing` child: those import the training script, and with it torch, every
time. This one imports the script only if a function is defined in it.

What the trainer starts and kills is the guard. It forks the worker, ends with it or with the trainer, whichever is
first, and takes all that the worker started with it. It passes what the worker prints on to the trainer's standard
error, so that prints of a function do not mix with the trainer's output.
"""

import asyncio
import inspect
import os
import pickle
import select
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from stateset_lightning.redaction import redact_streams
from stateset_lightning.threads import forked_child_ends
from stateset_lightning.workers.sandbox import CHILD_SUBREAPER, PDEATHSIG, end_all, prctl

LOAD = "load"

# Bytes; what a function writes into the pipe may be read as the length of an answer.
LARGEST_ANSWER = 2**26

# Whether this process is a worker. A training script that a worker imports must not start workers in turn.
inside_worker = False

_LIBRARY = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sysconfig.get_config_var("DESTSHARED")]
_MOST_OUTPUT, _OUTPUT_SECONDS = 2**20, 10.0  # so many bytes are passed on in so many seconds
_DROPPED = b"\n(a reward prints too much: the rest of these 10 s is dropped)\n"


def command(file_descriptor: int) -> list[str]:
    """The command line of a worker that talks over `file_descriptor`.

    It finds the modules that the trainer finds. But nothing in the working folder, or beside the config, takes the
    place of a module of the standard library, which the trainer may have imported before.
    """
    path = sorted(sys.path, key=lambda entry: entry not in _LIBRARY)
    begin = f"import sys; sys.path[:] = {path!r}; from stateset_lightning.workers import process"
    return [sys.executable, "-P", "-u", "-c", f"{begin}; process.main({file_descriptor})"]


def main(file_descriptor: int) -> None:
    """Be the guard of a worker that serves until the trainer closes its end of the connection or dies."""
    prctl(PDEATHSIG, signal.SIGTERM)
    prctl(CHILD_SUBREAPER, 1)  # what the worker's children leave behind comes to the guard
    output, printed = os.pipe()
    if worker := os.fork():
        os.close(printed)
        _guard(worker, file_descriptor, output)
    os.setsid()
    prctl(PDEATHSIG, signal.SIGKILL)
    for stream in (1, 2):
        os.dup2(printed, stream)
    os.close(output)
    os.close(printed)
    _serve(Connection(file_descriptor))


# The guard ------------------------------------------------------------------------------------------------------------


def _guard(worker: int, connection: int, output: int) -> NoReturn:
    """Wait for the worker's end, and end all that it started."""
    # Not with a handler: it would run in this thread, and a signal that reaches another one does not end its wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    hang_up = select.poll()
    hang_up.register(connection, 0)
    for end in (hang_up.poll, partial(signal.sigwait, {signal.SIGTERM})):
        threading.Thread(target=_kill_after, args=(end, worker), daemon=True).start()
    forwarding = threading.Thread(target=_forward, args=(output,), daemon=True)
    forwarding.start()
    ended = status = 0
    while ended != worker:  # orphans end here, too
        ended, status = os.waitpid(-1, 0)
    end_all(worker)
    forwarding.join(1.0)
    os._exit(os.waitstatus_to_exitcode(status) % 256)


def _kill_after(end: Callable[[], object], worker: int) -> None:
    """Kill the worker at the trainer's end or at its word. It could not do so: it may hold the interpreter."""
    end()
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)


def _forward(output: int) -> None:
    """Pass on what the worker prints, but no flood."""
    window, left = 0.0, 0
    while printed := os.read(output, 2**16):
        if time.monotonic() > window:
            window, left = time.monotonic() + _OUTPUT_SECONDS, _MOST_OUTPUT
        with suppress(OSError):  # the trainer's standard error is closed
            os.write(2, printed[: max(left, 0)] + (_DROPPED if 0 < left <= len(printed) else b""))
        left -= len(printed)


# The worker -----------------------------------------------------------------------------------------------------------


def _serve(connection: Connection) -> None:
    global inside_worker
    inside_worker = True
    redact_streams()
    functions: dict[str, Callable[..., Any]] = {}
    functions[LOAD] = partial(_load, functions)
    loop = asyncio.new_event_loop()  # one for the worker's life: clients that a function keeps are bound to it
    with suppress(EOFError, OSError):
        while True:
            token, request = connection.recv_bytes(), connection.recv_bytes()
            if loop.is_closed():  # by a function
                loop = asyncio.new_event_loop()
            connection.send_bytes(token + _answer(functions, request, loop))


def _load(functions: dict[str, Callable[..., Any]], script: dict[str, Any], pickled: Mapping[str, bytes]) -> int:
    """Load functions; `script` says where to find the parent's `__main__`, if one of them is defined there.

    Returns:
        The worker's process id.
    """
    if script:
        spawn.prepare(script)
    functions.update({name: pickle.loads(function) for name, function in pickled.items()})
    return os.getpid()


def _answer(functions: Mapping[str, Callable[..., Any]], request: bytes, loop: asyncio.AbstractEventLoop) -> bytes:
    """Run a call. The answer is a pickled (True, result) or (False, exception)."""
    try:
        with forked_child_ends():
            name, args = pickle.loads(request)
            result = functions[name](*args)
            if inspect.isawaitable(result):
                result = loop.run_until_complete(result)
        answer = pickle.dumps((True, result))
        if len(answer) >= LARGEST_ANSWER:
            raise ValueError(f"the result is too large: {len(answer):,} bytes")
        return answer
    except BaseException as error:  # code under test, or an imported script, may call exit(); a panic is no Exception
        return _pickled(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that the function left would end a later call


def _pickled(error: BaseException) -> bytes:
    trace = f"In the worker process:\n{''.join(traceback.format_exception(error))}"
    if isinstance(error, Exception):
        error.add_note(trace)
        with suppress(Exception):  # it may hold something that cannot be pickled: then its text goes instead
            pickle.loads(pickled := pickle.dumps((False, error)))
            return pickled
    with suppress(Exception):
        return pickle.dumps((False, RuntimeError(trace)))
    os._exit(1)  # the function has taken away modules that pickle needs: the next call gets a new worker
