"""Rewards that do what they should not. A copy stands beside the config of each case (see `rewards.py`)."""

from __future__ import annotations

import asyncio
import decimal
import fractions
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from stateset_lightning.rewards import RewardFunction, RewardResult

Behaviour = Callable[..., Any]
RAISING: dict[str, Behaviour] = {}
RETURNING: dict[str, Any] = {}
TOUCHING: dict[str, Behaviour] = {}
IN_WORKERS: dict[str, Behaviour] = {}
ASYNC: dict[str, Behaviour] = {}


def of(kind: dict[str, Behaviour]) -> Callable[[Behaviour], Behaviour]:
    """Decorator: a behaviour of this kind, under the function's name."""

    def add(function: Behaviour) -> Behaviour:
        kind[function.__name__] = function
        return function

    return add


class Hostile(RewardFunction):
    """Does what `does` names at every `every`-th call, else scores by length."""

    def __init__(
        self,
        does: str,
        every: int = 1,
        api_key: str = "",
        headers: dict[str, str] | None = None,
        dsn: str = "",
        timeout: float | None = None,
    ) -> None:
        super().__init__(timeout=timeout)
        self.does, self.every = does, every
        self.secrets = [api_key, *(headers or {}).values(), dsn]
        self.calls = 0

    def compute_reward(self, turns: Any, context: Any = None) -> Any:
        self.calls += 1
        if self.calls % self.every:
            return float(len(turns[-1].content) % 3)
        return act(self, turns, context)


class HostileAsync(Hostile):
    """The same, `async def`."""

    async def compute_reward(self, turns: Any, context: Any = None) -> Any:
        self.calls += 1
        if self.calls % self.every:
            return float(len(turns[-1].content) % 3)
        await asyncio.sleep(0)
        if self.does in ASYNC:
            return await ASYNC[self.does]()
        return act(self, turns, context)


def act(reward: Hostile, turns: Any, context: Any) -> Any:
    if reward.does in RETURNING:
        value = RETURNING[reward.does]
        return value() if callable(value) else value
    if reward.does in TOUCHING:
        TOUCHING[reward.does](turns, context)
        return 1.0
    # Not named: some set alarms, and a reward that names such a function gets a process, or is refused if it is async.
    in_workers = globals()["IN_WORKERS"]
    if reward.does in in_workers:
        return in_workers[reward.does]()
    return RAISING[reward.does](reward)


# What they raise ------------------------------------------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class TwoArguments(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} of {two}")


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise OSError("cannot be pickled")


def raising(name: str, error: Callable[[Hostile], BaseException]) -> None:
    def raises(reward: Hostile) -> None:
        raise error(reward)

    RAISING[name] = raises


def with_cycle(reward: Hostile) -> BaseException:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    return one


def with_notes(reward: Hostile) -> BaseException:
    error = ValueError("notes")
    error.add_note("\ud800\u2028" + reward.secrets[0])
    error.__notes__.append(5)  # type: ignore[arg-type]
    return error


raising("value_error", lambda reward: ValueError("no"))
raising("base_exception", lambda reward: BaseException("base"))
raising("keyboard_interrupt", lambda reward: KeyboardInterrupt())
raising("system_exit", lambda reward: SystemExit(7))
raising("generator_exit", lambda reward: GeneratorExit())
raising("cancelled", lambda reward: asyncio.CancelledError())
raising("memory_error", lambda reward: MemoryError())
raising("stop_iteration", lambda reward: StopIteration(1))
raising("stop_async_iteration", lambda reward: StopAsyncIteration())
raising("unprintable", lambda reward: Unprintable())
raising("two_arguments", lambda reward: TwoArguments(1, 2))
raising("unpicklable", lambda reward: Unpicklable("x"))
raising("surrogates", lambda reward: ValueError("\ud800 half"))
raising("separators", lambda reward: ValueError("a\u2028b\x85c\x00\x1b[2J"))
raising("long_message", lambda reward: ValueError("0." * 1_500_000))
raising("huge_number", lambda reward: ValueError(10**5000))
raising("secret_message", lambda reward: PermissionError(f"401: {reward.secrets} {dict(os.environ)}"))
raising("secret_bytes", lambda reward: PermissionError({"Authorization": b"Bearer " + reward.secrets[0].encode()}))
raising("group", lambda reward: ExceptionGroup("several", [ValueError("a"), TypeError(reward.secrets[0])]))
raising("base_group", lambda reward: BaseExceptionGroup("several", [KeyboardInterrupt(), ValueError("b")]))
raising("cycle", with_cycle)
raising("notes", with_notes)
raising("odd_type", lambda reward: type("a/b\u2028,\n\ud800", (Exception,), {})("odd"))
raising("broken_pipe", lambda reward: BrokenPipeError(32, "Broken pipe"))
raising("os_error", lambda reward: OSError(28, "No space left on device"))
raising("end_of_file", lambda reward: EOFError())
raising("warning", lambda reward: UserWarning("as an error"))


@of(RAISING)
def recursion(reward: Hostile) -> None:
    recursion(reward)


@of(RAISING)
def stopped_by_the_interpreter(reward: Hostile) -> None:
    os.environ["HOSTILE_API_KEY"].index("not there")


@of(RAISING)
def prints_secrets(reward: Hostile) -> float:
    print("stdout", os.environ["HOSTILE_API_KEY"])
    print("stderr", os.environ["DB_PASSWORD"], file=sys.stderr)
    return 1.0


# What they return -----------------------------------------------------------------------------------------------------


class NoNumber:
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __float__(self) -> float:
        raise self.error("no number")

    def __repr__(self) -> str:
        raise self.error("no text")

    __str__ = __repr__


class HalfMapping(dict):
    def items(self) -> Any:
        raise KeyError("items")

    __iter__ = items


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"x": [value]}
    return value


def cyclic() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def wide() -> Any:
    value: Any = ["x"] * 9
    for _ in range(30):
        value = [value] * 9
    return value


def breakdown(*items: Any) -> Callable[[], RewardResult]:
    """A result with hostile items: functions make them at each call."""
    return lambda: RewardResult(
        1.0, {key: value() if callable(value) and not isinstance(value, type) else value for key, value in items}
    )


RETURNING |= {
    "nan": float("nan"),
    "infinity": float("-inf"),
    "none": None,
    "text": "1.0",
    "octets": b"1",
    "list": [1.0],
    "mapping": {"score": 1},
    "huge": 10**5000,
    "huge_negative": -(10**400),
    "complex_number": 1j,
    "decimal_nan": decimal.Decimal("sNaN"),
    "fraction": fractions.Fraction(1, 3),
    "truth": True,
    "numpy_number": np.float16("nan"),
    "numpy_array": np.ones(3),
    "generator": lambda: (number for number in [1.0]),
    "coroutine": lambda: asyncio.sleep(0, 1.0),
    "class": int,
    "no_number": lambda: NoNumber(ZeroDivisionError),
    "no_base_number": lambda: NoNumber(GeneratorExit),
    "no_score": lambda: RewardResult(None, {}),  # type: ignore[arg-type]
    "text_score": lambda: RewardResult("1", {}),  # type: ignore[arg-type]
    "breakdown_list": lambda: RewardResult(1.0, [1, 2]),  # type: ignore[arg-type]
    "breakdown_half": lambda: RewardResult(1.0, HalfMapping(a=1)),
    "breakdown_surrogates": breakdown(("\ud800", "\udfff"), ("b", "a\ud83d")),
    "breakdown_separators": breakdown(("a\u2028b", "c\x85d\u2029\x00")),
    "breakdown_keys": breakdown(((1, 2), "tuple"), (np.int64(3), "numpy"), (None, "none"), (b"x", 1), (1, 2), ("1", 3)),
    "breakdown_numbers": breakdown(("int", 10**5000), ("nan", float("nan")), ("numpy", np.float64("inf")), ("c", 1j)),
    "breakdown_objects": breakdown(
        ("object", lambda: NoNumber(OSError)), ("base", lambda: NoNumber(GeneratorExit)), ("type", int)
    ),
    "breakdown_octets": breakdown(("bytes", b"\xff\xfe"), ("array", np.ones((300, 300))), ("set", {1, 2})),
    "breakdown_deep": breakdown(("deep", lambda: nested(3_000))),
    "breakdown_cycle": breakdown(("cycle", cyclic)),
    "breakdown_wide": breakdown(("wide", wide)),
    "breakdown_long": breakdown(("long", "0." * 1_000_000), ("many", lambda: list(range(200_000)))),
    "breakdown_secret": lambda: RewardResult(1.0, {os.environ["HOSTILE_API_KEY"]: os.environ["DB_PASSWORD"]}),
    "breakdown_many": lambda: RewardResult(1.0, {str(number): number for number in range(20_000)}),
    "metadata": lambda: RewardResult(1.0, {}, {"\ud800": cyclic()}),
}


# What they touch ------------------------------------------------------------------------------------------------------


@of(TOUCHING)
def appends(turns: Any, context: Any) -> None:
    context["steps"].append(1)


@of(TOUCHING)
def clears(turns: Any, context: Any) -> None:
    context["steps"].clear()
    dict.clear(context) if isinstance(context, dict) else None


@of(TOUCHING)
def replaces(turns: Any, context: Any) -> None:
    with suppress(TypeError):
        context["target"] = "other"


@of(TOUCHING)
def rewrites_turns(turns: Any, context: Any) -> None:
    for turn in turns:
        with suppress(AttributeError, TypeError):
            object.__setattr__(turn, "content", "\ud800")


@of(TOUCHING)
def drops_turns(turns: Any, context: Any) -> None:
    with suppress(AttributeError, TypeError):
        turns.clear()


@of(TOUCHING)
def holds_itself(turns: Any, context: Any) -> None:
    context["steps"].append(context["steps"])


# What they do to their process: with a time-out, which puts them into a worker ----------------------------------------


@of(IN_WORKERS)
def exits() -> None:
    os._exit(0)


@of(IN_WORKERS)
def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@of(IN_WORKERS)
def terminates_itself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@of(IN_WORKERS)
def interrupts_itself() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


@of(IN_WORKERS)
def stops_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@of(IN_WORKERS)
def closes_everything() -> float:
    os.closerange(0, 256)
    return 1.0


@of(IN_WORKERS)
def writes_everywhere() -> float:
    for descriptor in range(3, 64):
        with suppress(OSError):
            os.write(descriptor, b"\0\0\0\x04junk" * 100)
    return 1.0


@of(IN_WORKERS)
def floods_the_pipe() -> float:
    descriptors = [n for n in range(3, 64) if os.path.exists(f"/proc/self/fd/{n}")]
    while True:
        for descriptor in descriptors:
            with suppress(OSError):
                os.write(descriptor, b"\x7f" * 4096)


@of(IN_WORKERS)
def floods_output() -> float:
    for _ in range(200):
        sys.stdout.write("x" * 50_000)
    return 1.0


@of(IN_WORKERS)
def floods_output_for_ever() -> float:
    while True:
        os.write(1, b"y" * 65_536)


@of(IN_WORKERS)
def forks() -> float:
    os.fork()
    return 1.0


@of(IN_WORKERS)
def leaves_a_fork() -> float:
    if os.fork() == 0:
        time.sleep(300)
        os._exit(0)
    return 1.0


@of(IN_WORKERS)
def leaves_a_process() -> float:
    subprocess.Popen(["sleep", "300"])
    return 1.0


@of(IN_WORKERS)
def leaves_a_session() -> float:
    subprocess.Popen(["sleep", "300"], start_new_session=True)
    return 1.0


@of(IN_WORKERS)
def never_ends() -> float:
    while True:
        pass


@of(IN_WORKERS)
def hung_expression() -> float:
    re.match(r"(a+)+$", "a" * 40 + "b")
    return 1.0


@of(IN_WORKERS)
def ignores_signals() -> float:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.alarm(0)
    time.sleep(60)
    return 1.0


@of(IN_WORKERS)
def leaves_a_thread() -> float:
    threading.Thread(target=time.sleep, args=(300,)).start()
    return 1.0


@of(IN_WORKERS)
def forgets_modules() -> float:
    sys.modules.clear()
    os.environ.clear()
    sys.path.clear()
    return 1.0


@of(IN_WORKERS)
def changes_folder() -> float:
    os.chdir("/")
    sys.stdout = sys.stderr = None
    return 1.0


@of(IN_WORKERS)
def lowers_recursion() -> float:
    sys.setrecursionlimit(60)
    return 1.0


@of(IN_WORKERS)
def reads_input() -> float:
    return float(len(sys.stdin.read()))


@of(IN_WORKERS)
def big_answer() -> Any:
    return RewardResult(1.0, {"big": "x" * 30_000_000})


@of(IN_WORKERS)
def bad_pickle() -> Any:
    return RewardResult(1.0, {"bad": Unpicklable("x")})


@of(IN_WORKERS)
def profiles() -> float:
    counter = itertools.count()
    sys.settrace(lambda *event: next(counter) and None)  # type: ignore[arg-type]
    return 1.0


# What they do to the event loop ---------------------------------------------------------------------------------------


@of(ASYNC)
async def cancels_itself() -> float:
    asyncio.current_task().cancel()  # type: ignore[union-attr]
    await asyncio.sleep(0)
    return 1.0


@of(ASYNC)
async def cancels_all() -> float:
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(0)
    return 1.0


@of(ASYNC)
async def stops_the_loop() -> float:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0)
    return 1.0


@of(ASYNC)
async def closes_the_loop() -> float:
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: loop.close())  # a frame of this file, in what asyncio prints
    await asyncio.sleep(0)
    return 1.0


@of(ASYNC)
async def waits_for_ever() -> float:
    await asyncio.Event().wait()
    return 1.0


@of(ASYNC)
async def spins() -> float:
    while True:
        await asyncio.sleep(0)


@of(ASYNC)
async def swallows_cancellation() -> float:
    for _ in range(3):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue
    return 1.0


@of(ASYNC)
async def leaves_tasks() -> float:
    async def fails() -> None:
        raise ValueError("nobody waits for this")

    kept = [asyncio.ensure_future(fails()), asyncio.ensure_future(asyncio.sleep(300))]
    await asyncio.sleep(0)
    return float(len(kept))


@of(ASYNC)
async def runs_a_loop() -> float:
    asyncio.run(asyncio.sleep(0))
    return 1.0


@of(ASYNC)
async def blocks_a_moment() -> float:
    time.sleep(0.05)
    return 1.0


@of(ASYNC)
async def bad_handler() -> float:
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)
    return 1.0


@of(ASYNC)
async def leaves_a_generator() -> float:
    async def numbers() -> Any:
        try:
            yield 1.0
        finally:
            await asyncio.sleep(0)

    async for number in numbers():
        return float(number)
    return 0.0
