"""Rewards in their box: whatever a reward raises, ends, stops, cancels, floods or leaves behind fails its completion at
most, and dies with the trainer.
"""

import asyncio
import copy
import subprocess
import sys
import threading
import time
from decimal import Decimal

import numpy as np
import pytest

from stateset_lightning.errors import tell_once
from stateset_lightning.rewards import BatchReward, RewardFunction, Scorer, failure_counts
from stateset_lightning.threads import Interruption
from stateset_lightning.types import Turn

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")

CODE = '''
import asyncio, os, signal, socket, stat, subprocess, sys, threading, time
from stateset_lightning.rewards import RewardFunction, RewardResult

KEPT = []

def sockets():
    return [n for n in range(3, 64) if _is_socket(n)]

def _is_socket(n):
    try:
        return stat.S_ISSOCK(os.fstat(n).st_mode) and os.get_blocking(n)  # not those of the event loop
    except OSError:
        return False

def daemon(pid_file):
    """A process that has left its parent, its session and its group."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            note(pid_file, os.getpid())
            while True:
                time.sleep(1)
        os._exit(0)

def note(pid_file, pid):
    with open(pid_file, "a") as file:
        file.write(f"{pid}\\n")

def start(pid_file, **options):
    note(pid_file, subprocess.Popen([sys.executable, "-c", "while True: pass"], **options).pid)

def bomb(pid_file):
    for _ in range(5):
        os.fork()
    os.setsid() if os.getpid() % 2 and os.getpgid(0) != os.getpid() else None
    note(pid_file, os.getpid())
    while True:
        time.sleep(1)

async def stops():
    KEPT.append(asyncio.get_running_loop())
    KEPT[-1].stop()
    await asyncio.sleep(0.01)
    return 1.0

def forever(write):
    while True:
        write(b"unlimited " * 1000)

def ignores():
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

DEEDS = {
    "_exit": lambda c: os._exit(3),
    "killed": lambda c: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda c: os.kill(os.getpid(), signal.SIGSTOP),
    "group killed": lambda c: os.killpg(0, signal.SIGKILL),
    "group stopped": lambda c: os.killpg(0, signal.SIGSTOP),
    "guard killed": lambda c: [os.kill(os.getppid(), signal.SIGKILL), time.sleep(60)],
    "guard ended": lambda c: [os.kill(os.getppid(), signal.SIGTERM), time.sleep(60)],
    "guard stopped": lambda c: [os.kill(os.getppid(), signal.SIGSTOP), time.sleep(60)],
    "exit in a thread": lambda c: [threading.Thread(target=os._exit, args=(4,)).start(), time.sleep(60)],
    "pipe closed": lambda c: [os.close(n) for n in sockets()],
    "pipe shut": lambda c: [socket.socket(fileno=n).shutdown(socket.SHUT_RDWR) for n in sockets()],
    "pipe flooded": lambda c: [forever(lambda data: os.write(n, data)) for n in sockets()],
    "pipe read": lambda c: [os.read(n, 1) for n in sockets()],
    "prints for ever": lambda c: forever(lambda data: print(data.decode())),
    "children print for ever": lambda c: subprocess.run(["yes"], stderr=1),
    "huge result": lambda c: RewardResult(1.0, {"x": b"x" * 2**26}),
    "loop stopped": lambda c: stops(),
    "deep recursion": lambda c: DEEDS["deep recursion"](c),
    "ignores signals and hangs": lambda c: [ignores(), time.sleep(60)],
    "fork bomb": lambda c: bomb(c["pid_file"]),
    "hangs with a child": lambda c: [start(c["pid_file"]), time.sleep(60)],
    "hangs with a child in a session": lambda c: [start(c["pid_file"], start_new_session=True), time.sleep(60)],
    "hangs with a daemon": lambda c: [daemon(c["pid_file"]), time.sleep(60)],
    "holds the interpreter with a daemon": lambda c: [daemon(c["pid_file"]), sum(range(10**12))],
    # these score, and must harm no later call
    "prints much": lambda c: [print("x" * 10**7), 1.0][-1],
    "leaves an alarm": lambda c: [signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.alarm(1), 1.0][-1],
    "leaves a daemon": lambda c: [daemon(c["pid_file"]), 1.0][-1],
    "loop closed": lambda c: [loop.close() for loop in KEPT] and 1.0,
}

class Deeds(RewardFunction):
    def compute_reward(self, turns, context=None):
        deed = DEEDS.get(turns[-1].content)
        return deed(context) if deed else float(turns[-1].content)
'''


@pytest.fixture(scope="module")
def deeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deeds")
    (folder / "deeds_of_rewards.py").write_text(CODE)
    sys.path.append(str(folder))
    import deeds_of_rewards

    with Scorer(deeds_of_rewards.Deeds(timeout=0.4)) as hasty, Scorer(deeds_of_rewards.Deeds(timeout=30)) as patient:
        run(hasty, ["1"])
        yield hasty, patient
    sys.path.remove(str(folder))
    del sys.modules["deeds_of_rewards"]


def run(scorer, texts, context=None):
    session = scorer.start(len(texts))
    for n, text in enumerate(texts):
        session.submit(n, [Turn("assistant", text)], context)
    return session.collect()


class Panic(BaseException):
    """As libraries written in Rust raise."""


class Mute(BaseException):
    def __str__(self):
        raise Panic


RAISED = [
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    asyncio.CancelledError,
    Panic,
    Mute,
    Interruption,
    RecursionError,
    StopIteration,
    StopAsyncIteration,
]


class Raises(RewardFunction):
    def compute_reward(self, turns, context=None):
        if turns[-1].content != "0.5":
            raise next(kind for kind in RAISED if kind.__name__ == turns[-1].content)
        return 0.5


class RaisesAsync(Raises):
    async def compute_reward(self, turns, context=None):
        await asyncio.sleep(0)
        return Raises.compute_reward(self, turns)


class RaisesAtOnce(Raises):
    def compute_reward(self, turns, context=None):
        return RaisesAsync.compute_reward(self, turns)  # a `def` that returns an awaitable


class GivesBatch(BatchReward):
    def compute_rewards(self, conversations, contexts):
        kinds = {kind.__name__: kind() for kind in RAISED}
        return [kinds.get(turns[-1].content, 0.5) for turns in conversations]


class RaisesBatch(BatchReward):
    def compute_rewards(self, conversations, contexts):
        return [Raises().compute_reward(turns) for turns in conversations]


class Endless(BatchReward):
    def compute_rewards(self, conversations, contexts):
        while True:
            yield 0.5


class BadBreakdown(BatchReward):
    def compute_rewards(self, conversations, contexts):
        return [type("Score", (), {"__float__": lambda self: 1 / 0})() for _ in conversations]


@pytest.mark.parametrize("reward", [Raises(), Raises(timeout=60), RaisesAsync(), RaisesAtOnce(), GivesBatch()])
def test_whatever_is_raised_fails_its_completion_alone(reward):
    names = [kind.__name__ for kind in RAISED]
    with Scorer(reward) as scorer:
        scores = run(scorer, [*names, "0.5"])
        assert run(scorer, ["0.5"]).totals_N.tolist() == [0.5]
    told = [failure.error for failure in scores.failures]
    # Python turns these two into RuntimeError where a coroutine raises them
    assert [a for a, b in zip(told, names, strict=True) if a != b] in ([], ["RuntimeError"], ["RuntimeError"] * 2)
    assert scores.totals_N[-1] == 0.5
    assert scores.failures[names.index("Mute")].message == "<exception str() failed>"


@pytest.mark.parametrize("kind", RAISED)
def test_whatever_a_batch_raises_fails_its_completions(kind):
    with Scorer(RaisesBatch()) as scorer:
        scores = run(scorer, ["0.5", kind.__name__])
    assert failure_counts(scores) == {f"reward_failures/raises_batch/{kind.__name__}": 2}


@pytest.mark.parametrize(("reward", "error"), [(Endless(), "RewardError"), (BadBreakdown(), "ZeroDivisionError")])
def test_what_a_batch_returns_cannot_end_the_run(reward, error):
    with Scorer(reward) as scorer:
        assert [failure.error for failure in run(scorer, ["a", "b"]).failures] == [error] * 2


async def cancels_itself():
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


async def cancels_all():
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(0.01)


async def stops_the_loop():
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.01)
    raise ValueError("stopped")


async def closes_the_loop():
    asyncio.get_running_loop().close()


async def calls_back_an_exit():
    def ends(*_):
        raise SystemExit(5)

    asyncio.get_running_loop().call_soon(ends)
    await asyncio.sleep(0.01)
    raise ValueError("called back")


async def leaves_a_task_that_exits():
    async def ends():
        raise KeyboardInterrupt

    task = asyncio.ensure_future(ends())
    await asyncio.sleep(0.01)
    await task


async def waits_for_what_is_cancelled():
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


@pytest.mark.parametrize(
    ("deed", "error"),
    [
        (cancels_itself, "CancelledError"),
        (cancels_all, "CancelledError"),
        (stops_the_loop, "ValueError"),
        (closes_the_loop, "RuntimeError"),
        (calls_back_an_exit, "ValueError"),
        (leaves_a_task_that_exits, "KeyboardInterrupt"),
        (waits_for_what_is_cancelled, "CancelledError"),
    ],
)
@pytest.mark.parametrize("is_async", [True, False])
def test_what_is_done_to_the_event_loop_fails_one_completion(deed, error, is_async):
    async def reward(turns, context):
        return await deed() if turns[-1].content == "deed" else 0.5

    with Scorer(reward if is_async else lambda turns, context: reward(turns, context), timeout=None) as scorer:
        scores = scorer.start(1)
        scores.submit(0, [Turn("assistant", "deed")])
        assert [failure.error for failure in scores.collect().failures][:1] == [error]
        assert run(scorer, ["x", "y"]).totals_N.tolist() == [0.5, 0.5]


DIED, LATE = "WorkerDied", "TimeoutError"


@linux
@pytest.mark.parametrize(
    ("deed", "error"),
    [
        ("_exit", DIED),
        ("killed", DIED),
        ("stopped", LATE),
        ("group killed", DIED),
        ("group stopped", LATE),
        ("guard killed", DIED),
        ("guard ended", DIED),
        ("guard stopped", LATE),
        ("exit in a thread", DIED),
        ("pipe closed", DIED),
        ("pipe shut", DIED),
        ("pipe flooded", DIED),
        ("pipe read", LATE),
        ("huge result", "ValueError"),
        ("loop stopped", "RuntimeError"),
        ("deep recursion", "RecursionError"),
        ("ignores signals and hangs", LATE),
        ("fork bomb", LATE),
        ("hangs with a child", LATE),
        ("hangs with a child in a session", LATE),
        ("hangs with a daemon", LATE),
        ("holds the interpreter with a daemon", LATE),
        ("leaves an alarm", None),
        ("leaves a daemon", None),
    ],
)
def test_what_is_done_to_a_worker_fails_one_completion(deeds, deed, error, tmp_path):
    begin = time.monotonic()
    hasty, patient = deeds
    scorer = hasty if error == LATE else patient
    scores = run(scorer, [deed], {"pid_file": str(tmp_path / "pids")})
    assert time.monotonic() - begin < 10
    assert [failure.error for failure in scores.failures] == ([error] if error else [])
    assert run(patient, ["2", "3", "4"]).totals_N.tolist() == [2, 3, 4]
    if error and (tmp_path / "pids").exists():  # all that it started has ended
        pids = list(map(int, (tmp_path / "pids").read_text().split()))
        assert pids
        within_seconds(10, lambda: not any(map(is_alive, pids)))


@linux
def test_a_loop_that_a_call_closes_is_replaced_for_the_next(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("stateset_lightning.workers.pool.MAX_WORKERS", 1)
    (tmp_path / "closing_rewards.py").write_text(f"{CODE}\nasync def keeps():\n    return await stops()\n")
    import closing_rewards

    with Scorer(closing_rewards.Deeds(timeout=20)) as scorer:
        assert run(scorer, ["loop stopped"]).totals_N.isnan().all()
        assert run(scorer, ["loop closed"]).totals_N.tolist() == [1.0]
        assert failure_counts(run(scorer, ["loop stopped"])) == {"reward_failures/deeds/RuntimeError": 1}
        assert "closed" not in run(scorer, ["loop stopped"]).failures[0].message


TRAINER = """
import sys
from stateset_lightning.rewards import Scorer
from stateset_lightning.types import Turn
from deeds_of_rewards import Deeds
if __name__ == "__main__":
    with Scorer(Deeds(timeout=100)) as scorer:
        session = scorer.start(1)
        session.submit(0, [Turn("assistant", sys.argv[1])], {"pid_file": "pids"})
        session.collect()
"""


@linux
@pytest.mark.parametrize("deed", ["hangs with a child in a session", "holds the interpreter with a daemon"])
def test_workers_and_all_that_they_started_die_with_the_trainer(tmp_path, deed):
    (tmp_path / "deeds_of_rewards.py").write_text(
        CODE.replace(
            "    def compute_reward(self, turns, context=None):",
            "    def compute_reward(self, turns, context=None):\n        note('pids', os.getpid())",
        )
    )
    (tmp_path / "train.py").write_text(TRAINER)
    trainer = subprocess.Popen([sys.executable, "train.py", deed], cwd=tmp_path)
    pids = tmp_path / "pids"
    within_seconds(30, lambda: pids.exists() and len(pids.read_text().split()) == 2)
    trainer.kill()
    trainer.wait(10)
    within_seconds(10, lambda: not any(map(is_alive, map(int, pids.read_text().split()))))


@linux
@pytest.mark.parametrize(
    ("deed", "timeout", "errors"),
    [
        ("prints much", 30, []),
        ("prints for ever", 0.4, ["TimeoutError"]),
        ("children print for ever", 0.4, ["TimeoutError"]),
    ],
)
def test_of_unlimited_output_a_part_is_passed_on(deeds, deed, timeout, errors, capfd):
    with Scorer(type(deeds[0].rewards[0])(timeout=timeout)) as scorer:
        assert [failure.error for failure in run(scorer, [deed]).failures] == errors
    printed = capfd.readouterr().err
    assert 2**19 < len(printed) < 2**21
    assert printed.count("(a reward prints too much: the rest of these 10 s is dropped)") == 1


def test_nothing_in_the_working_folder_shadows_the_standard_library(tmp_path, monkeypatch):
    for name in ("json", "pickle", "asyncio", "ctypes", "signal", "random", "select", "encodings", "site", "ast"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "beside_the_config.py").write_text(
        "import random, json\nfrom stateset_lightning.rewards import RewardFunction\n"
        "class Beside(RewardFunction):\n    def compute_reward(self, turns, context=None):\n"
        "        return random.Random(1).random() * len(json.dumps(1))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path, str(tmp_path)])
    sys.modules.pop("beside_the_config", None)
    import beside_the_config

    with Scorer(beside_the_config.Beside(timeout=20)) as scorer:
        scores = run(scorer, ["x"])
    assert scores.totals_N.tolist() == [beside_the_config.Beside().compute_reward([])], scores.failures


# Columns are the scenario's own ---------------------------------------------------------------------------------------

COLUMNS = {
    "target": ["a", {"b": [1]}],
    "tests": {"cases": [[1, 2], (3, [4])], "kinds": {"x"}},
    "data": bytearray(b"abc"),
    "price": Decimal("0.5"),
    "array": np.arange(3),
    "check": len,
}


def change(value):
    """Change whatever can be changed, all the way down."""
    match value:
        case dict():
            list(map(change, value.values()))
            value["changed"] = True
        case list():
            list(map(change, value))
            value.append("changed")
        case tuple():
            list(map(change, value))
        case set():
            value.add("changed")
        case bytearray() | np.ndarray():
            value[0] = 77


class Changes(RewardFunction):
    def compute_reward(self, turns, context=None):
        assert repr(context) == repr(COLUMNS)
        turns.append(Turn("user", "one more"))
        change(context)
        return 1.0


class ChangesAsync(Changes):
    async def compute_reward(self, turns, context=None):
        await asyncio.sleep(0)
        return Changes.compute_reward(self, turns, context)


class ChangesBatch(BatchReward):
    def compute_rewards(self, conversations, contexts):
        return [
            Changes().compute_reward(turns, context) for turns, context in zip(conversations, contexts, strict=True)
        ]


class Looks(RewardFunction):
    def compute_reward(self, turns, context=None):
        assert (len(turns), repr(context)) == (1, repr(COLUMNS))
        return 1.0


@pytest.mark.parametrize("reward", [Changes(), Changes(timeout=60), ChangesAsync(), ChangesBatch()])
def test_each_call_gets_its_own_columns_and_a_change_is_told_once(reward, caplog):
    given = copy.deepcopy(COLUMNS)
    tell_once.cache_clear()
    with Scorer([reward, Looks()]) as scorer:
        for _ in range(2):  # epochs
            scores = run(scorer, ["x", "y"], given)
            assert scores.totals_N.tolist() == [2.0, 2.0], scores.failures
    assert repr(given) == repr(COLUMNS)
    told = [record.message for record in caplog.records if "changes its columns" in record.message]
    assert told == [f"reward '{reward.name}' changes its columns or its conversation: copies, which nothing else sees"]


@pytest.mark.parametrize("reward", [Looks(), Looks(timeout=60), ChangesAsync(), ChangesBatch()])
def test_what_cannot_be_copied_fails_the_completion_that_has_it(reward):
    with Scorer(reward) as scorer:
        assert "pickle" in run(scorer, ["x"], {"lock": threading.Lock()}).failures[0].message


def test_what_changes_nothing_is_not_told_and_copies_are_cheap(caplog):
    columns = {name: f"text of {name} " * 100 for name in ("id", "prompt", "topic", "target", "solution")}
    with Scorer([Looks(), lambda turns, context: float(context["target"] is columns["target"])]) as scorer:
        assert run(scorer, ["x"], columns).values_NF[0, 1] == 1.0  # what cannot change is no copy
    assert "changes its columns" not in caplog.text


# Helpers --------------------------------------------------------------------------------------------------------------


def within_seconds(seconds, condition):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
