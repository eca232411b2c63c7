"""The scorer: concurrency, time-outs, failures, order, and that nothing leaks."""

import asyncio
import gc
import math
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from own_modules import own_module
from timing import within

from stateset_lightning.errors import ConfigError, DataError, RewardError
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import (
    BatchReward,
    ExactMatch,
    FunctionReward,
    RewardFunction,
    RewardResult,
    Scorer,
    failure_counts,
)
from stateset_lightning.training.collect import check_failures
from stateset_lightning.types import NOT_APPLICABLE, Scores, Turn

BLOCKING_REWARDS = '''
import os, re, signal, subprocess, sys, time
from stateset_lightning.rewards import RewardFunction, RewardResult

class Blocking(RewardFunction):
    """Does what the completion says."""
    def __init__(self, timeout=None, weight=1.0, name=None):
        super().__init__(timeout=timeout, weight=weight, name=name)
        self.calls = 0

    def compute_reward(self, turns, context=None):
        order = turns[-1].content
        self.calls += 1
        if order == "hang":
            re.fullmatch("(a+)+b", "a" * 40)  # holds the interpreter for hours
        if order == "exit":
            os._exit(3)
        if order == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if order == "raise":
            raise KeyError("missing")
        if order == "sys.exit":
            sys.exit(1)
        if order == "print":
            print("noise " * 1000)
            os.system("echo more noise")
        if order == "modules":
            heavy = sorted({"torch", "transformers", "lightning"} & set(sys.modules))
            return RewardResult(1.0, {"heavy": heavy, "pid": os.getpid()})
        if order == "unpicklable":
            return RewardResult(1.0, {"f": lambda: 1})
        if order == "alarm":  # as mathematics packages do: signals only work in the main thread
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.alarm(0)
        if order == "child":
            child = subprocess.Popen(["sleep", "60"])
            with open(context["pid_file"], "w") as file:
                file.write(str(child.pid))
            time.sleep(60)
        if order == "async":
            async def later():
                return 0.25
            return later()
        return float(order) if order[0].isdigit() else 1.0
'''


@pytest.fixture(scope="module")
def blocking(tmp_path_factory):
    """A reward of a user's own module, which worker processes import."""
    with own_module(tmp_path_factory.mktemp("user_code"), "blocking_rewards", BLOCKING_REWARDS) as blocking_rewards:
        yield blocking_rewards.Blocking


def turns(text="x"):
    return [Turn("user", "q"), Turn("assistant", text)]


def run(scorer, texts, context=None):
    session = scorer.start(len(texts))
    for n, text in enumerate(texts):
        session.submit(n, turns(text), context)
    return session.collect()


def score(rewards, texts, context=None, **options):
    with Scorer(rewards, **options) as scorer:
        return run(scorer, texts, context)


def errors(scores):
    return {(failure.completion, failure.reward): failure.error for failure in scores.failures}


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


class Word(RewardFunction):
    def compute_reward(self, turns, context=None):
        return {"none": None, "nan": math.nan, "inf": math.inf, "text": "1.0"}.get(turns[-1].content, 1.0)


class Half(RewardFunction):
    async def compute_reward(self, turns, context=None):
        return RewardResult(0.5, {"part": 3})


def test_totals_are_weighted_sums_over_applying_rewards():
    scores = score([Word(weight=2.0), Half(weight=-1.0)], ["one", "none", "nan", "inf", "text"])
    nan = math.nan
    assert scores.names == ("word", "half")
    assert scores.values_NF.dtype == scores.totals_N.dtype == torch.float64
    expected = torch.tensor([[1, 0.5], [NOT_APPLICABLE, 0.5], [nan, 0.5], [nan, 0.5], [nan, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(scores.values_NF, expected, equal_nan=True)
    torch.testing.assert_close(
        scores.totals_N, torch.tensor([1.5, -0.5, nan, nan, nan], dtype=torch.float64), equal_nan=True
    )
    assert errors(scores) == {(n, "word"): "RewardError" for n in (2, 3, 4)}
    assert scores.breakdowns[0] == {"half": {"part": 3}}


def test_a_completion_to_which_nothing_applies_fails_and_is_counted():
    scores = score(Word(), ["none", "one"])
    assert scores.totals_N.isnan().tolist() == [True, False]
    assert scores.values_NF.tolist() == [[NOT_APPLICABLE], [1.0]]
    assert failure_counts(scores) == {"reward_failures/all/NotApplicable": 1}


def test_no_completions_give_empty_scores():
    scores = score([Word(), Half()], [])
    assert (scores.values_NF.shape, scores.totals_N.shape, scores.failures) == ((0, 2), (0,), [])


def test_a_scenario_chooses_its_rewards():
    called = []

    def first(turns, context):
        called.append("first")
        return 1.0

    scores = score([first, Half()], ["x"], {"rewards": ("half",)})
    assert scores.values_NF.tolist() == [[NOT_APPLICABLE, 0.5]]
    assert scores.totals_N.tolist() == [0.5]
    assert called == []


@pytest.mark.parametrize(("names", "unknown"), [(("half", "hlaf"), "'hlaf'"), ("half", "'h', 'a', 'l', 'f'")])
def test_an_unknown_reward_name_is_an_error_at_submit(names, unknown):
    message = rf"scenario 's1' names unknown rewards \[{unknown}\]; known are: word, half"
    with Scorer([Word(), Half()]) as scorer, pytest.raises(DataError, match=message):
        scorer.start(1).submit(0, turns(), {"id": "s1", "rewards": names})


def test_rewards_get_their_own_context_with_the_number_of_tokens():
    seen = []

    def spoil(turns, context):
        seen.append(dict(context))
        context["target"] = "spoilt"
        turns.clear()
        return 1.0

    with Scorer([spoil, ExactMatch()]) as scorer:
        session = scorer.start(1)
        given = {"target": "x"}
        session.submit(0, turns("x"), given, completion_tokens=7)
        assert session.collect().values_NF.tolist() == [[1.0, 1.0]]
    assert seen == [{"target": "x", "completion_tokens": 7}]
    assert given == {"target": "x"}


def test_results_do_not_depend_on_timing():
    async def slow_first(turns, context):
        n = int(turns[-1].content)
        await asyncio.sleep(0.1 - 0.01 * n)
        if n % 3 == 0:
            raise ValueError(n)
        return n

    scores = score(slow_first, [str(n) for n in range(9)])
    assert [failure.completion for failure in scores.failures] == [0, 3, 6]
    assert scores.totals_N.nan_to_num(-1).tolist() == [-1, 1, 2, -1, 4, 5, -1, 7, 8]


def test_async_rewards_run_concurrently_within_the_bound():
    running, most = 0, 0

    async def sleep(turns, context):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.1)
        running -= 1
        return 1.0

    scores = within(1, lambda: score(sleep, ["x"] * 50))
    assert most == 16
    assert scores.totals_N.sum() == 50
    most = 0
    score(sleep, ["x"] * 6, max_concurrency=2)
    assert most == 2


def test_blocking_rewards_without_timeout_run_on_threads():
    names = set()

    def sleep(turns, context):
        names.add(threading.current_thread().name)
        time.sleep(0.1)
        return 1.0

    assert within(1, lambda: score(sleep, ["x"] * 16)).totals_N.sum() == 16
    assert "MainThread" not in names


def test_it_works_inside_a_running_event_loop():
    async def notebook():
        return score([Half(), Word()], ["x"])

    assert asyncio.run(notebook()).totals_N.tolist() == [1.5]


def test_seconds_is_the_time_waited_in_collect():
    async def sleep(turns, context):
        ended.clear()
        await asyncio.sleep(0.2)
        ended.set()
        return 1.0

    ended = threading.Event()
    with Scorer(sleep) as scorer:
        session = scorer.start(1)
        session.submit(0, turns())
        time.sleep(0.1)
        ended.wait()
        assert session.collect().seconds < 0.1
        assert run(scorer, ["x"]).seconds > 0.15


@pytest.mark.parametrize("swallows", [False, True])
def test_an_async_timeout_fails_that_completion_only(swallows):
    async def slow(turns, context):
        try:
            await asyncio.sleep(60 if turns[-1].content == "slow" else 0)
        except asyncio.CancelledError:
            if swallows:
                await asyncio.sleep(60)
            raise
        return 1.0

    with Scorer(slow, timeout=0.2) as scorer:
        scores = within(1, lambda: run(scorer, ["slow", "x"]))
    assert errors(scores) == {(0, "slow"): "TimeoutError"}
    assert scores.failures[0].message == "no result within 0.2 s"
    assert scores.totals_N[1] == 1


def test_async_failures_do_not_end_the_loop():
    async def fails(turns, context):
        match turns[-1].content:
            case "raise":
                raise KeyError("missing")
            case "exit":
                raise SystemExit
            case "cancel":
                raise asyncio.CancelledError
        return 1.0

    scores = score(fails, ["raise", "exit", "cancel", "x"])
    assert errors(scores) == {(0, "fails"): "KeyError", (1, "fails"): "SystemExit", (2, "fails"): "CancelledError"}
    assert scores.totals_N[3] == 1
    assert 'raise KeyError("missing")' in scores.failures[0].traceback


def test_a_def_that_returns_an_awaitable_is_awaited(blocking):
    async def later():
        await asyncio.sleep(0.01)
        return 0.25

    assert score(lambda turns, context: later(), ["x"]).totals_N.tolist() == [0.25]
    assert score(blocking(timeout=10), ["async"]).totals_N.tolist() == [0.25]


def test_a_hung_regex_is_killed_and_the_others_go_on(blocking):
    with Scorer(blocking(timeout=1)) as scorer:
        run(scorer, ["1"])  # starts a worker
        scores = within(2.5, lambda: run(scorer, ["hang", "2", "3"]))
        assert errors(scores) == {(0, "blocking"): "TimeoutError"}
        assert scores.totals_N[1:].tolist() == [2, 3]


def test_more_hung_rewards_than_workers_starve_nobody(blocking):
    scores = score(blocking(timeout=0.5), ["hang"] * 5 + ["1", "2"])
    assert errors(scores) == {(n, "blocking"): "TimeoutError" for n in range(5)}
    assert scores.totals_N[5:].tolist() == [1, 2]


def test_what_happens_in_a_worker_stays_there(blocking, capfd):
    orders = ["exit", "segfault", "raise", "sys.exit", "print", "unpicklable", "alarm", "0.5"]
    scores = score(blocking(timeout=20), orders)
    assert {orders[n]: error for (n, _), error in errors(scores).items()} == {
        "exit": "WorkerDied",
        "segfault": "WorkerDied",
        "raise": "KeyError",
        "sys.exit": "SystemExit",
        "unpicklable": scores.failures[-1].error,
    }
    assert scores.failures[0].message == "the worker process ended with code 3 during the call"
    assert 'raise KeyError("missing")' in scores.failures[2].traceback
    assert scores.totals_N[[4, 6, 7]].tolist() == [1.0, 1.0, 0.5]
    out, err = capfd.readouterr()
    assert out == ""
    assert "noise noise" in err
    assert "more noise" in err


def test_workers_are_persistent_and_import_nothing_heavy(blocking):
    with Scorer(blocking(timeout=10)) as scorer:
        parts = [run(scorer, ["modules"]).breakdowns[0]["blocking"] for _ in range(2)]
        assert parts[0] == parts[1]
        assert parts[0]["heavy"] == []
        assert parts[0]["pid"] != os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_timeout_kills_what_the_reward_started(blocking, tmp_path):
    scores = score(blocking(timeout=1), ["child"], {"pid_file": str(tmp_path / "pid")})
    assert errors(scores) == {(0, "blocking"): "TimeoutError"}
    deadline = time.monotonic() + 20
    while is_alive(int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_context_that_cannot_be_pickled_fails_the_completion(blocking):
    scores = score(blocking(timeout=5), ["1"], {"column": threading.Lock()})
    assert "pickle" in scores.failures[0].message


def test_the_default_timeout_holds_for_rewards_without_one(blocking):
    scores = score([blocking(name="own", timeout=30), blocking(name="default")], ["modules"], timeout=20)
    own, default = (scores.breakdowns[0][name]["pid"] for name in ("own", "default"))
    assert os.getpid() not in (own, default)


@pytest.mark.parametrize(
    "make", [lambda: FunctionReward(lambda turns, context: 1.0, timeout=1), lambda: _local_reward()]
)
def test_a_reward_that_cannot_be_pickled_is_a_config_error(make):
    with pytest.raises(
        ConfigError,
        match=r"worker process, .* but it cannot be pickled .* top level of a module .* or drop the time-out",
    ):
        Scorer(make())


def _local_reward():
    class Local(Word):
        pass

    return Local(timeout=1)


def test_a_reward_that_workers_cannot_import_is_a_config_error(blocking, monkeypatch):
    with Scorer(blocking(timeout=5)) as scorer:
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "user_code" not in entry])
        with pytest.raises(ConfigError, match=r"(?s)could not load them.*No module named 'blocking_rewards'"):
            run(scorer, ["1"])


def test_closing_ends_threads_and_processes(blocking):
    before = set(threading.enumerate())
    scorer = Scorer([blocking(timeout=30), Half(), Word()])
    run(scorer, ["1"])
    session = scorer.start(2)
    session.submit(0, turns("hang"))
    session.submit(1, turns("hang"))
    late = scorer.start(1)
    begin = time.perf_counter()
    scorer.close()
    assert time.perf_counter() - begin < 2
    assert set(threading.enumerate()) <= before
    scorer.close()  # closing twice is harmless
    with pytest.raises(RuntimeError, match="closed"):
        late.submit(0, turns())
    assert set(threading.enumerate()) <= before
    with pytest.raises(RuntimeError, match="the scorer is closed"):
        scorer.start(1)


def test_a_dropped_scorer_closes_itself(blocking):
    before = set(threading.enumerate())
    run(Scorer([blocking(timeout=30), Half(), Word()]), ["1"])
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_an_abandoned_session_cancels_what_has_not_begun():
    begun = []

    async def slow(turns, context):
        begun.append(turns[-1].content)
        if turns[-1].content != "last":
            await asyncio.sleep(60)  # ends by being cancelled
        return 1.0

    def sample_and_fail(scorer):
        with scorer.start(300) as session:
            for n in range(300):
                session.submit(n, turns(str(n)))
            while not begun:
                time.sleep(0.001)
            raise RuntimeError("sampling failed")

    with Scorer(slow, max_concurrency=1) as scorer:
        with pytest.raises(RuntimeError, match="sampling failed"):
            sample_and_fail(scorer)
        assert run(scorer, ["last"]).totals_N.tolist() == [1.0]
    assert begun == ["0", "last"]


def test_sessions_do_not_mix():
    with Scorer(lambda turns, context: float(turns[-1].content)) as scorer:
        first, second = scorer.start(1), scorer.start(1)
        second.submit(0, turns("2"))
        first.submit(0, turns("1"))
        assert (first.collect().totals_N.tolist(), second.collect().totals_N.tolist()) == ([1.0], [2.0])


def test_failures_are_counted_and_too_many_stop_the_run():
    def fails(turns, context):
        if turns[-1].content == "bad":
            raise KeyError("missing")
        return 1.0

    with Scorer([fails, Word()], max_failures=0.5) as scorer:
        half = run(scorer, ["bad", "nan", "x", "x"])
        assert failure_counts(half) == {"reward_failures/fails/KeyError": 1, "reward_failures/word/RewardError": 1}
        check_failures([half], scorer.max_failures, Ranks())
        with pytest.raises(RewardError, match=r"2 of 4 completions have no score, more than max_reward_failures=0\.4"):
            check_failures([half], 0.4, Ranks())
        with pytest.raises(
            RewardError,
            match=r"(?s)2 of 3 .*fails/KeyError: 2.*reward 'fails' on completion 1: KeyError.*raise KeyError",
        ):
            check_failures([run(scorer, ["bad", "bad", "x"])], scorer.max_failures, Ranks())
    check_failures([Scores((), torch.empty(0, 0), torch.empty(0))], 0.0, Ranks())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": -1}, "scorer.timeout=-1 must be above 0"),
        ({"timeout": math.inf}, "scorer.timeout=inf must be below inf"),
        ({"max_concurrency": 0}, "max_concurrency=0 must be at least 1"),
        ({"max_failures": 50}, "max_failures=50 must be at most 1"),
    ],
)
def test_bad_options_are_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        Scorer(Half(), **options)


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


# Rewards that score a batch in one call -----------------------------------------------------------


class WithGradient(BatchReward):
    def compute_rewards(self, conversations, contexts):
        return [torch.is_grad_enabled() for _ in conversations]


def test_batched_rewards_keep_no_graph():
    with Scorer(WithGradient()) as scorer:
        assert run(scorer, ["a", "b"]).totals_N.tolist() == [0.0, 0.0]


class Lengths(BatchReward):
    """The length of each answer; notes every call."""

    def __init__(self, output=None, **common):
        super().__init__(**common)
        self.output, self.calls = output, []

    def compute_rewards(self, conversations, contexts):
        self.calls.append(
            ([turns[-1].content for turns in conversations], [context["k"] for context in contexts], self.device)
        )
        if isinstance(self.output, Exception):
            raise self.output
        return self.output if self.output is not None else [len(turns[-1].content) for turns in conversations]


class Early(RewardFunction):
    def compute_reward(self, turns, context=None):
        self.begun = time.perf_counter()
        return 1.0


def run_batch(rewards, texts, order=None, device="cpu", columns=None):
    with Scorer(rewards, timeout=None) as scorer:
        session = scorer.start(len(texts), device)
        for n in order or range(len(texts)):
            session.submit(n, [Turn("user", "q"), Turn("assistant", texts[n])], {"k": n, **(columns or {})})
        return session.collect()


def test_one_call_in_the_order_of_completions():
    reward = Lengths()
    scores = run_batch(reward, ["a", "bb", "ccc"], order=[2, 0, 1], device="meta")
    assert scores.totals_N.tolist() == [1, 2, 3]
    assert reward.calls == [(["a", "bb", "ccc"], [0, 1, 2], "meta")]


def test_items_may_be_anything_a_reward_returns_or_an_exception():
    outputs = [RewardResult(2.0, {"part": 1}), None, KeyError("x"), math.nan, "text", 4]
    scores = run_batch([Lengths(outputs), Early(weight=0.5)], ["x"] * 6)
    assert [value for value in scores.totals_N.tolist() if value == value] == [2.5, 0.5, 4.5]
    assert scores.breakdowns[0] == {"lengths": {"part": 1}}
    assert {failure.completion: failure.error for failure in scores.failures} == {
        2: "KeyError",
        3: "RewardError",
        4: "RewardError",
    }


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (RuntimeError("out of memory"), "RuntimeError"),
        ([1.0], "RewardError"),
        (7, "RewardError"),
        (iter([]), "RewardError"),
    ],
)
def test_a_call_that_fails_fails_all(output, error):
    scores = run_batch([Lengths(output), Early()], ["a", "b"])
    assert scores.totals_N.isnan().all()
    assert failure_counts(scores) == {f"reward_failures/lengths/{error}": 2}


def test_a_config_error_ends_the_run():
    with pytest.raises(ConfigError, match="no such model"):
        run_batch(Lengths(ConfigError("no such model")), ["a"])


def test_scenarios_choose_it_as_any_reward():
    reward = Lengths()
    assert run_batch([reward, Early()], ["aa", "b"], columns={"rewards": ["early"]}).totals_N.tolist() == [1, 1]
    assert reward.calls == []


def test_alone_it_is_an_ordinary_reward():
    turns = [Turn("user", "q"), Turn("assistant", "abc")]
    assert Lengths().compute_reward(turns, {"k": 0}) == 3
    with pytest.raises(KeyError):
        Lengths([KeyError("x")]).compute_reward(turns, {"k": 0})


def test_a_time_out_is_refused_or_not_applied():
    with pytest.raises(ConfigError, match="timeout=1 of reward 'lengths', which scores a whole batch"):
        Scorer(Lengths(timeout=1))
    with Scorer(Lengths(), timeout=0.01) as scorer:  # the default of the module is for the others
        session = scorer.start(1)
        session.submit(0, [Turn("assistant", "abc")], {"k": 0})
        assert session.collect().totals_N.tolist() == [3]


def test_counts_are_named_after_their_reward():
    class Counting(Early):
        def take_counts(self):
            return {"tokens": 5}

    with Scorer([Counting(name="mine"), Counting(name="again"), Early()]) as scorer:
        assert scorer.take_counts() == {"cost/mine/tokens": 5, "cost/again/tokens": 5}
