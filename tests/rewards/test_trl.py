"""TRL's reward functions, unchanged: how they are told apart, what they are called with, what their answers mean."""

import functools
import itertools

import pytest
import torch

from stateset_lightning.errors import ConfigError, RewardError
from stateset_lightning.rewards import FunctionReward, RewardResult, Scorer, TRLReward, as_rewards
from stateset_lightning.rewards.functions import is_async
from stateset_lightning.types import Scenario, Turn

PLAIN = Scenario(id="a", prompt="2 + 2?", target="4", difficulty=3)
CHAT = Scenario(id="b", messages=({"role": "user", "content": "2 + 2?"},), context="Be brief.", target="4")


def conversation(scenario, completion):
    return [*scenario.turns(), Turn("assistant", completion)]


def call(function, scenario=PLAIN, completion="4", **options):
    reward = TRLReward(function, **options)
    return reward.compute_reward(conversation(scenario, completion), scenario.columns())


def matches(completions, target, **kwargs):
    return [float(c == t) for c, t in zip(completions, target, strict=True)]


async def judge(prompts, completions, **kwargs):
    return [0.25 for _ in completions]


def only_keywords(**kwargs):
    return [len(kwargs["completions"][0])]


class Scaled:
    def __call__(self, completions, **kwargs):
        return [0.5]


def test_functions_are_told_apart_by_their_parameters():
    def ours(turns, context):
        return 1.0

    def anything(*args, **kwargs):
        return 1.0

    trl = [matches, judge, only_keywords, functools.partial(matches, target=["4"]), Scaled()]
    assert [type(reward) for reward in as_rewards([*trl, ours, anything])] == [TRLReward] * 5 + [FunctionReward] * 2
    assert [is_async(reward) for reward in as_rewards(trl)] == [False, True, False, False, False]
    assert [reward.name for reward in as_rewards(trl)] == ["matches", "judge", "only_keywords", "matches_2", "scaled"]


def test_plain_scenarios_give_texts_and_columns_as_lists_of_one():
    seen = {}

    def record(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [1.0]

    call(record)
    assert {name: seen[name] for name in ("prompts", "completions", "target", "difficulty", "id")} == {
        "prompts": ["2 + 2?"],
        "completions": ["4"],
        "target": ["4"],
        "difficulty": [3],
        "id": ["a"],
    }
    assert not {"prompt", "messages", "turns", "trainer_state"} & set(seen)


def test_conversations_give_messages_with_the_system_turn():
    seen = {}

    def record(prompts, completions, **kwargs):
        seen.update(prompts=prompts, completions=completions)
        return [1.0]

    call(record, CHAT)
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}
    assert seen == {"prompts": [[system, user]], "completions": [[{"role": "assistant", "content": "4"}]]}
    call(record, CHAT, conversational=False)
    assert seen == {"prompts": ["2 + 2?"], "completions": ["4"]}
    call(record, PLAIN, conversational=True)
    assert seen == {"prompts": [[user]], "completions": [[{"role": "assistant", "content": "4"}]]}


def test_a_function_without_kwargs_gets_the_columns_that_it_names():
    assert call(lambda completions, target: [completions == target]).score == 1.0
    assert call(lambda completions, extra=None: [extra]) is None


@pytest.mark.parametrize("answer", [[0.5], (0.5,), torch.tensor([0.5])])
def test_a_list_of_one_number_is_the_score(answer):
    assert float(call(lambda completions, **kwargs: answer).score) == 0.5


@pytest.mark.parametrize("answer", [0.5, [], [0.5, 0.5], None, "1", itertools.repeat(0.5)])
def test_any_other_answer_is_an_error_that_shows_it(answer):
    with pytest.raises(RewardError, match="must return a list of one number or None"):
        call(lambda completions, **kwargs: answer)


def test_an_absent_column_is_named_with_those_that_there_are():
    def grade(completions, proof, **kwargs):
        return [1.0]

    with pytest.raises(
        RewardError, match=r"'grade' asks for the column proof.* it has: .*difficulty.*target.*; data\.fields maps"
    ):
        call(grade)


@pytest.mark.parametrize("missing", ["completion_ids", "trainer_state"])
def test_what_only_trl_has_is_refused_at_the_door(missing):
    namespace: dict = {}
    exec(f"def f(completions, {missing}=None, **kwargs): return [1.0]", namespace)
    with pytest.raises(ConfigError, match=f"reward 'f' takes {missing}, which is not here: .*Remove the parameter"):
        as_rewards(namespace["f"])


def test_what_it_logs_is_the_breakdown():
    def logs(completions, log_extra, log_metric, **kwargs):
        log_extra("answer", [completions[0].upper()])
        log_metric("length", 1.0)
        return [0.5]

    result = call(logs, completion="a")
    assert (result.score, result.breakdown) == (0.5, {"answer": "A", "length": 1.0})


def test_the_scorer_runs_them_beside_ours():
    def only_fours(completions, target, **kwargs):
        return [None if t != "4" else 1.0 for t in target]

    def ours(turns, context):
        return 2.0

    other = PLAIN.model_copy(update={"target": "5"})
    with Scorer([only_fours, judge, ours]) as scorer, scorer.start(2) as session:
        for n, scenario in enumerate([PLAIN, other]):
            session.submit(n, conversation(scenario, "4"), scenario.columns(), completion_tokens=1)
        scores = session.collect()
    assert scores.values_NF.tolist() == [[1.0, 0.25, 2.0], [float("-inf"), 0.25, 2.0]]
    assert scores.totals_N.tolist() == [3.25, 2.25]


def test_trls_own_functions_run():
    rewards = pytest.importorskip("trl.rewards")
    think = as_rewards(rewards.think_format_reward)[0]
    answer = conversation(CHAT, "<think>\n2 + 2\n</think>\n4")
    assert think.compute_reward(answer, CHAT.columns()).score == 1.0
    with pytest.raises(ConfigError, match="completion_ids"):
        as_rewards(rewards.get_soft_overlong_punishment(20, 4))


def test_the_completion_of_a_conversation_is_all_that_came_behind_the_prompt():
    """As TRL's trainer gives it (1.16): the model's answers, and the turns of tools between them."""
    seen = []

    def used_tool(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return [float(any(message["role"] == "tool" for message in messages)) for messages in completions]

    answers = [("assistant", "call"), ("tool", "4"), ("assistant", "It is 4.")]
    turns = [*CHAT.turns(), *(Turn(role, text) for role, text in answers)]
    columns = {**CHAT.columns(), "num_turns": 2, "turn_rewards": [None, 1.0]}
    assert TRLReward(used_tool).compute_reward(turns, columns).score == 1.0
    told = [{"role": role, "content": text} for role, text in answers]
    asked = [{"role": turn.role, "content": turn.content} for turn in CHAT.turns()]
    assert seen == [([asked], [told])]
    # A column of this name makes no conversation of a single turn.
    TRLReward(used_tool).compute_reward([*turns[:-2]], {**CHAT.columns(), "num_turns": 2})
    assert seen[1] == ([asked], [told[:1]])


@pytest.mark.parametrize(
    ("given", "score", "breakdown"),
    [((1.0, {"why": "x"}), 1.0, {"why": "x"}), (RewardResult(0.5, {"a": 1}), 0.5, {"a": 1}), ({"score": 2}, 2.0, {})],
)
def test_a_list_of_one_may_hold_whatever_a_reward_may_return(given, score, breakdown):
    result = call(lambda completions, **kwargs: [given])
    assert (result.score, result.breakdown) == (score, breakdown)


@pytest.mark.parametrize("given", [{0: 1.0}, {1.0}, {"score": 1.0}])
def test_a_mapping_or_set_is_no_list_of_scores(given):
    with pytest.raises(RewardError, match="must return a list of one number or None, but returned"):
        call(lambda completions, **kwargs: given)
