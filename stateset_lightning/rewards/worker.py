"""The worker process: loads rewards and runs them, one completion at a time, in its main thread.

A worker is started with `command`, gets its rewards as the first message, answers `READY` or why it could not load
them, and then answers each request with a pickled `Outcome`. It may be killed at any moment: it holds nothing that
matters.

It is a fresh interpreter, not a `multiprocessing` child: those import the training script (and with it torch) anew.
This one imports the script only when a reward is defined in it. The real standard output is the parent's standard
error, so what rewards print disturbs nobody.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import Any

from stateset_lightning.rewards.base import RewardFunction
from stateset_lightning.rewards.outcome import Outcome, evaluate, failure

READY = b"ready"

inside_worker = False
"""Whether this process is a worker: a training script that is imported by one must not start workers in turn."""

_BOOT = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from stateset_lightning.rewards import worker
worker.main(int(sys.argv[2]))
"""
_ORPHAN_SECONDS = 3.0  # beyond the time-out


def command(file_descriptor: int) -> list[str]:
    """The command line of a worker that talks over `file_descriptor`."""
    return [sys.executable, "-u", "-c", _BOOT, json.dumps(sys.path), str(file_descriptor)]


def setup_message(rewards: Sequence[bytes]) -> bytes:
    """The first message to a worker: how to find the training script, and the pickled rewards."""
    return pickle.dumps((main_script() if any(b"__main__" in reward for reward in rewards) else {}, list(rewards)))


def main_script() -> dict[str, Any]:
    """Where `__main__` comes from; empty if it has no file (a notebook, `python -c`)."""
    data = spawn.get_preparation_data("reward-worker")
    if not ("init_main_from_name" in data or "init_main_from_path" in data):
        return {}
    return {key: data[key] for key in ("sys_argv", "init_main_from_name", "init_main_from_path") if key in data}


def main(file_descriptor: int) -> None:
    """Serve until the parent closes its end or dies."""
    global inside_worker
    inside_worker = True
    connection = Connection(file_descriptor)
    try:
        rewards = _load(connection.recv_bytes())
    except (Exception, SystemExit):  # SystemExit: a script that is imported may end itself
        connection.send_bytes(traceback.format_exc().encode(errors="replace"))
        return
    connection.send_bytes(READY)
    loop = asyncio.new_event_loop()  # one for the worker's life: clients that a reward keeps are bound to it
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        connection.send_bytes(_answer(rewards, request, loop))


def _load(message: bytes) -> list[RewardFunction]:
    script, rewards = pickle.loads(message)
    if script:
        spawn.prepare(script)
    return [pickle.loads(reward) for reward in rewards]


def _answer(rewards: list[RewardFunction], request: bytes, loop: asyncio.AbstractEventLoop) -> bytes:
    try:
        index, turns, context, timeout = pickle.loads(request)
    except Exception as error:  # a column of a class that this process cannot import, say
        return pickle.dumps(failure(error))
    # The parent kills a worker that takes too long. If the parent has died meanwhile, the kernel does: no Python code
    # would get to run while a regular expression holds the interpreter.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout + _ORPHAN_SECONDS)
    outcome = evaluate(rewards[index], turns, context, loop.run_until_complete)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return _pickled(outcome)


def _pickled(outcome: Outcome) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception as error:  # the breakdown holds something that cannot be pickled
        return pickle.dumps(failure(error))
