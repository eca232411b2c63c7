"""Threads that run blocking calls, the event loop on a thread of its own, and the heartbeat."""

import asyncio
import contextlib
import io
import os
import signal
import threading
import time
from concurrent.futures import Future

import pytest

from stateset_lightning import threads
from stateset_lightning.threads import DaemonThreads, EventLoopThread, Heartbeat


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


@pytest.fixture
def loop():
    loop = EventLoopThread(2, "test-loop")
    yield loop
    loop.close()


async def sleep(seconds, value=None):
    await asyncio.sleep(seconds)
    return value or threading.current_thread().name


def test_coroutines_run_on_the_loops_thread_and_return_exceptions(loop):
    async def divide():
        return 1 // 0

    assert loop.submit(sleep, 0).result(60) == "test-loop"
    with pytest.raises(ZeroDivisionError):
        loop.submit(divide).result(60)


def test_a_time_out_ends_a_call_that_swallows_cancellation_too(loop):
    async def stubborn():
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    with pytest.raises(TimeoutError, match=r"no result within 0\.05 s"):
        loop.submit(stubborn, timeout=0.05).result(60)


def test_calls_run_at_the_same_time_up_to_their_number_and_waiting_does_not_count(loop):
    running, most = 0, 0

    async def count():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    for future in [loop.submit(count, timeout=5) for _ in range(6)]:
        future.result(60)
    assert most == 2


def test_closing_cancels_what_runs_and_refuses_more(loop):
    running = loop.submit(sleep, 60)
    loop.submit(sleep, 0).result(60)
    loop.close()
    assert running.cancelled()
    with pytest.raises(RuntimeError, match="the event loop 'test-loop' is closed"):
        loop.submit(sleep, 0)
    EventLoopThread(1, "unused").close()


@pytest.fixture
def heart():
    heart = Heartbeat(seconds=0.1)
    yield heart
    heart.stop()


def wait_for(text, capsys):
    said, deadline = "", time.monotonic() + 20
    while text not in said and time.monotonic() < deadline:
        time.sleep(0.02)
        said += capsys.readouterr().out
    return said


def test_a_heartbeat_says_what_is_done_and_for_how_long_and_nothing_after_its_end(heart, capsys):
    heart.start("loading")
    assert wait_for("loading, 0 s so far\n", capsys)
    heart.doing("sampling")
    aside = threading.Thread(target=heart.doing, args=("sampling ahead",))
    aside.start()
    aside.join()
    said = wait_for("sampling, 1 s so far\n", capsys)
    assert "sampling ahead" not in said
    assert said.endswith("sampling, 1 s so far\n")
    heart.stop()
    capsys.readouterr()
    time.sleep(0.3)
    assert capsys.readouterr().out == ""


def test_a_heartbeat_is_silent_while_others_speak(heart, capsys):
    heart.seconds = 1.0
    heart.start("sampling")
    for step in range(15):
        time.sleep(0.1)
        heart.say(f"step {step}")
    assert capsys.readouterr().out == "".join(f"step {step}\n" for step in range(15))


def test_a_forked_child_has_no_heartbeat_and_may_stop_and_start_one(heart, capfd):
    heart.start("in the parent")
    if (pid := os.fork()) == 0:
        heart.stop()
        heart.start("in the child")
        time.sleep(0.3)
        heart.stop()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    said = capfd.readouterr().out
    assert "in the child, 0 s so far" in said
    assert "in the parent, 0 s so far" in said


def test_a_closed_output_ends_the_heartbeat_without_a_word(heart, capsys):
    file = io.StringIO()
    heart.start("sampling", file)
    file.close()
    time.sleep(0.3)
    heart.stop()
    assert capsys.readouterr().err == ""


def test_an_idle_thread_is_taken_before_another_is_started() -> None:
    threads, hold = DaemonThreads(8, "calls"), threading.Event()
    for n in range(5):
        assert threads.submit(lambda n=n: n).result(5) == n
        time.sleep(0.02)  # until the thread has counted itself as idle
    assert len(threads._threads) == 1
    waiting = [threads.submit(hold.wait) for _ in range(3)]  # each has a thread at once, whoever waits
    assert len(threads._threads) == 3
    hold.set()
    assert all(call.result(5) for call in waiting)
    threads.close()


def test_a_signal_that_wakes_nobody_is_seen_by_a_wait(monkeypatch):
    """As one is that comes just before the main thread begins to sleep; here, another thread takes it."""
    monkeypatch.setattr(threads, "_LOOK_SECONDS", 0.05)
    future, ready = Future(), threading.Event()
    threading.Thread(target=lambda: (ready.set(), time.sleep(1)), daemon=True).start()
    ready.wait(5)
    before = signal.signal(signal.SIGUSR1, lambda *_: future.set_result("seen"))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        assert threads.wait_for(future, time.monotonic() + 20).result(0) == "seen"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(TimeoutError):
        threads.wait_for(Future(), time.monotonic() + 0.1).result(0)


def test_a_signal_that_comes_as_a_wait_begins_is_kept(monkeypatch):
    class MainThread:
        """A signal comes when its code is first looked for, which is not there yet."""

        waits, code = False, 0

        @property
        def exit_code(self):
            if not self.waits or self.code:
                return self.code
            self.code = 1
            threads.cut_off_waits(143)
            return 0

        @exit_code.setter
        def exit_code(self, code):
            self.code = code

    before = signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(threads, "_MainThread", main := MainThread())
    try:
        with threads.interruptible():
            assert main.code == 143
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 3
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        threads.cut_off_waits(0)
        signal.signal(signal.SIGALRM, before)


def test_futures_come_as_they_end(monkeypatch):
    monkeypatch.setattr(threads, "_LOOK_SECONDS", 0.05)
    first, second, third = futures = [Future() for _ in range(3)]
    second.set_result(None)
    threading.Timer(0.2, first.set_result, (None,)).start()
    threading.Timer(0.5, third.set_result, (None,)).start()
    assert list(threads.as_they_end(futures)) == [second, first, third]


def test_threads_begin_anew_in_a_forked_child():
    pool = DaemonThreads(4, "forks")
    assert pool.submit(int).result(10) == 0
    time.sleep(0.1)  # it is idle now
    if (child := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            status = pool.submit(int).result(10)
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
