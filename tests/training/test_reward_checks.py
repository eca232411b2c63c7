"""What rewards need and rows do not have stops a run before anything is sampled."""

from contextlib import nullcontext

import pytest
from module_runs import DigitReward, fit, make_data, make_module, make_trainer

from stateset_lightning.algorithm import GRPO
from stateset_lightning.environments import EnvironmentConfig, ScriptedUser
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import (
    Contains,
    EmbeddingSimilarity,
    ExactMatch,
    MathEquivalence,
    ModelJudge,
    NumericAnswer,
    RewardFunction,
    as_rewards,
)
from stateset_lightning.training.reward_checks import check_environment, check_rewards
from stateset_lightning.types import Scenario


def scenarios(*rows):
    return [Scenario(**{"id": f"s{n}", "prompt": "p", **row}) for n, row in enumerate(rows)]


def verl(solution_str, ground_truth):
    return 1.0


def trl(completions, solution, **kwargs):
    return [1.0]


class Own(RewardFunction):
    needs = ("level",)

    def compute_reward(self, turns, context=None):
        return context["level"]


def judge():
    return ModelJudge("m", "Like {reference}?", base_url="http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("reward", "row", "message"),
    [
        (ExactMatch, {"answer": "4"}, "reward 'exact_match' needs the column target, .*data.fields.target='answer'"),
        (NumericAnswer, {"solution": "4"}, "'numeric_answer' needs .*data.fields.target='solution'"),
        (MathEquivalence, {"Ground_Truth": "4"}, "'math_equivalence' needs .*data.fields.target='Ground_Truth'"),
        (Contains, {" target": "4", "answer": "4"}, "'contains' needs .*data.fields.target=' target'"),
        (lambda: EmbeddingSimilarity("a/b"), {"label": "4"}, "needs the column target, .*data.fields.target='label'"),
        (ExactMatch, {"x": 1}, "there are 'prompt', 'x': name one by data.fields.target, or leave the reward"),
        (lambda: verl, {"gold": "4"}, "reward 'verl' needs the column target, .*data.fields.target='gold'"),
        (lambda: trl, {"gold": "4"}, "'trl' needs the column target, .*data.fields.target='gold'"),
        (Own, {"levels": 1}, "reward 'own' needs the column level, .*data.fields.level='levels'"),
        (
            judge,
            {"target": "4"},
            "reward 'model_judge' needs the column reference, .*: name one by data.fields.reference, let it",
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_column_that_no_row_has_is_named_with_those_that_there_are(reward, row, message, split, tmp_path):
    rows = [{"prompt": "p", **row}] * 4
    if "target" not in row:  # else a column of a usual name is the target
        rows = [{"rows": rows, "fields": {"target": None}}]
    fine = [{"prompt": "p", "target": "4", "solution": "4", "level": 1, "reference": "4"}] * 4
    data = make_data(**{"train": fine, "validation": fine, split: rows})
    module = make_module(reward=[reward(), DigitReward()])
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, module, data, limit_val_batches=1)
    assert module.policy is None  # before the model is loaded


def checks_maths(text, target):
    import math_verify

    return math_verify.verify(math_verify.parse(target), math_verify.parse(text))


class Maths:
    def reset(self, scenario, seed):
        self.target = scenario["target"]

    def step(self, text):
        return None, float(checks_maths(text, self.target)), True


@pytest.mark.parametrize(("factory", "warns"), [(Maths, True), (ScriptedUser, False)])
def test_an_environment_that_sets_alarms_is_told_how_to_do_without(factory, warns):
    environment = EnvironmentConfig(factory)
    with pytest.warns(UserWarning, match=r"may use math_verify, .*parsing_timeout=None") if warns else nullcontext():
        check_environment(environment, [], GRPO())


def test_validate_is_refused_and_predict_is_not(tmp_path):
    rows = [{"rows": [{"prompt": "p", "answer": "4"}] * 2, "fields": {"target": None}}]
    module = make_module(reward=ExactMatch())
    with pytest.raises(ConfigError, match=r"data\.fields\.target='answer'"):
        make_trainer(tmp_path, limit_val_batches=1).validate(module, datamodule=make_data(train=None, validation=rows))
    (batch,) = make_trainer(tmp_path).predict(module, datamodule=make_data(train=None, validation=None, predict=rows))
    assert [row["reward"] for row in batch] == [None, None]


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (ExactMatch(), "2 of 3 rows of data.train lack target: there reward exact_match fails"),
        (verl, "2 of 3 rows of data.train lack target: there reward verl fails"),
        (Contains(["a"]), None),
        (DigitReward(), None),
    ],
)
def test_what_some_rows_lack_is_announced_with_their_number(reward, told, recwarn):
    check_rewards({"train": scenarios({"target": "4"}, {}, {"target": None})}, as_rewards(reward))
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == (told is not None)
    assert all(message.startswith(told) for message in messages)


def test_verls_functions_run_on_data_without_its_columns_and_that_is_announced():
    def compute_score(data_source, solution_str, ground_truth, extra_info):
        return 1.0

    with pytest.warns(UserWarning, match="lack data_source: there reward compute_score gets None"):
        check_rewards({"train": scenarios({"target": "4"})}, as_rewards(compute_score))


def test_only_rows_that_a_reward_scores_count():
    rewards = [ExactMatch(), DigitReward()]
    with_target, without = {"target": "4", "rewards": ["exact_match"]}, {"rewards": ["digit"]}
    check_rewards({"train": scenarios(with_target, without)}, rewards)
    with pytest.raises(ConfigError, match="reward 'exact_match' needs the column target"):
        check_rewards({"train": scenarios({"rewards": ["exact_match"]}, {**without, "target": "4"})}, rewards)


def test_a_reward_name_that_nobody_has_is_refused_with_its_place():
    rows = scenarios({"id": "a", "rewards": ["digit"]}, {"id": "b", "rewards": ["digitt"]})
    with pytest.raises(ConfigError, match=r"1 scenarios name rewards .*\(digit\): data.train: b: digitt"):
        check_rewards({"train": rows}, [DigitReward()])
