"""Threads that run blocking calls and hold up nobody."""

import threading

import pytest

from stateset_lightning.threads import DaemonThreads


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
