"""The worker process: runs one call at a time in its main thread.

A worker is started with `command`. Each message names a function, its time-out and its arguments; the answer is a
result or an exception, behind the token of its call: a function may write into the pipe. The first call is of `LOAD`,
which brings the other functions. The process may be killed at any moment: it holds no state that matters.

It is a fresh interpreter and no `multiprocessing` child: those import the training script, and with it torch, every
time. This one imports the script only if a function is defined in it. Its standard output is the parent's standard
error, so that prints of a function do not mix with the parent's output.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import Any

from stateset_lightning.redaction import redact_streams

LOAD = "load"

# Whether this process is a worker. A training script that a worker imports must not start workers in turn.
inside_worker = False

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from stateset_lightning.workers import process; process.main(int(sys.argv[2]))"
)
_ORPHAN_SECONDS = 3.0  # beyond the time-out


def command(file_descriptor: int) -> list[str]:
    """The command line of a worker that talks over `file_descriptor`."""
    return [sys.executable, "-u", "-c", _BOOT, json.dumps(sys.path), str(file_descriptor)]


def main(file_descriptor: int) -> None:
    """Serve until the parent closes its end of the connection or dies."""
    global inside_worker
    inside_worker = True
    redact_streams()
    connection = Connection(file_descriptor)
    functions: dict[str, Callable[..., Any]] = {}
    functions[LOAD] = partial(_load, functions)
    loop = asyncio.new_event_loop()  # one for the worker's life: clients that a function keeps are bound to it
    while True:
        try:
            token, request = connection.recv_bytes(), connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        connection.send_bytes(token + _answer(functions, request, loop))


def _load(functions: dict[str, Callable[..., Any]], script: dict[str, Any], pickled: Mapping[str, bytes]) -> None:
    """Load functions; `script` says where to find the parent's `__main__`, if one of them is defined there."""
    if script:
        spawn.prepare(script)
    functions.update({name: pickle.loads(function) for name, function in pickled.items()})


def _answer(functions: Mapping[str, Callable[..., Any]], request: bytes, loop: asyncio.AbstractEventLoop) -> bytes:
    """Run a call. The answer is a pickled (True, result) or (False, exception)."""
    process = os.getpid()
    try:
        name, timeout, args = pickle.loads(request)
        # The parent kills a worker that takes too long. If the parent has died, the kernel's alarm does: no Python code
        # would get to run while a regular expression holds the interpreter.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout + _ORPHAN_SECONDS)
        result = functions[name](*args)
        if inspect.isawaitable(result):
            result = loop.run_until_complete(result)
        return pickle.dumps((True, result))
    except (Exception, SystemExit) as error:  # SystemExit: code under test, or an imported script, may call exit()
        return _pickled(error)
    finally:
        if os.getpid() != process:  # the function forked, and this is the child: it would answer a second time
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _pickled(error: Exception | SystemExit) -> bytes:
    trace = f"In the worker process:\n{''.join(traceback.format_exception(error))}"
    if isinstance(error, Exception):
        error.add_note(trace)
        with suppress(Exception):  # it may hold something that cannot be pickled: then its text goes instead
            return pickle.dumps((False, error))
    return pickle.dumps((False, RuntimeError(trace)))
