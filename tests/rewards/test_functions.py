"""Functions that people have: each form gets what its parameters name, or is refused with a function to paste."""

import asyncio
import functools
import pickle
import re
from pathlib import Path

import pytest
import torch
from own_modules import own_module

from stateset_lightning.data.shapes import RowOptions
from stateset_lightning.data.sources import read_split
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import FunctionReward, GroupReward, RewardFunction, Scorer, as_rewards, failure_counts
from stateset_lightning.rewards.base import to_outcome
from stateset_lightning.rewards.functions import _ROLES, _UNSURE, STAND_INS, alarm_in, written
from stateset_lightning.types import Scenario, Turn

ROW = {
    "prompt": "2 + 2?",
    "target": "4",
    "difficulty": 3,
    "data_source": "sums",
    "extra_info": {"index": 7},
    "reward_model": {"style": "rule", "ground_truth": "4"},
}
SCENARIO = Scenario(id="a", **ROW)

# Each scores 1 for the answer "4" to ROW and 0 for "5", and checks on the way that nothing else got mixed up.
FORMS = """
def by_turns(turns, context):
    assert turns[0].content == "2 + 2?" and context["difficulty"] == 3
    return float(turns[-1].content == context["target"])
def by_turns_unused(turns, _): return turns[-1].content == "4"
def conversation_and_row(conversation, row=None): return conversation[-1]["content"] == row["target"]
def completion_target(completion, target): return completion == target
def target_first(target, completion): assert target == "4"; return completion == target
def prompt_completion(prompt, completion): return float(eval(prompt.strip("?")) == int(completion))
def prompt_response(prompt, response): assert prompt == "2 + 2?"; return response == "4"
def question_answer(question, answer): assert question == "2 + 2?"; return answer == "4"
def answer_target(answer, target): return answer == target
def output_expected(output, expected): return output == expected
def response_answer(response, answer): assert answer == "4"; return response == answer
def model_last(correct_answer, model_answer): return correct_answer == "4" == model_answer
def sklearn(y_true, y_pred): assert y_true == "4"; return y_pred == y_true
def truth_guess(truth, guess): assert truth == "4"; return guess == truth
def gt_pred(gt, pred): assert gt == "4"; return pred == gt
def answers_text(answers, output_text): assert answers == "4"; return output_text == answers
def keywords(*, completion, ground_truth): return completion == ground_truth
def positional(completion, target, /): return completion == target
def with_column(completion, target, difficulty): return completion == target and difficulty == 3
def with_default(completion, target, difficulty=0, other=2):
    return completion == target and (difficulty, other) == (3, 2)
def alone(completion): return completion == "4"
def with_positional_default(completion, target, level=1, /): return level * (completion == target)
def trl(completions, target, **columns):
    assert columns["difficulty"] == [3] and columns["prompts"] == ["2 + 2?"]
    return [float(c == t) for c, t in zip(completions, target)]
async def trl_async(prompts, completions, target): return [float(c == t) for c, t in zip(completions, target)]
async def by_turns_async(turns, context): return turns[-1].content == context["target"]
async def completion_target_async(completion, target): return completion == target
def verl(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and extra_info == {"index": 7}
    return {"score": float(solution_str == ground_truth), "acc": 1}
def verl_short(solution_str, ground_truth, method="strict", format_score=0.0, score=1.0, difficulty=0):
    assert difficulty == 0
    return score if solution_str == ground_truth else format_score
def verifiers(completion, answer, **kwargs):
    assert kwargs["difficulty"] == 3 and kwargs["extra_info"] == {"index": 7} and "completion" not in kwargs
    return 1.0 if completion == answer else 0.0
def verifiers_keywords(completion, **kwargs): return completion == kwargs["answer"] == kwargs["target"]
def trl_answer(completions, answer, **kwargs): return [float(c == a) for c, a in zip(completions, answer)]
def trl_solution(prompts, completions, solution): return [float(c == s) for c, s in zip(completions, solution)]
def trl_keywords(completions, **kwargs): return [float(c == t) for c, t in zip(completions, kwargs["ground_truth"])]
def openrlhf(queries, prompts, labels):
    assert [query[len(prompt):] for query, prompt in zip(queries, prompts)] in (["4"], ["5"])
    return torch.tensor([float(q.endswith(label)) for q, label in zip(queries, labels)])
def openrlhf_dict(queries, prompts, labels, **kwargs):
    right = torch.tensor([float(q.endswith(label)) for q, label in zip(queries, labels)])
    return {"rewards": right, "scores": right, "extra_logs": {"right": right}}
def verl_lists(data_sources, solution_strs, ground_truths, extra_infos):
    assert data_sources == ["sums"] and extra_infos == [{"index": 7}]
    return [{"score": float(s == g), "acc": 1} for s, g in zip(solution_strs, ground_truths)]
def metric(predictions, references): return [float(p == r) for p, r in zip(predictions, references)]
def easyr1(reward_inputs, format_weight=0.1):
    return [{"overall": float(r["response"] == r["ground_truth"]), "format": 1.0} for r in reward_inputs]
def easyr1_single(reward_input): return {"overall": float(reward_input["response"] == reward_input["ground_truth"])}
def with_info(completion, target): return float(completion == target), {"length": len(completion)}
class called:
    def __call__(self, completion, target): return completion == target
class Subclass(RewardFunction):
    def compute_reward(self, turns, context=None): return turns[-1].content == context["target"]
class Compared(GroupReward):
    def compute_rewards(self, conversations_G, context, scores):
        return [turns[-1].content == context["target"] for turns in conversations_G]
"""
NAMESPACE = {"RewardFunction": RewardFunction, "GroupReward": GroupReward, "torch": torch}
exec(FORMS, NAMESPACE)
NAMES = re.findall(r"^(?:async )?(?:def|class) (\w+)", FORMS, re.MULTILINE)


def run(reward, answers=("4", "5"), columns=None):
    scenario = SCENARIO if columns is None else Scenario(**{"id": "a", **columns})
    with Scorer(reward) as scorer, scorer.start(len(answers), num_generations=len(answers)) as session:
        for n, answer in enumerate(answers):
            session.submit(n, [*scenario.turns(), Turn("assistant", answer)], scenario.columns(), completion_tokens=1)
        return session.collect()


@pytest.mark.parametrize("name", NAMES)
def test_each_form_gives_the_right_score(name):
    form = NAMESPACE[name]
    scores = run(form() if isinstance(form, type) else form)
    assert not scores.failures, scores.failures[0].traceback
    assert scores.totals_N.tolist() == [1.0, 0.0]


def test_the_page_has_all_names_and_its_examples_are_accepted():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    table, examples = page.partition("## Functions")[2].split("```python")[:2]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == {*_ROLES, *_UNSURE, *STAND_INS}
    lines = [line for line in examples.partition("```")[0].splitlines() if line]
    assert len(lines) == 10
    for line in lines:
        namespace = {}
        exec(line, namespace)
        assert as_rewards(namespace.get("f") or namespace["compute_score"])


def test_a_function_of_verifiers_gets_messages_when_asked():
    def verifiers(prompt, completion, answer):
        return prompt[-1]["role"] == "user" and completion[-1]["content"] == answer

    scores = run(FunctionReward(verifiers, conversational=True))
    assert scores.totals_N.tolist() == [1.0, 0.0]


def test_a_list_of_functions_with_weights_is_summed():
    rewards = [NAMESPACE["trl"], FunctionReward(NAMESPACE["verl"], weight=0.5), functools.partial(NAMESPACE["alone"])]
    scores = run(rewards)
    assert scores.names == ("trl", "verl", "alone")
    assert scores.totals_N.tolist() == [2.5, 0.0]
    assert scores.breakdowns[0]["verl"] == {"acc": 1}


# Each is meant to give 1 for the answer "4"; the parameters' names do not tell.
REFUSED = {
    "def f(a, b): return a == b": "takes (a, b)",
    "def f(x): return x == '4'": "takes (x)",
    "def f(solution, answer): return solution == answer": "takes (solution, answer)",
    "def f(prompt, thing, /): return prompt == '2 + 2?' and thing == '4'": "takes (prompt, thing)",
    "def f(completion, response): return completion == response": "takes (completion, response)",
    "def f(thing, target, difficulty=1): return thing == target": "takes (thing, target, difficulty)",
    "async def f(a, b): return a == b": "takes (a, b)",
    "def f(completion, state): return completion == state['answer'] == state['completion']": "takes state",
    "def f(completion, parser, answer): return parser.parse_answer(completion) == answer": "takes parser",
    "def f(): return 1": "takes ()",
}


@pytest.mark.parametrize("code", REFUSED)
def test_any_other_is_refused_with_a_wrapper_that_works_when_pasted(code):
    namespace = {}
    exec(code, namespace)
    with pytest.raises(ConfigError) as caught:
        as_rewards(namespace["f"])
    message = str(caught.value)
    assert message.startswith(f"reward 'f' {REFUSED[code]}")
    assert "f(completion, target), f(prompt, completion) or f(turns, context)" in message
    assert "\n" not in message
    is_guess = REFUSED[code] in ("takes (a, b)", "takes (solution, answer)", "takes (completion, response)")
    assert (re.search(r"; if (\w+) gets it, swap what \w+ and \1 get", message) is not None) == is_guess
    exec(re.search(r"(async )?def f_reward.*", message)[0], namespace)
    assert run(namespace["f_reward"], ["4"]).totals_N.tolist() == [1.0]


def test_a_partial_keeps_what_it_has_set_and_nothing_is_passed_twice():
    def graded(completion, target, difficulty=0):
        return completion == target and difficulty == 9

    assert run(functools.partial(graded, difficulty=9, target="5")).totals_N.tolist() == [0.0, 1.0]

    def graded_with_all(completion, target, **columns):
        return completion == target and columns["difficulty"] == 9 and "target" not in columns

    def options_of_verl(solution_str, ground_truth, difficulty=1.0, **columns):
        return difficulty * (solution_str == ground_truth and columns["data_source"] == "sums")

    assert run(functools.partial(graded_with_all, difficulty=9)).totals_N.tolist() == [1.0, 0.0]
    assert run(functools.partial(NAMESPACE["trl"], target=["5"])).totals_N.tolist() == [0.0, 1.0]
    assert run(options_of_verl).totals_N.tolist() == [1.0, 0.0]
    by_position = functools.partial(NAMESPACE["target_first"], "4")
    assert run(by_position).totals_N.tolist() == [1.0, 0.0]


def test_a_column_of_the_very_name_comes_before_the_target_and_verl_gets_what_verl_gives():
    def columns(solution_str, ground_truth, question, data_source, extra_info):
        return (ground_truth, question, data_source, extra_info) == ("5", "Sum?", None, {})

    assert run(columns, ["x"], {"prompt": "p", "target": "4", "ground_truth": "5", "question": "Sum?"}).totals_N == 1


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"question": "2 + 3?", "answer": 5.0}, None, 5),
        ({"question": "Half?", "answer": 0.5}, None, 0.5),
        ({"question": "Which?", "choices": ["red", "blue"], "answer": 1}, None, "B"),
        ({"prompt": "Which?", "label": 1}, {"target": "{{ 'AB'[label] }}"}, "B"),
        ({"prompt": "Which?", "label": [1.0, 2.0]}, {"target": "label"}, [1, 2]),
        ({"prompt": "Why?", "label": "So: 5"}, {"target": "{{ label[-1] }}"}, "So: 5"),
        ({"prompt": "After 4?", "n": 4, "label": "x"}, {"target": "{{ n + 1 }}"}, "x"),
    ],
)
def test_the_targets_own_column_is_the_target_as_built_in_rewards_see_it(row, fields, expected):
    columns = read_split([row], "train", RowOptions(fields=fields)).scenarios[0].columns()
    name = "answer" if "answer" in row else "label"
    namespace = {}
    exec(f"def one(completion, {name}): seen.append({name}); return 1.0", space := {"seen": (seen := [])}, namespace)
    exec(f"def trl(completions, {name}, **all): seen.extend({name}); return [1.0]", space, namespace)
    assert run([namespace["one"], namespace["trl"]], ["x"], columns).totals_N == 2
    assert [repr(value) for value in seen] == [repr(expected)] * 2
    assert columns.get("n", 4) == 4


def test_what_is_required_and_not_there_is_missing_and_fails():
    def graded(completion, reference, level, prompt, other=None):
        return 1.0

    (reward,) = as_rewards(graded)
    assert reward.missing({"level": 1, "target": "4"}) == []
    assert reward.missing({"reference": "4", "target": None}) == ["level"]
    assert reward.missing({"target": None}) == ["level", "target"]
    assert as_rewards(NAMESPACE["by_turns"])[0].missing({}) == []
    scores = run(graded)
    assert failure_counts(scores) == {"reward_failures/graded/RewardError": 2}
    assert "asks for the column level, which this row does not have; it has: " in scores.failures[0].message


@pytest.mark.parametrize(
    ("output", "value", "breakdown"),
    [
        ({"score": 0.5, "acc": True}, 0.5, {"acc": True}),
        ((0.5, {"why": "half"}), 0.5, {"why": "half"}),
        ((1, "because"), 1.0, {"info": "because"}),
        ({"score": torch.tensor([0.25])}, 0.25, {}),
    ],
)
def test_scores_with_something_beside_them(output, value, breakdown):
    outcome = to_outcome(output)
    assert (outcome.value, outcome.breakdown) == (value, breakdown)


@pytest.mark.parametrize("output", [[0.5], {"reward": 1.0}, (1.0, 2.0), {"score": "1"}, {"score": {"score": 1}}, ()])
def test_any_other_return_value_fails_and_says_what_to_return(output):
    scores = run(lambda completion: output, ["4"])
    (failure, *_) = scores.failures
    assert failure.error == "RewardError"
    assert "returned" in failure.message
    if not isinstance(output, dict) or "score" not in output:
        assert (
            "return a number, RewardResult(score, breakdown), {'score': number, ...}, (score, info)" in failure.message
        )


# Alarms in a thread ---------------------------------------------------------------------------------------------------

ALARMED = """
import functools
import importlib
import signal
from functools import partial
from stateset_lightning.rewards import RewardFunction
from math_verify import parse, verify

class Timeout:
    def __enter__(self):
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(5)
    def __exit__(self, *_):
        signal.alarm(0)

def by_module(completion, target):
    try:
        return float(verify(parse(target), parse(completion)))
    except Exception:
        return 0.0

def by_import(completion, target):
    import math_verify
    try:
        return float(math_verify.verify(math_verify.parse(target), math_verify.parse(completion)))
    except Exception:
        return 0.0

def by_class(completion, target):
    try:
        with Timeout():
            return float(completion == target)
    except ValueError:
        return 0.0

def by_other(completion, target):
    return by_class(completion, target)

async def waits(completion, target):
    return by_class(completion, target)

def innocent(completion, target):
    return float(completion == target)

class WithMethod:
    def __call__(self, completion, target):
        return self._grade(completion, target)
    def _grade(self, completion, target):
        return by_class(completion, target)

class Reward(RewardFunction):
    def compute_reward(self, turns, context=None):
        return self._grade(turns[-1].content, context["target"])
    def _grade(self, completion, target):
        return by_class(completion, target)

class Inherits(Reward):
    name = "inherits"

class Holds:
    def __init__(self, grade):
        self.grade = grade
    def __call__(self, completion, target):
        return self.grade(completion, target)

def by_default(completion, target, grade=by_class):
    return grade(completion, target)

def by_keyword_default(completion, target, *, grade=by_class):
    return grade(completion, target)

def by_argument(grade, completion, target):
    return grade(completion, target)

GRADERS = {"maths": [by_class]}

def by_table(completion, target):
    return GRADERS["maths"][0](completion, target)

def by_name(completion, target):
    return float(importlib.import_module("math_verify").verify(target, completion))

def by_signal(completion, target):
    signal.signal(signal.SIGALRM, lambda *_: None)

@functools.cache
def cached(completion, target):
    return by_class(completion, target)

def timed(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with Timeout():
            return function(*args, **kwargs)
    return call

wrapped = timed(innocent)
"""

HIDDEN = """WithMethod() Reward() Inherits() Holds(by_class) Holds({"a": [by_class]}) Holds(innocent).grade by_default
by_keyword_default partial(by_argument,by_class) partial(innocent,target=by_class) by_table by_name by_signal cached
wrapped Holds(importlib.import_module("math_verify")) Holds(innocent)"""


@pytest.fixture(scope="module")
def alarmed(tmp_path_factory):
    with own_module(tmp_path_factory.mktemp("alarmed"), "alarmed_rewards", ALARMED) as alarmed_rewards:
        yield alarmed_rewards


def test_what_sets_alarms_is_noticed_and_gets_a_process(alarmed, caplog):
    pytest.importorskip("math_verify")
    names = ["by_module", "by_import", "by_class", "by_other", "innocent"]
    found = [alarm_in(getattr(alarmed, name)) for name in names]
    assert found == ["math_verify", "math_verify", "alarm", "alarm", ""]
    assert alarm_in(functools.partial(alarmed.by_other, target="4")) == "alarm"
    scores = run([getattr(alarmed, name) for name in names])
    assert scores.values_NF.tolist() == [[1.0] * 5, [0.0] * 5]
    told = [record.message for record in caplog.records if "signals" in record.message]
    assert len(told) == 4
    assert "reward 'by_module' uses math_verify" in told[0]
    assert "set its timeout" in told[0]
    with Scorer([alarmed.innocent, FunctionReward(alarmed.by_class, timeout=3)]) as scorer:
        assert [reward.timeout for reward in scorer.rewards] == [None, 3]
    with pytest.raises(ConfigError, match=r"'waits' uses alarm.* write it as a plain `def`"):
        Scorer(alarmed.waits)


@pytest.mark.parametrize("made", re.findall(r"\S+\(\{.*?\}\)|\S+", HIDDEN))
def test_an_alarm_is_found_wherever_a_reward_holds_what_sets_it(made, alarmed):
    pytest.importorskip("math_verify")
    (reward,) = as_rewards(eval(made, vars(alarmed)))
    assert bool(alarm_in(written(reward))) == (made not in ("Holds(innocent).grade", "Holds(innocent)"))


def test_built_in_rewards_set_no_alarms_that_a_time_out_is_needed_for():
    for name in ("ExactMatch", "Contains", "NumericAnswer", "HelpfulnessReward", "JsonValid"):
        reward = getattr(__import__("stateset_lightning.rewards", fromlist=[name]), name)()
        assert alarm_in(written(reward)) == ""


def test_bound_functions_go_to_worker_processes_and_remember_what_they_are(alarmed):
    from stateset_lightning.run.made_of import flat

    reward = FunctionReward(alarmed.innocent, weight=0.5, timeout=20)
    assert pickle.loads(pickle.dumps(reward))._roles == reward._roles
    assert run(reward).totals_N.tolist() == [0.5, 0.0]
    made = dict(flat("model.reward.innocent", reward, is_object=True))
    assert made["model.reward.innocent"] == "FunctionReward"
    assert made["model.reward.innocent.function"] == '"innocent"'
    assert made["model.reward.innocent.weight"] == 0.5


def test_an_awaitable_list_is_read_like_a_list():
    reward = FunctionReward(NAMESPACE["trl_async"])
    output = reward.compute_reward([*SCENARIO.turns(), Turn("assistant", "4")], SCENARIO.columns())
    assert asyncio.run(output).score == 1.0


def test_a_decorator_without_wraps_leaves_a_function_what_it_takes():
    def timed(function):
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    @timed
    def compute_score(solution_str, ground_truth):
        return float(solution_str == ground_truth)

    @timed
    @timed
    def lists(completions, target, **columns):
        return [float(c == t) for c, t in zip(completions, target, strict=True)]

    class Holder:
        @timed
        def method(self, turns, context):
            return float(turns[-1].content == context["target"])

    for function in (compute_score, lists, Holder().method):
        scores = [
            FunctionReward(function).compute_reward([Turn("user", ROW["prompt"]), Turn("assistant", text)], ROW)
            for text in ("4", "5")
        ]
        assert [to_outcome(score).value for score in scores] == [1.0, 0.0]
