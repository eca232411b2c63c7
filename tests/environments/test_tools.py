"""Plain functions as tools: what is answered to each kind of call, and what is counted."""

import asyncio
import threading
import time

import pytest
from environments import plain_functions
from environments.plain_functions import add, divide, fetch, leave, look_up, slow, slow_fetch, undocumented, untyped
from jsonargparse import ArgumentParser

from stateset_lightning.environments import EnvironmentFailure, Opening, Tools, as_environment
from stateset_lightning.environments.tool_calls import Call, Malformed
from stateset_lightning.environments.tools import UserCode, run_tools
from stateset_lightning.errors import ConfigError


@pytest.fixture
def code():
    code = UserCode()
    yield code
    code.close()


def answers(code, functions, *calls, timeout=10.0):
    reply = run_tools(list(calls), {f.__name__: f for f in functions}, code, timeout)
    assert [turn.role for turn in reply.turns] == ["tool"] * len(calls)
    assert not reply.done
    assert reply.reward is None
    return [turn.content for turn in reply.turns], {name: n for name, n in reply.counts.items() if n}


def test_an_answer_without_calls_ends_the_conversation():
    driver = as_environment(Tools([add]))
    assert driver.reset({"prompt": "1 + 2?"}, 0) == Opening()
    reply = driver.step('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>')
    assert ([turn.content for turn in reply.turns], reply.done) == (["3"], False)
    assert reply.counts == {"tool_calls": 1, "malformed_calls": 0, "tool_errors": 0, "tool_timeouts": 0}
    reply = driver.step("It is 3.")
    assert (reply.turns, reply.done, reply.reward, reply.counts) == ((), True, None, None)
    driver.close()


def test_functions_are_given_in_python_by_path_and_in_a_config():
    by_path = Tools(["environments.plain_functions.add", fetch])
    assert by_path.functions == {"add": add, "fetch": fetch}
    parser = ArgumentParser()
    parser.add_subclass_arguments(Tools, "environment")
    options = {"functions": ["environments.plain_functions.add", "environments.plain_functions.fetch"], "timeout": 2}
    given = {"class_path": "stateset_lightning.environments.Tools", "init_args": options}
    made = parser.instantiate(parser.parse_object({"environment": given})).environment
    assert (made.functions, made.timeout) == ({"add": add, "fetch": fetch}, 2)


@pytest.mark.parametrize(
    ("functions", "says"),
    [
        ([], r"environment\.functions=\[\] must be one or more"),
        ([add, add], r"functions=\['add', 'add'\] must be"),
        (["environments.plain_functions.gone"], r"'environments\.plain_functions\.gone' cannot be imported: .*'gone'"),
        (["no_such_module.add"], "ModuleNotFoundError: No module named 'no_such_module'; give module.function"),
        (["math.pi"], r"environment\.functions='math\.pi' is a float, and no class or function; give module\.function"),
        ([untyped], "tool untyped cannot .* missing a type hint .*; write a type for each argument, and a docstring"),
        ([undocumented], "tool undocumented cannot be described to the model: .* no docstring"),
    ],
    ids=range(7),
)  # fmt: skip
def test_functions_that_are_no_tools_are_refused(functions, says):
    with pytest.raises(ConfigError, match=says):
        Tools(functions)


def test_a_timeout_is_positive():
    with pytest.raises(ConfigError, match=r"environment\.timeout=0 must be above 0"):
        Tools([add], timeout=0)


def test_each_call_gets_an_answer_in_order(code):
    calls = [Call("look_up", {"word": "size"}), Call("fetch", {"name": "a"}), Call("add", {"a": 1})]
    found, counts = answers(code, [add, fetch, look_up], *calls)
    assert found == ['{"word": "size", "meanings": ["größe", null]}', "page a", "2"]
    assert counts == {"tool_calls": 3}


TOOL = "tool_errors"


@pytest.mark.parametrize(
    ("call", "answer", "counted"),
    [
        (Call("divide", {"a": 1, "b": 0}), "error: ZeroDivisionError: division by zero", TOOL),
        (Call("subtract", {}), "error: there is no tool 'subtract', there are: add, divide, leave", TOOL),
        (Call("add", {}), "error: add takes (a, b): missing a required argument: 'a'", TOOL),
        (Call("add", {"a": 1, "c": 2}), "error: add takes (a, b): got an unexpected keyword argument 'c'", TOOL),
        (Call("add", {"a": "1"}), 'error: TypeError: can only concatenate str (not "int") to str', TOOL),
        (Call("leave", {}), "error: SystemExit: 3", TOOL),
        (Malformed("{\n", "no end"), "error: this tool call is malformed: no end: {", "malformed_calls"),
    ],
    ids=range(7),
)  # fmt: skip
def test_what_goes_wrong_is_the_answer_and_is_counted(code, call, answer, counted):
    found, counts = answers(code, [add, divide, leave], call, Call("add", {"a": 1}))
    assert found == [answer, "2"]
    assert counts.pop("tool_calls") == (1 if isinstance(call, Malformed) else 2)
    assert counts == {counted: 1}


def test_results_that_are_no_text_for_a_tokenizer():
    def half(text: str) -> str:
        return text

    class Odd:
        def __str__(self):
            raise KeyError("odd")

    def odd() -> object:
        return Odd()

    code = UserCode()
    found, counts = answers(code, [half, odd], Call("half", {"text": "a\ud800b"}), Call("odd", {}))
    assert found == ["a?b", "error: KeyError: 'odd'"]
    assert counts == {"tool_calls": 2, "tool_errors": 1}
    code.close()


def test_functions_have_one_thread_until_one_hangs():
    code, other, hangs = UserCode(), UserCode(), threading.Event()
    mine = code.run(threading.current_thread)[0]
    inside = lambda: [code.run(threading.current_thread)[0], threading.current_thread()]  # noqa: E731
    assert code.submit(inside).result(10) == [mine, mine]
    assert other.run(threading.current_thread)[0] is not mine
    assert code.run(hangs.wait, timeout=0.01)[0] is None
    assert code.run(threading.current_thread)[0] not in (mine, None)
    hangs.set()
    for each in (code, other):
        each.close()
    mine.join(10)
    assert not mine.is_alive()


def test_a_tool_that_takes_too_long_is_answered_for(code):
    plain_functions.ended.clear()
    plain_functions.go_on.clear()
    calls = [Call("slow", {}), Call("slow_fetch", {}), Call("add", {"a": 1})]
    found, counts = answers(code, [slow, slow_fetch], *calls[:2], timeout=0.05)
    late = "error: TookTooLong: no answer within 0.05 s"
    assert found == [late, late]
    assert counts == {"tool_calls": 2, "tool_timeouts": 2}
    assert answers(code, [add], calls[2])[0] == ["2"]
    assert "slow" not in plain_functions.ended  # the function goes on, and its result is dropped
    plain_functions.go_on.set()
    deadline = time.monotonic() + 20
    while len(plain_functions.ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(plain_functions.ended) == ["cancelled", "slow"]


def test_a_tools_own_timeout_is_an_error_of_the_tool(code):
    def impatient() -> str:
        raise TimeoutError("the site is down")

    async def impatient_too() -> str:
        raise TimeoutError("the site is down")

    async def cancelled() -> str:
        raise asyncio.CancelledError

    calls = [Call("impatient", {}), Call("impatient_too", {}), Call("cancelled", {})]
    found, counts = answers(code, [impatient, impatient_too, cancelled], *calls)
    assert found == ["error: TimeoutError: the site is down"] * 2 + ["error: CancelledError:"]
    assert counts == {"tool_calls": 3, "tool_errors": 3}


def test_a_tool_may_say_that_its_environment_failed(code):
    def broken() -> str:
        raise EnvironmentFailure("the database is gone")

    with pytest.raises(EnvironmentFailure, match="the database is gone"):
        answers(code, [broken], Call("broken", {}))


def test_a_function_that_returns_a_coroutine_is_awaited(code):
    def wrapped(name: str):
        return fetch(name)

    assert answers(code, [wrapped], Call("wrapped", {"name": "b"}))[0] == ["page b"]
