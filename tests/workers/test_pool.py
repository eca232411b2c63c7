"""The pool of worker processes: any function that can be pickled, killed at its time-out."""

import operator
import os
import signal
import sys
import threading
import time

import pytest
from own_modules import own_module
from timing import within

from stateset_lightning.errors import ConfigError
from stateset_lightning.workers import WorkerDied, WorkerPool

FUNCTIONS = """
import asyncio, os, sys, time

class Refused(ValueError):
    pass

class Unpicklable(Exception):
    def __init__(self):
        super().__init__("holds a function")
        self.function = lambda: 1

def raises(kind):
    if kind == "exit":
        sys.exit(3)
    raise {"refused": Refused("no"), "unpicklable": Unpicklable()}[kind]

async def later(value):
    await asyncio.sleep(0.01)
    return value, id(asyncio.get_running_loop())

def forks():
    os.fork()
    return "once"

def scribbles(what):
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket"):
                os.write(descriptor, what)
        except OSError:
            pass
    return "answer"

def forgets():
    sys.modules.clear()
    sys.path.clear()
"""


@pytest.fixture
def pool():
    pool = WorkerPool(num_workers=1)
    pool.add("add", operator.add)
    pool.add("die", os._exit)
    pool.add("sleep", time.sleep)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """Functions of a user's own module, which worker processes import."""
    with own_module(tmp_path_factory.mktemp("user_functions"), "user_functions", FUNCTIONS) as user_functions:
        yield user_functions


def call(pool, name, *args, timeout=20.0):
    return pool.submit(name, timeout, *args).result(60)


def test_workers_start_when_needed_and_run_all_functions(pool):
    assert not pool._started
    call(pool, "sleep", 0)
    assert [call(pool, "add", 1, 2), call(pool, "add", "a", "b")] == [3, "ab"]
    assert len(pool._started) == 1


def test_a_call_that_takes_too_long_is_killed_and_the_next_one_runs(pool):
    with pytest.raises(TimeoutError, match=r"no result within 0\.2 s; the worker process was killed"):
        call(pool, "sleep", 60, timeout=0.2)
    assert call(pool, "add", 1, 2) == 3


def test_a_process_that_ends_is_an_error_of_its_own(pool):
    with pytest.raises(WorkerDied, match="the worker process ended with code 7 during the call"):
        call(pool, "die", 7)
    assert call(pool, "add", 1, 2) == 3


def test_a_worker_that_died_while_idle_is_replaced(pool):
    call(pool, "add", 1, 2)
    (worker,) = pool._started
    os.kill(worker._process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while worker.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    del worker
    assert call(pool, "add", 1, 2) == 3
    assert len(pool._started) == 1


def test_what_a_function_raises_is_raised_here_with_its_traceback(functions):
    pool = WorkerPool(num_workers=1)
    pool.add("raises", functions.raises)
    with pytest.raises(functions.Refused, match="no") as caught:
        call(pool, "raises", "refused")
    assert "In the worker process:" in caught.value.__notes__[0]
    assert "in raises" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"(?s)In the worker process:.*in raises.*Unpicklable: holds a function"):
        call(pool, "raises", "unpicklable")
    with pytest.raises(RuntimeError, match=r"(?s)In the worker process:.*SystemExit: 3"):
        call(pool, "raises", "exit")
    pool.close()


def test_async_functions_share_one_loop(functions):
    pool = WorkerPool(num_workers=1)
    pool.add("later", functions.later)
    (first, loop), (second, same) = call(pool, "later", 1), call(pool, "later", 2)
    assert (first, second, loop) == (1, 2, same)
    pool.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_function_that_forks_answers_once(pool, functions):
    pool.add("forks", functions.forks)
    assert [call(pool, "forks"), call(pool, "add", 1, 2), call(pool, "add", 3, 4)] == ["once", 3, 7]


def test_a_worker_whose_modules_are_gone_is_replaced(pool, functions, capfd):
    pool.add("forgets", functions.forgets)
    pool.add("raises", functions.raises)
    call(pool, "forgets")
    with pytest.raises(WorkerDied, match="ended with code 1 during the call"):  # it cannot even say what was raised
        call(pool, "raises", "refused")
    assert call(pool, "add", 1, 2) == 3
    assert "Traceback" not in capfd.readouterr().err


def test_what_cannot_be_pickled_is_an_error(pool):
    with pytest.raises(TypeError, match="pickle"):
        call(pool, "add", threading.Lock(), 1)
    with pytest.raises(ConfigError, match=r"'mine' runs in a worker .* cannot be pickled .* or do it elsewhere"):
        WorkerPool(remedy="; or do it elsewhere").add("'mine'", lambda: 1)


def test_a_function_that_workers_cannot_import_is_an_error(functions, monkeypatch):
    pool = WorkerPool(remedy="; or do it elsewhere")
    pool.add("'mine'", functions.raises)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "user_functions" not in entry])
    with pytest.raises(
        ConfigError, match=r"(?s)'mine', could not load them.*or do it elsewhere.*No module named 'user_functions'"
    ):
        call(pool, "'mine'", "refused")
    pool.close()


def test_a_worker_starts_within_seconds():
    def start():
        pool = WorkerPool(num_workers=1)
        pool.add("add", operator.add)
        call(pool, "add", 1, 2)
        pool.close()

    within(5, start)


def test_a_closed_pool_starts_nothing(pool):
    call(pool, "add", 1, 2)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        call(pool, "add", 1, 2)


def test_closing_kills_what_runs(pool):
    running = pool.submit("sleep", 60.0, 60)
    deadline = time.monotonic() + 60
    while not pool._started and time.monotonic() < deadline:
        time.sleep(0.01)
    pool.close()
    assert isinstance(running.exception(20), WorkerDied | ConfigError)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the pipe in /proc")
@pytest.mark.parametrize(
    ("what", "error"),
    [
        (b"\0\0\x7f\0half", TimeoutError),  # the length of an answer that never comes
        (b"\0\0\0\4" + b"full", WorkerDied),
        (b"\x7f" * 12, WorkerDied),
        (b"\xff" * 12, WorkerDied),
    ],
    ids=["half", "whole", "too long", "endless"],
)
def test_what_a_function_writes_into_the_pipe_is_no_answer(pool, functions, what, error):
    pool.add("scribbles", functions.scribbles)
    with pytest.raises(error):
        pool.submit("scribbles", 1.0, what).result(timeout=20)
    assert pool.submit("add", 20.0, 1, 2).result(timeout=30) == 3
