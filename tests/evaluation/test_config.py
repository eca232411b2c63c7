"""What an evaluation's options accept, and what they make of a completion's text."""

import pytest

from stateset_lightning import RolloutConfig
from stateset_lightning.errors import ConfigError
from stateset_lightning.evaluation import EvaluationConfig


def test_ks_are_powers_of_two_and_the_number_of_samples() -> None:
    assert [EvaluationConfig(samples=n).ks for n in (0, 1, 2, 6, 8)] == [[], [1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_answer_is_the_whole_text_or_what_the_pattern_finds_last() -> None:
    assert EvaluationConfig().answer("  to \n be ") == "to be"
    marked = EvaluationConfig(answer_pattern=r"####\s*(\S+)")
    assert marked.answer("#### 3, no, #### 4 .") == "4"
    assert marked.answer("4") is None
    assert EvaluationConfig(answer_pattern=r"-?\d+").answer("3 + 4 = 7") == "7"
    assert EvaluationConfig(answer_pattern=r"x(\d)?").answer("x") == ""


def test_sampling_is_that_of_training_but_for_what_is_given() -> None:
    rollout = RolloutConfig(max_new_tokens=9, temperature=0.7, top_p=0.9)
    assert EvaluationConfig(samples=2).sampling(rollout) == rollout
    changed = EvaluationConfig(temperature=0.2, top_p=0.5).sampling(rollout)
    assert (changed.temperature, changed.top_p, changed.max_new_tokens) == (0.2, 0.5, 9)
    # Nothing is trained on these samples, and where all tokens may be sampled, there would be nothing to keep.
    replayed = EvaluationConfig(top_p=1.0).sampling(RolloutConfig(top_p=0.9, keep_sampling_mask=True))
    assert (replayed.top_p, replayed.keep_sampling_mask) == (1.0, False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": -1}, r"model\.evaluation\.samples=-1 must be at least 0"),
        ({"temperature": 0.0}, r"model\.evaluation\.temperature=0\.0 must be above 0"),
        ({"solved_at": float("nan")}, r"model\.evaluation\.solved_at=nan must be above -inf"),
        ({"answer_pattern": "("}, r"model\.evaluation\.answer_pattern='\(' is no regular expression"),
    ],
)
def test_bad_options_are_named(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EvaluationConfig(**options)


def test_solved_by_names_a_reward() -> None:
    EvaluationConfig(solved_by="right").check_rewards(["right", "tone"])
    with pytest.raises(ConfigError, match=r"solved_by='wrong' must be one of right, tone"):
        EvaluationConfig(solved_by="wrong").check_rewards(["right", "tone"])
