"""Threads and the event loop behind the scorer."""

import subprocess
import sys
import threading

import pytest

from stateset_lightning.rewards.background import DaemonThreads, EventLoopThread


def test_threads_are_reused_up_to_their_number_and_return_exceptions():
    threads = DaemonThreads(2, "test")
    futures = [threads.submit(lambda: threading.current_thread().name) for _ in range(20)]
    assert {future.result(60) for future in futures} <= {"test-0", "test-1"}
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result(60)
    threads.close()


def test_closing_cancels_what_waits():
    threads = DaemonThreads(1, "test")
    begun, release = threading.Event(), threading.Event()
    first = threads.submit(lambda: (begun.set(), release.wait(60)))
    begun.wait(60)
    second = threads.submit(print)
    threading.Timer(0.05, release.set).start()
    threads.close()
    assert second.cancelled()
    assert first.result(60) is not None


def test_closing_an_unused_loop_does_nothing():
    EventLoopThread(1).close()


def test_a_reward_that_hangs_does_not_keep_the_interpreter_alive():
    code = (
        "import time\n"
        "from stateset_lightning.rewards import Scorer\n"
        "from stateset_lightning.types import Turn\n"
        "async def blocks(turns, context): time.sleep(60)\n"
        "scorer = Scorer([lambda turns, context: time.sleep(60), blocks])\n"
        "scorer.start(1).submit(0, [Turn('assistant', 'x')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=20, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
