"""What a split's value may be, the source and id that its scenarios get, and validation held out of it."""

import math
from pathlib import Path

import jsonargparse
import pytest
from hypothesis import given, settings, strategies as st

from stateset_lightning.data.scenario_set import hold_out
from stateset_lightning.data.shapes import RowOptions
from stateset_lightning.data.sources import Source, read_split
from stateset_lightning.errors import DataError, UserError

REAL = Path(__file__).parents[2].parent / "shared/data"


def ids(spec, fields=None, split="train"):
    return [scenario.id for scenario in read_split(spec, split, fields).scenarios]


def test_a_file_a_path_object_and_a_glob_in_sorted_order(write):
    write("b.jsonl", '{"prompt": "b"}')
    path = write("a.csv", "prompt\nx\ny\n")
    assert ids(str(path)) == ids(path) == ["a:1", "a:2"]
    assert ids(str(path.parent / "*.*")) == ["a:1", "a:2", "b:1"]


def test_inline_rows_are_called_after_the_split():
    assert ids([{"prompt": "a"}, {"prompt": "b", "id": 12}, {"prompt": "c"}]) == ["train:1", "12", "train:3"]
    assert ids([{"prompt": "a"}], split="validation") == ["validation:1"]
    assert ids([{"prompt": "a", "path": "/a"}]) == ["train:1"]


def test_files_of_one_name_in_several_folders_get_ids_that_differ(write):
    write("x/part.jsonl", '{"prompt": "a"}')
    path = write("y/part.jsonl", '{"prompt": "b"}')
    folder = path.parents[1]
    assert ids(str(folder / "*/part.jsonl")) == [f"{folder}/x/part:1", f"{folder}/y/part:1"]


def test_sources_keep_their_names_weights_fields_and_rewards(write):
    path = write("a.csv", "question\nx\n")
    spec = [
        {"path": str(path), "weight": 2.0, "fields": {"prompt": "question"}, "rewards": ["exact"], "name": "maths"},
        Source(rows=[{"text": "y"}, {"text": "z"}], weight=1),
    ]
    found = read_split(spec, "train", RowOptions(fields={"prompt": "text"}))
    assert [(s.id, s.prompt, s.rewards) for s in found.scenarios] == [
        ("a:1", "x", ("exact",)),
        ("train.2:1", "y", None),
        ("train.2:2", "z", None),
    ]
    assert (found.names, found.weights, [rows.tolist() for rows in found.rows_by_source()]) == (
        ["maths", "data.train item 2"],
        [2.0, 1],
        [[0], [1, 2]],
    )
    assert [rows.tolist() for rows in found.select([2]).rows_by_source()] == [[], [2 - 2]]


def test_all_bad_rows_of_all_files_are_reported_together(write):
    first = write("a.jsonl", '{"prompt": "a", "id": "same"}\n{"prompt": 3}\n{\n')
    second = write("b.jsonl", '{"prompt": ""}\n{"prompt": "b", "id": "same"}\n')
    with pytest.raises(DataError) as error:
        read_split(str(first.parent / "*.jsonl"), "train")
    assert str(error.value).splitlines() == [
        "data.train: 4 rows cannot be used; correct or remove:",
        f"  {first}:2: the prompt must be text, not a number (3); put it in quotes",
        f"  {first}:3: malformed JSON at column 2: Expecting property name enclosed in double quotes",
        f"  {second}:1: the prompt is empty",
        f"  {second}:2: the id 'same' is already that of {first}:1; ids must differ within a split",
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "data.train is an empty list"),
        (7, "data.train must be a path, a hub id, or a list of rows or sources, not int"),
        ("no-such", "data.train=no-such: there is no such file, and it does not look like a hub id (owner/name)"),
        ("data/train.jsonl", "data.train=data/train.jsonl: there is no such file"),
        ("none/*.jsonl", "data.train=none/*.jsonl: no file matches"),
        (["text"], "data.train=text: there is no such file"),
        ([{"text": "a"}], "data.train: there is no column 'prompt'"),
        (
            [{"path": "a", "wieght": 2}],
            (
                "data.train item 1: a source has no key 'wieght'; its keys are fields, format, prompt_template,"
                " system_template, row, final_assistant_turn, path, rows, reasoning_gym, size, seed, options, weight,"
                " rewards, name"
            ),
        ),
        (
            [{"path": "a"}, {"prompt": "a"}],
            "data.train mixes sources and rows: put rows, such as item 2, into a source's 'rows'",
        ),
        ([Source()], "data.train item 1: a source needs one of path, rows, reasoning_gym, but has none"),
        (
            [{"path": "a", "rows": []}],
            "data.train item 1: a source needs one of path, rows, reasoning_gym, but has path and rows",
        ),
        ([{"rows": []}], "data.train has no rows"),
        ([{"rows": "abc"}], "data.train item 1: rows must be a list of scenarios, not str"),
        ([{"path": "a", "weight": -1}], "data.train item 1: weight=-1 must be a number above 0"),
        ([Source(path="a", weight=math.inf)], "data.train item 1: weight=inf must be a number above 0"),
        ([{"path": 7}], "data.train item 1: path=7 must be text"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "some sources have a weight and some have none"),
        ([{"path": "a", "rewards": "exact"}], "data.train item 1: rewards='exact' must be a list of reward names"),
        ([{"path": "a", "fields": "x"}], "data.fields='x' must map our names"),
    ],
)
def test_a_value_that_is_no_split_says_why(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read_split(spec, "train")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "fields", "rows"),
    [
        ("gsm8k_train.jsonl", {"prompt": "question", "target": "answer"}, 7473),
        ("banking77_train.csv", {"prompt": "text", "target": "category"}, 10003),
    ],
)
def test_real_files_are_read_wholly(name, fields, rows):
    if not (REAL / name).exists():
        pytest.skip(f"{REAL / name} is not here")
    found = read_split(REAL / name, "train", RowOptions(fields=fields))
    assert len(found) == rows
    assert found.scenarios[-1].id == f"{Path(name).stem}:{rows}"
    assert all(scenario.target for scenario in found.scenarios)


def test_the_command_line_refuses_a_weight_that_is_not_positive():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Source, "source")
    with pytest.raises(jsonargparse.ArgumentError, match="greater than"):
        parser.parse_args(["--source.weight=0"])


# Validation held out of the training scenarios ------------------------------------------------------------------------


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
    with pytest.raises(DataError, match=r"all rows ask one question"):
        hold_out(scenarios(["a", "a"]), 0.5, 0)
