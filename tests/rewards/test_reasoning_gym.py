"""ReasoningGymReward against the library's own scoring."""

import inspect
import re

import pytest
import reasoning_gym
from module_runs import fit, make_data, make_module

from stateset_lightning.data import read_split
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import ExactMatch, ReasoningGymReward, Scorer, failure_counts
from stateset_lightning.rewards.reasoning_gym import RUNS_ANSWERS
from stateset_lightning.types import Turn


def conversation(scenario, completion):
    return [*scenario.turns(), Turn("assistant", completion)]


def scenarios(task, size=4, **options):
    return read_split([{"reasoning_gym": task, "size": size, "options": options}], "train").scenarios


def result(scenario, text, **options):
    return ReasoningGymReward(**options).compute_reward(conversation(scenario, text), scenario.columns())


@pytest.mark.parametrize(
    "task", ["chain_sum", "spell_backward", "leg_counting", "number_sequence", "propositional_logic", "letter_jumble"]
)
def test_scores_are_the_librarys(task):
    dataset = reasoning_gym.create_dataset(task, size=4, seed=0)
    for scenario, entry in zip(scenarios(task), dataset, strict=True):
        for answer in (entry["answer"] or "P", "banana", "", "0"):
            assert result(scenario, answer).score == pytest.approx(dataset.score_answer(answer, entry))
        if entry["answer"]:
            assert result(scenario, f" {entry['answer']}\n").score == 1.0


def test_tasks_without_a_single_answer_are_scored_from_their_metadata():
    scenario = scenarios("propositional_logic")[0]
    assert scenario.target is None
    assert result(scenario, scenario.model_extra["reasoning_gym"]["metadata"]["example_answer"]).score == 1.0


def test_the_answer_is_looked_for():
    scenario = scenarios("chain_sum")[0]
    pattern = "<answer>(.*?)</answer>"
    text = f"Let me see: <answer>1</answer>. No: <answer>{scenario.target}</answer>"
    assert result(scenario, text, answer_pattern=pattern).breakdown == {"answer": scenario.target}
    assert result(scenario, text, answer_pattern=pattern).score == 1.0
    assert result(scenario, str(scenario.target), answer_pattern=pattern).score == 0.0
    with pytest.raises(ConfigError, match="pattern='\\('"):
        ReasoningGymReward(answer_pattern="(")


def test_it_applies_to_its_own_rows_alone():
    other = read_split([{"prompt": "What is 1?", "target": "1"}], "train").scenarios[0]
    assert result(other, "1") is None


def test_tasks_that_run_answers_as_code_need_leave(tmp_path):
    scenario = scenarios("spiral_matrix")[0]
    mark = tmp_path / "mark"
    attack = f"[open({str(mark)!r}, 'w').write('x')]"
    with pytest.raises(ConfigError, match="spiral_matrix scores an answer by running it as Python"):
        result(scenario, attack)
    assert not mark.exists()
    result(scenario, attack, allow_code=True)
    assert mark.exists()  # the library does run it


def test_the_list_of_these_tasks_is_whole():
    runs = re.compile(r"\beval\(answer\)|parse_expr\(answer\b|sympify\(answer|\bexec\(answer")
    datasets = reasoning_gym.factory.DATASETS
    assert {
        name for name, (cls, _) in datasets.items() if runs.search(inspect.getsource(inspect.getmodule(cls)))
    } == RUNS_ANSWERS


@pytest.mark.slow  # a worker process imports the library, which takes seconds
def test_a_run_trains_on_tasks_and_other_rows(tmp_path):
    train = [
        {"reasoning_gym": "chain_sum", "size": 4, "options": {"max_terms": 2, "max_digits": 1}},
        {"rows": [{"prompt": "What is 1 + 1?", "target": "2"}] * 4, "rewards": ["exact_match"]},
    ]
    module = make_module(reward=[ReasoningGymReward(timeout=60), ExactMatch(weight=0.5)])
    fit(tmp_path, module, make_data(train=train, batch_size=8))
    assert not [name for name in module.metrics.last if name.startswith("reward_failures")]
    assert 0 <= module.metrics.last["reward/reasoning_gym"] <= 1


@pytest.mark.slow  # as above
def test_it_is_scored_in_a_worker():
    rows = scenarios("chain_sum")
    with Scorer(ReasoningGymReward(timeout=60)) as scorer:
        session = scorer.start(4)
        for n, scenario in enumerate(rows):
            session.submit(n, conversation(scenario, str(scenario.target) if n else "x"), scenario.columns())
        scores = session.collect()
    assert scores.totals_N.tolist() == pytest.approx([0.01, 1.0, 1.0, 1.0], abs=0.011)
    assert failure_counts(scores) == {}
