"""The pool of worker processes on its own."""

import os
import signal
import time

import pytest
from timing import within

from stateset_lightning.rewards import ExactMatch
from stateset_lightning.rewards.worker_pool import WorkerPool
from stateset_lightning.types import Turn

TURNS = [Turn("user", "q"), Turn("assistant", "x")]


@pytest.fixture
def pool():
    pool = WorkerPool([ExactMatch(timeout=5), ExactMatch(timeout=5, ignore_case=True)], num_workers=1)
    yield pool
    pool.close()


def test_workers_start_when_needed_and_serve_all_rewards(pool):
    assert pool._started == set()
    values = [pool.submit(index, TURNS, {"target": "X"}, 5.0).result(60).value for index in (0, 1, 0)]
    assert values == [0.0, 1.0, 0.0]
    assert len(pool._started) == 1


def test_a_worker_that_died_while_idle_is_replaced(pool):
    assert pool.submit(0, TURNS, {"target": "x"}, 5.0).result(60).value == 1.0
    (process,) = pool._started
    os.kill(process._process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while process.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pool.submit(0, TURNS, {"target": "x"}, 5.0).result(60).value == 1.0
    assert len(pool._started) == 1


def test_a_worker_starts_within_seconds():
    def start():
        pool = WorkerPool([ExactMatch(timeout=5)], num_workers=1)
        pool.submit(0, TURNS, {"target": "x"}, 5.0).result(60)
        pool.close()

    within(5, start)


def test_a_closed_pool_starts_nothing(pool):
    pool.submit(0, TURNS, {"target": "x"}, 5.0).result(60)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(0, TURNS, {"target": "x"}, 5.0).result(60)
