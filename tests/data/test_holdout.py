"""Holding out part of the training scenarios."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_lightning.data.holdout import hold_out
from stateset_lightning.data.sources import read_split
from stateset_lightning.errors import DataError


def scenarios(prompts):
    return read_split([{"prompt": prompt} for prompt in prompts], "train")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 5))
def test_both_sides_have_rows_and_no_question_is_on_both(prompts, fraction, seed):
    if len(set(prompts)) < 2:
        return
    train, validation = hold_out(scenarios(prompts), fraction, seed)
    assert len(train) > 0
    assert len(validation) > 0
    assert sorted(s.id for part in (train, validation) for s in part.scenarios) == sorted(
        s.id for s in scenarios(prompts).scenarios
    )
    assert not {s.prompt for s in train.scenarios} & {s.prompt for s in validation.scenarios}


def test_the_fraction_is_exact_and_the_seed_decides():
    rows = scenarios([str(i) for i in range(30)])
    train, validation = hold_out(rows, 0.1, seed=1)
    assert (len(train), len(validation)) == (27, 3)
    assert hold_out(rows, 0.1, seed=1)[1].scenarios == validation.scenarios
    assert hold_out(rows, 0.1, seed=2)[1].scenarios != validation.scenarios
    assert len(hold_out(rows, 0.001, seed=1)[1]) == 1


def test_the_same_question_as_prompt_or_message_under_another_instruction_stays_together():
    rows = read_split(
        [{"prompt": "a", "context": "x"}, {"messages": [{"role": "user", "content": "a"}]}, {"prompt": "b"}], "train"
    )
    for seed in range(5):
        sides = [{s.id for s in part.scenarios} for part in hold_out(rows, 0.3, seed)]
        assert {"train:3"} in sides


def test_one_question_cannot_be_split():
    with pytest.raises(DataError, match=r"all of data.train asks one question"):
        hold_out(scenarios(["a", "a"]), 0.5, 0)
