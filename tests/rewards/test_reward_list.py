"""What is accepted as a reward, names, and the command line's view of rewards."""

import contextlib
import functools
import io
import sys
from dataclasses import dataclass

import pytest
import yaml
from jsonargparse import ArgumentParser

from stateset_lightning.cli.main import main
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import ExactMatch, FunctionReward, NumericAnswer, Reward, RewardFunction, as_rewards
from stateset_lightning.rewards.functions import is_async


class OwnInit(RewardFunction):
    def __init__(self, letters):
        self.letters = letters

    def compute_reward(self, turns, context=None):
        return 1.0


class OneArgument(RewardFunction):
    def compute_reward(self, turns):
        return 1.0


async def judge(turns, context):
    return 1.0


def plain(turns, context):
    return 1.0


class Callable:
    async def __call__(self, turns, context):
        return 1.0


def test_a_class_attribute_names_a_reward():
    class Named(OwnInit):
        name = "given"
        weight = 2.0

    assert [r.name for r in as_rewards([Named("a"), Named("b")])] == ["given", "given_2"]
    assert Named("a").weight == 2.0


def test_a_dataclass_and_a_property_name_a_reward_too():
    @dataclass
    class Own(OwnInit):
        threshold: float = 0.5

        def __post_init__(self):
            self.is_ready = True

    class Asked(RewardFunction):
        @property
        def name(self):
            return "asked"

        def compute_reward(self, turns, context=None):
            return 1.0

    rewards = as_rewards([Own(weight=2.0), Own(0.1, name="mine"), Asked(weight=0.5)])
    assert [(r.name, r.weight) for r in rewards] == [("own", 2.0), ("mine", 1.0), ("asked", 0.5)]


def test_one_a_list_and_functions_are_accepted():
    reward = ExactMatch()
    assert as_rewards(reward) == [reward]
    partial = functools.partial(plain)
    rewards = as_rewards([reward, plain, judge, partial, lambda turns, context: 1, Callable()])
    assert [r.name for r in rewards] == ["exact_match", "plain", "judge", "plain_2", "function", "callable"]
    assert [is_async(r) for r in rewards] == [False, False, True, False, False, True]
    assert isinstance(rewards[1], FunctionReward)


def test_duplicate_names_do_not_take_a_given_one():
    names = [r.name for r in as_rewards([ExactMatch(), ExactMatch(), ExactMatch(name="exact_match_2"), ExactMatch()])]
    assert names == ["exact_match", "exact_match_3", "exact_match_2", "exact_match_4"]


def test_naming_twice_changes_nothing():
    rewards = [ExactMatch(), ExactMatch()]
    assert [r.name for r in as_rewards(as_rewards(rewards))] == ["exact_match", "exact_match_2"]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (None, "reward=None .* accepted are a RewardFunction, a function f\\(turns, context\\), or a list"),
        ("exact_match", "reward='exact_match' \\(str\\) is no reward"),
        ([{"class_path": "x"}], "is no reward"),
        ([], "at least one reward"),
        (ExactMatch, "is a class; give an instance: ExactMatch\\(\\)"),
        (ExactMatch(weight=float("nan")), "weight=nan of reward 'exact_match' must be a finite number"),
        (ExactMatch(weight="1"), "weight='1'"),
        (ExactMatch(timeout=0), "timeout=0 of reward 'exact_match' must be a positive number of seconds"),
        (ExactMatch(name=3), "name=3 of ExactMatch"),
        (OneArgument(), "'one_argument' must accept \\(turns, context\\), but has compute_reward\\(turns\\)"),
    ],
)
def test_anything_else_is_an_error_that_says_why(reward, message):
    with pytest.raises(ConfigError, match=message):
        as_rewards(reward)


def test_one_object_twice_is_an_error():
    reward = ExactMatch()
    with pytest.raises(ConfigError, match="stands twice"):
        as_rewards([reward, reward])


class Model:
    def __init__(self, *, reward: Reward) -> None:
        self.rewards = as_rewards(reward)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A user's module with a reward class and a reward function."""
    (tmp_path / "my_own_rewards.py").write_text(
        "from stateset_lightning.rewards import RewardFunction\n"
        "class Brevity(RewardFunction):\n"
        "    def __init__(self, limit: int = 5):\n        self.limit = limit\n"
        "    def compute_reward(self, turns, context=None):\n        return 1.0\n"
        "def polite(turns, context):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_own_rewards"
    sys.modules.pop("my_own_rewards", None)


def test_yaml_lists_single_classes_and_functions_parse_and_save(own_module):
    numeric = (
        "{class_path: stateset_lightning.rewards.NumericAnswer, init_args: {marker: 'answer:', weight: 2, timeout: 3}}"
    )
    brevity = f"{{class_path: {own_module}.Brevity, init_args: {{limit: 7}}}}"
    seen = []
    for reward in (f"[{numeric}, {brevity}]", numeric, f"{own_module}.Brevity", f"{own_module}.polite"):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(Model, "model")
        config = parser.parse_string(f"model: {{reward: {reward}}}")
        saved = parser.dump(config)
        assert parser.dump(parser.parse_string(saved)) == saved
        seen.append(parser.instantiate(config).model.rewards)
    assert [[r.name for r in rewards] for rewards in seen] == [
        ["numeric_answer", "brevity"],
        ["numeric_answer"],
        ["brevity"],
        ["polite"],
    ]
    assert isinstance(seen[0][0], NumericAnswer)
    assert (seen[0][0].marker, seen[0][0].weight, seen[0][0].timeout) == ("answer:", 2.0, 3.0)
    assert seen[0][1].limit == 7


def test_functions_in_lists_and_with_options_parse_and_save(own_module):
    options = f"{{class_path: FunctionReward, init_args: {{function: {own_module}.polite, weight: 0.5, timeout: 5}}}}"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Model, "model")
    config = parser.parse_string(f"model: {{reward: [{own_module}.polite, {options}, {own_module}.Brevity]}}")
    saved = parser.dump(config)
    assert parser.dump(parser.parse_string(saved)) == saved
    rewards = parser.instantiate(config).model.rewards
    assert [(r.name, r.weight, r.timeout) for r in rewards] == [
        ("polite", 1.0, None),
        ("polite_2", 0.5, 5.0),
        ("brevity", 1.0, None),
    ]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            "{class_path: MODULE.polite}",
            "MODULE.polite is a function, no class: write MODULE.polite alone, or class_path",
        ),
        ("[{class_path: MODULE.polite, init_args: {weight: 2}}]", "init_args: {function: MODULE.polite, weight: 1.0}"),
        ("[MODULE.polit]", "MODULE has no polit; did you mean polite?"),
    ],
)
def test_a_function_in_a_wrong_place_says_the_right_one(reward, message, own_module, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"model: {{policy: tiny, reward: {reward.replace('MODULE', own_module)}}}")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(tmp_path / "c.yaml"), "--print_config"])
    assert stopped.value.code == 2
    assert message.replace("MODULE", own_module) in capsys.readouterr().err


# The rewards that are models or libraries: their options, bounds and inherited arguments

REWARDS = [
    ("MathEquivalence", {"timeout": 3.0, "target_marker": "=>"}, {"timeout": 0}, "greater than 0"),
    (
        "RewardModel",
        {"model_name": "a/b", "label": "good", "batch_size": 4, "dtype": "bfloat16", "weight": 0.5},
        {"batch_size": 0},
        "batch_size",
    ),
    (
        "EmbeddingSimilarity",
        {"model_name": "a/b", "prefix": "query: ", "max_tokens": 9, "name": "near"},
        {"max_tokens": 0},
        "max_tokens",
    ),
    (
        "ModelJudge",
        {"model": "m", "rubric": "Good?", "base_url": "http://x/v1", "score_range": [1.0, 5.0]},
        {"max_concurrency": 0},
        "max_concurrency",
    ),
    ("ReasoningGymReward", {"answer_pattern": "<a>(.*)</a>", "allow_code": True}, {"timeout": -1}, "timeout"),
]


def parse(tmp_path, name, options):
    reward = {"class_path": f"stateset_lightning.rewards.{name}", "init_args": options}
    config = {"model": {"policy": {"model_name": "tiny"}, "reward": [reward]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(tmp_path / "c.yaml"), "--print_config"])
    return stopped.value.code, out.getvalue()


@pytest.mark.parametrize(("name", "options", "bad", "said"), REWARDS)
def test_options_are_known_and_bounded(name, options, bad, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest"])
    code, printed = parse(tmp_path, name, options)
    assert code == 0
    (reward,) = yaml.safe_load(printed)["model"]["reward"]
    assert reward["init_args"] == {**reward["init_args"], **options}
    code, _ = parse(tmp_path, name, {**options, **bad})
    assert code == 2
    assert said in capsys.readouterr().err
    code, _ = parse(tmp_path, name, {**options, "no_such_option": 1})
    assert code == 2
    assert "no_such_option" in capsys.readouterr().err
