"""`turns: last | all`: which of the model's turns a reward takes for the answer, for every built-in reward."""

import pytest
from text_models import save_encoder

from stateset_lightning import rewards
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import EnvironmentReward, FunctionReward, GroupReward, RewardFunction, Scorer
from stateset_lightning.types import Turn

# A conversation of two answers, whose prompt has an assistant's turn of its own.
TURNS = [Turn("user", "2 + 1?"), Turn("assistant", "3"), Turn("user", "3 + 4?"), Turn("assistant", "It is 7")]
TURNS += [Turn("user", "Sure?"), Turn("assistant", "I am not sure")]
COLUMNS = {"id": "s1", "target": "7", "num_turns": 2}
IN_A_CONVERSATION = {**COLUMNS, "environments": lambda: ["the environment"]}


def score(reward, columns=IN_A_CONVERSATION):
    with Scorer(reward) as scorer, scorer.start(2, num_generations=2) as session:
        for n in range(2):
            session.submit(n, TURNS, columns, completion_tokens=9)
        return session.collect().values_NF[0, 0].item()


def built_in(name, folder):
    """A reward with the arguments that it must have."""
    if name in ("RewardModel", "EmbeddingSimilarity"):
        return {"model_name": str(save_encoder(folder))}
    return {
        "FormatReward": {"pattern": "I am.*"},
        "FunctionReward": {"function": lambda completion, target: 1.0},
        "LengthPenalty": {"max_length": 3},
        "ModelJudge": {"model": "m", "rubric": "Is it right?", "base_url": "http://127.0.0.1:9"},
        "OverlongPenalty": {"max_tokens": 20, "buffer": 10},
        "RegexMatch": {"pattern": "7"},
        "RelativeJudge": {"model": "m", "rubric": "Is it right?", "base_url": "http://127.0.0.1:9"},
        "RelativeLength": {"right_by": "other"},
        "TRLReward": {"function": lambda completions, **kwargs: [1.0]},
    }.get(name, {})


NAMES = [
    name
    for name in rewards.__all__
    if isinstance(kind := getattr(rewards, name), type)
    and issubclass(kind, RewardFunction)
    and kind not in (RewardFunction, rewards.BatchReward, GroupReward, EnvironmentReward)  # which reads no text
]


@pytest.mark.parametrize("name", NAMES)
def test_every_built_in_reward_sees_the_last_turn_or_all_of_them(name, tmp_path):
    seen = []

    def one(turns, context):
        seen.append((turns, context))
        return 1.0

    def several(conversations, contexts, scores=None):
        return [one(turns, contexts) for turns in conversations]

    for turns in ("last", "all"):
        seen.clear()
        reward = getattr(rewards, name)(turns=turns, **built_in(name, tmp_path))
        reward.reads, reward.timeout = (), None  # nothing runs in a process, to which no test's function can be sent
        reward.compute_reward, reward.compute_rewards = one, several
        if isinstance(reward, FunctionReward):
            reward.function = one
        assert score([reward, FunctionReward(lambda completion: 0.0, name="other")]) == 1
        for conversation, context in seen:
            expected = TURNS if turns == "last" else [*TURNS[:3], Turn("assistant", "It is 7\nI am not sure")]
            assert conversation == expected
            assert "environments" not in context


@pytest.mark.parametrize(
    ("reward", "last", "in_all"),
    [
        (lambda turns: rewards.NumericAnswer(turns=turns), 0.0, 1.0),
        (lambda turns: rewards.Contains(turns=turns), 0.0, 1.0),
        (lambda turns: rewards.LengthPenalty(3, per_unit=0.25, turns=turns), -0.25, -1.0),  # 4 words, or 7
        (lambda turns: rewards.FunctionReward(lambda completion: len(completion), turns=turns), 13, 21),
        (lambda turns: rewards.FunctionReward(lambda prompt, completion: prompt == "3 + 4?", turns=turns), 0.0, 1.0),
    ],
)
def test_scores_are_of_what_it_sees(reward, last, in_all):
    assert score(reward("last")) == last
    assert score(reward("all")) == in_all
    assert score(reward("all"), COLUMNS) == last  # a column of that name makes no conversation


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="turns"):
        rewards.Contains(turns="first")
