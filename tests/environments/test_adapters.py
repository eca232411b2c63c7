"""Users' classes, unedited: what each interface's driver gives, and what it makes of classes that fail."""

import asyncio
import functools
import threading

import pytest
from environments.gymnasium_style import CountdownEnv
from environments.plain_functions import add, fetch, undocumented
from environments.skyrl_style import Output, PromptingEnv, SumEnv
from environments.trl_style import EchoEnvironment, GuessEnvironment
from module_runs import fit, make_data, make_module

from stateset_lightning.environments import (
    EnvironmentConfig,
    EnvironmentFailure,
    Opening,
    ScriptedUser,
    Settings,
    Tools,
    adapters,
    as_environment,
)
from stateset_lightning.environments.tool_calls import Call
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.rewards import EnvironmentReward
from stateset_lightning.types import Scenario, Turn

PROMPT = (Turn("system", "Be brief."), Turn("user", "Guess."))


def columns(**more):
    return Scenario(**{"id": "a", "prompt": "Guess.", **more}).columns()


def call(name, arguments):
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


@pytest.fixture
def driver_of():
    """`driver_of(environment, **settings)` -> its driver, which is closed at the end."""
    made = []

    def make(environment, **settings):
        made.append(as_environment(environment, Settings(**settings)))
        return made[-1]

    yield make
    for driver in made:
        driver.close()


# TRL ------------------------------------------------------------------------------------------------------------------


def test_a_trl_environment_runs_unedited(driver_of):
    driver = driver_of(GuessEnvironment)
    opening = driver.reset(columns(highest=9, secret=7), seed=3)
    assert opening.after(PROMPT) == [PROMPT[0], Turn("user", "Guess. Between 1 and 9.")]
    assert driver.environment.columns["seed"] == 3
    (schema,) = driver.schemas
    assert schema["function"]["name"] == "guess"
    assert schema["function"]["parameters"]["properties"] == {
        "number": {"type": "integer", "description": "The guess."}
    }
    reply = driver.step(call("guess", '{"number": 4}'))
    assert (reply.turns, reply.done, reply.reward) == ((Turn("tool", "higher"),), False, None)
    assert driver.get_reward() == 0
    reply = driver.step(call("guess", '{"number": 7}') + call("guess", '{"number": 8}'))
    assert [turn.content for turn in reply.turns] == ["right", "error: ValueError: the game is over"]
    assert reply.counts == {"tool_calls": 2, "malformed_calls": 0, "tool_errors": 1, "tool_timeouts": 0}
    reply = driver.step("It is 7.")
    assert (reply.turns, reply.done) == ((), True)
    assert driver.get_reward() == 0.5
    driver.reset(columns(highest=9, secret=1), seed=3)
    assert driver.get_reward() == 0


def test_calls_from_many_threads_reach_an_environment_on_one(driver_of):
    driver = driver_of(GuessEnvironment)
    answers = []

    def play():
        driver.reset(columns(highest=9, secret=7), seed=3)
        answers.append(driver.step(call("guess", '{"number": 7}')).turns[0].content)

    for _ in range(2):
        thread = threading.Thread(target=play)
        thread.start()
        thread.join()
    assert answers == ["right", "right"]
    assert driver.get_reward() == 1


def test_a_trl_environment_may_be_async_and_say_nothing(driver_of):
    driver = driver_of(EchoEnvironment())
    asked = (Turn("user", "Guess."),)
    assert driver.reset(columns(prompt=None, messages=asked, topic="t"), seed=0) == Opening()
    assert driver.environment.seen == {"prompt": [{"role": "user", "content": "Guess."}], "topic": "t"}
    assert driver.step(call("echo", '{"text": "a"}')).turns == (Turn("tool", "a"),)
    assert driver.get_reward() == 1


def test_a_dictionary_chooses_by_the_column_environment(driver_of):
    driver = driver_of({"guess": GuessEnvironment, "count": CountdownEnv, "echo": lambda: EchoEnvironment()})
    driver.reset(columns(environment="guess", highest=9, secret=7), seed=0)
    assert "environment" not in driver.environment.columns
    assert [schema["function"]["name"] for schema in driver.schemas] == ["guess"]
    driver.step(call("guess", '{"number": 7}'))
    assert driver.get_reward() == 1
    driver.reset(columns(environment="count"), seed=0)
    assert (type(driver.environment), driver.schemas) == (CountdownEnv, [])
    with pytest.raises(DataError, match="environment='chess', which is none of: guess, count, echo"):
        driver.reset(columns(environment="chess"), seed=0)


# Gymnasium ------------------------------------------------------------------------------------------------------------


def test_a_gymnasium_environment_runs_unedited(driver_of):
    driver = driver_of(CountdownEnv)
    opening = driver.reset(columns(topic="t"), seed=1)
    left = driver.environment.left
    assert opening.after(PROMPT) == [*PROMPT, Turn("user", f"count down from {left}")]
    assert driver.environment.options["topic"] == "t"
    assert driver.schemas == []
    replies = [driver.step(str(number)) for number in range(left, 0, -1)]
    assert [reply.done for reply in replies] == [False] * (left - 1) + [True]
    assert [reply.reward for reply in replies] == [1.0] * left
    assert replies[0].turns == (Turn("user", "go on"),)
    assert replies[-1].turns == ()
    assert driver.get_reward() == left
    assert driver.reset(columns(), seed=1) == opening
    assert driver.get_reward() is None
    driver.close()
    assert driver.environment.closed


def test_observations_that_are_no_text_become_one(driver_of):
    class Numbers(CountdownEnv):
        def step(self, action):
            return [1, 2], 0, False, False, {}

    driver = driver_of(Numbers())
    driver.reset(columns(), seed=0)
    assert driver.step("x").turns == (Turn("user", "[1, 2]"),)


# SkyRL ----------------------------------------------------------------------------------------------------------------


def test_a_skyrl_environment_runs_unedited(driver_of):
    driver, made = driver_of(SumEnv, max_turns=3), SumEnv.made
    given = columns(prompt="1 + 2?", reward_spec={"ground_truth": "3"})
    assert driver.reset(given, seed=0) == Opening()
    assert driver.environment.chat == [{"role": "user", "content": "1 + 2?"}]
    reply = driver.step("4")
    assert (reply.turns, reply.reward, reply.done) == ((Turn("user", "not 4, try again"),), 0.0, False)
    reply = driver.step("3")
    assert (reply.turns, reply.reward, reply.done) == ((), 1.0, True)
    assert driver.get_reward() == 1
    first = driver.environment
    driver.reset(given, seed=0)
    assert [driver.step("5").done for _ in range(3)] == [False, False, True]
    assert driver.get_reward() == 0
    assert (SumEnv.made - made, first.chat) == (2, [])
    assert given["reward_spec"] == {"ground_truth": "3"}


def test_a_skyrl_environment_may_write_the_prompt(driver_of):
    driver = driver_of(PromptingEnv())
    opening = driver.reset(columns(), seed=0)
    own = [Turn("user", "Hello"), Turn("assistant", "Yes?"), Turn("user", "1 + 1?")]
    assert opening.after(PROMPT) == [PROMPT[0], *own]
    assert opening.after(PROMPT[1:]) == own
    assert Opening((Turn("system", "S"), own[0]), replaces=True).after(PROMPT) == [Turn("system", "S"), own[0]]
    assert driver.step("2").reward == 0.5


def test_a_prompt_that_goes_on_keeps_its_place(driver_of):
    class Longer(PromptingEnv):
        def init(self, prompt):
            return [*prompt, {"role": "user", "content": "Go."}], {}

    assert driver_of(Longer).reset(columns(), seed=0) == Opening((Turn("user", "Go."),))


# Our own --------------------------------------------------------------------------------------------------------------


class Own:
    def reset(self, scenario, seed):
        self.seed = seed
        return f"{scenario['prompt']} {seed}"

    async def step(self, text):
        await asyncio.sleep(0)
        return [{"role": "tool", "content": text}], 0.25, text == "end"

    def hint(self, number: int) -> str:
        """Gives a hint.

        Args:
            number: Of the hint.
        """
        return f"hint {number}"


def test_an_environment_of_our_own_interface(driver_of):
    driver = driver_of(Own)
    assert driver.reset(columns(), seed=5) == Opening((Turn("user", "Guess. 5"),))
    assert driver.step(call("hint", '{"number": 2}')).turns == (Turn("tool", "hint 2"),)
    reply = driver.step("x")
    assert (reply.turns, reply.reward, reply.done) == ((Turn("tool", "x"),), 0.25, False)
    assert driver.step("end").done
    assert driver.get_reward() == 0.5


def test_tools_are_driven_like_any_other(driver_of, tiny_tokenizer):
    driver = driver_of(Tools([add, fetch]), tokenizer=tiny_tokenizer)
    assert driver.reset(columns(), seed=0) == Opening()
    assert [schema["function"]["name"] for schema in driver.schemas] == ["add", "fetch"]
    reply = driver.step(call("fetch", '{"name": "a"}') + "<tool_call>?</tool_call>")
    assert [turn.content.partition(":")[0] for turn in reply.turns] == ["page a", "error"]
    assert driver.step("3").done
    assert driver.get_reward() is None


def test_a_drivers_time_limit_holds_for_methods(driver_of):
    class Slow(EchoEnvironment):
        async def wait(self) -> str:
            """Waits."""
            await asyncio.sleep(10)

    driver = driver_of(Slow, tool_timeout=0.05)
    driver.reset(columns(), seed=0)
    assert driver.step(call("wait", "{}")).counts["tool_timeouts"] == 1
    assert driver.get_reward() == 0


# What goes wrong ------------------------------------------------------------------------------------------------------


class NoInterface:
    def reset(self, task, level, mode):
        return ""

    def step(self, text):
        return ""


class NoSteps(CountdownEnv):
    def step(self):
        return None


class Undescribed(EchoEnvironment):
    def count(self, n) -> int:
        """Counts."""
        return n


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (NoInterface, r"NoInterface has reset\(task, level, mode\), step\(text\); it must have reset\("),
        (NoSteps(), r"NoSteps has reset\(\*, seed.*\), step\(\); it must"),
        (3, "int has none of these; it must have"),
        (Undescribed, r"tool Undescribed\.count cannot be described .* type hint .*; write a type"),
    ],
    ids=range(4),
)  # fmt: skip
def test_what_is_no_environment_is_refused(environment, says):
    with pytest.raises(ConfigError, match=says):
        as_environment(environment)


class OddText:
    def __str__(self):
        raise RuntimeError("no text")


class OddNumber:
    def __float__(self):
        raise RuntimeError("no number")


def changed(base, method, outcome):
    """A class whose method has the same signature, and raises or returns the outcome."""

    def replacement(self, *args, **kwargs):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    wrapped = functools.wraps(getattr(base, method, replacement))(replacement)
    return type("Mine", (base,), {method: wrapped})


def play(driver):
    driver.reset(columns(**EXTRA), seed=0)
    driver.step("x")
    driver.get_reward()


ERROR = ZeroDivisionError("by\nzero")
EXTRA = {"highest": 9, "secret": 1, "reward_spec": {"ground_truth": "3"}}


@pytest.mark.parametrize(
    ("base", "method", "outcome", "says"),
    [
        (Own, "reset", ERROR, "ZeroDivisionError: by zero"),
        (Own, "step", ERROR, "ZeroDivisionError: by zero"),
        (Own, "step", SystemExit(1), "SystemExit: 1"),
        (Own, "reset", 5, "returned 5 where turns belong"),
        (Own, "step", "hello", r"step returned 'hello', not \(reply, reward, done\)"),
        (Own, "step", (None, 1, 1), "done=1, neither True nor False"),
        (Own, "step", (None, 1, False), "done=False and the reply None: there is nothing to answer"),
        (Own, "step", (None, float("nan"), False), "not finite"),
        (Own, "step", (None, OddNumber(), False), "RuntimeError: no number"),
        (Own, "get_reward", "much", "'much', which is no number"),
        (Own, "get_reward", ERROR, "ZeroDivisionError: by zero"),
        (GuessEnvironment, "reset", ["image"], r"\['image'\], neither a text nor None"),
        (GuessEnvironment, "get_reward", float("inf"), "not finite"),
        (EchoEnvironment, "get_reward", ERROR, "ZeroDivisionError: by zero"),
        (CountdownEnv, "reset", "old", r"'old', not \(observation, info\)"),
        (CountdownEnv, "step", ("a", 1, False, {}), r"not \(observation, reward, terminated, tr"),
        (CountdownEnv, "step", ("a", 1, "no", False, {}), "neither True nor False"),
        (CountdownEnv, "step", (OddText(), 1, False, False, {}), "RuntimeError: no text"),
        (CountdownEnv, "step", ("a", "1x", False, False, {}), "no number"),
        (SumEnv, "__init__", ERROR, "ZeroDivisionError: by zero"),
        (SumEnv, "init", ("hello",), r"not \(prompt, info\)"),
        (SumEnv, "init", ([], {}), "an empty prompt"),
        (SumEnv, "init", ([{"role": "robot", "content": ""}], {}), "role 'robot'"),
        (SumEnv, "step", {"observations": [], "reward": 1}, "KeyError: 'done'"),
        (SumEnv, "step", "hello", "no attribute 'observations'"),
        (SumEnv, "step", Output([{"role": "assistant", "content": "a"}], 1, False), "role 'assistant'"),
    ],
    ids=range(26),
)  # fmt: skip
def test_what_fails_is_an_environment_failure(base, method, outcome, says, driver_of):
    driver = driver_of(changed(base, method, outcome))
    with pytest.raises(EnvironmentFailure, match=says) as failure:
        play(driver)
    if outcome is ERROR:
        assert failure.value.__cause__ is ERROR


def test_a_class_that_cannot_be_made_is_a_failure():
    with pytest.raises(EnvironmentFailure, match="Mine: ZeroDivisionError") as failure:
        as_environment(changed(GuessEnvironment, "__init__", ERROR))
    assert failure.value.__cause__ is ERROR


def test_a_scenario_stays_as_it_is(driver_of):
    class Greedy(Own):
        def reset(self, scenario, seed):
            scenario["items"].clear()

    given = columns(items=[1, 2])
    driver_of(Greedy).reset(given, seed=0)
    assert given["items"] == [1, 2]


def test_an_environment_that_hangs_when_it_closes_is_left_behind():
    class Stuck(Own):
        def close(self):
            threading.Event().wait(20)

    driver = as_environment(Stuck)
    driver.reset(columns(), seed=0)
    thread = threading.Thread(target=driver.close)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


def test_a_public_method_without_a_docstring_is_no_tool(driver_of):
    class Quiet(EchoEnvironment):
        def helper(self, n):
            return undocumented(n)

    assert [schema["function"]["name"] for schema in driver_of(Quiet).schemas] == ["echo"]


# A whole run ----------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"What is {a} + 4?", "highest": 9, "secret": a, "reward_spec": {"ground_truth": str(a + 4)}}
    for a in (2, 3, 4, 5)
]


def echo(text):
    return Call("echo", {"text": text})


@pytest.mark.parametrize(
    ("environment", "called", "ends", "reward"),
    [
        (GuessEnvironment, lambda text: Call("guess", {"number": 4}), {"turns"}, 0.25),  # one of four secrets, at once
        (EchoEnvironment, echo, {"turns"}, 2.0),  # one for each echo
        ({"a": EchoEnvironment, "b": CountdownEnv}, echo, {"turns", "environment"}, None),
        (CountdownEnv, None, {"environment"}, None),
        (SumEnv, None, {"environment"}, None),
        (PromptingEnv, None, {"environment"}, 0.5),
    ],
    ids=["TRL", "TRL, async", "chosen", "Gymnasium", "SkyRL", "SkyRL, its own prompt"],
)
def test_classes_train_unedited(tmp_path, monkeypatch, environment, called, ends, reward):
    """The bundled model calls no tools, so what it says is read as a call."""
    if called is not None:
        monkeypatch.setattr(adapters, "find_calls", lambda text, *rest: [called(text)])
    names = ["a", "b", "a", "b"] if isinstance(environment, dict) else [None] * 4
    rows = [{**row, "environment": name} if name else row for row, name in zip(ROWS, names, strict=True)]
    config = EnvironmentConfig(environment, max_turns=2)
    trainer = fit(tmp_path, make_module(reward=EnvironmentReward(), environment=config), make_data(train=rows))
    last = trainer.lightning_module.metrics.last
    assert trainer.global_step == 2
    ended = {name.removeprefix("conversation/ended_by_") for name in last if "ended_by" in name}
    assert (
        ends <= ended <= ends | {"length", "tokens"}
    )  # the model sees no tools, and may say too much of their answers
    if reward is not None:
        assert last["train/reward"] == reward


class Waits(ScriptedUser):
    async def step(self, text):
        await asyncio.sleep(0)
        return "go on", None, False

    def reset(self, scenario, seed):
        self.thread = threading.current_thread()


def test_what_a_user_derives_from_a_class_of_ours_has_a_thread_of_its_own(driver_of):
    driver = driver_of(Waits)
    driver.reset(columns(), seed=1)
    assert driver.environment.thread is not threading.current_thread()
    assert driver.step("yes").turns == (Turn("user", "go on"),)
