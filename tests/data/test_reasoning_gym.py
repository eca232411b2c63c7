"""Tasks of reasoning-gym as scenarios, against the library itself."""

import pytest
import reasoning_gym

from stateset_lightning.data import RowOptions, Source, read_split
from stateset_lightning.data.reasoning_gym import MAX_SIZE
from stateset_lightning.errors import ConfigError


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("chain_sum", {}),
        ("chain_sum", {"min_terms": 2, "max_terms": 2}),
        ("spell_backward", {}),
        ("propositional_logic", {}),
    ],
)
def test_rows_are_the_librarys(task, options):
    rows = read_split([{"reasoning_gym": task, "size": 5, "seed": 3, "options": options}], "train").scenarios
    theirs = list(reasoning_gym.create_dataset(task, size=5, seed=3 * MAX_SIZE, **options))
    assert [(row.prompt, row.target) for row in rows] == [(entry["question"], entry["answer"]) for entry in theirs]
    assert [row.model_extra["reasoning_gym"]["metadata"] for row in rows] == [entry["metadata"] for entry in theirs]
    assert {row.topic for row in rows} == {task}
    assert rows[0].id == f"{task}.3:1"


def test_two_seeds_have_no_question_in_common():
    def questions(seed):
        return {
            row.prompt
            for row in read_split([{"reasoning_gym": "chain_sum", "size": 50, "seed": seed}], "train").scenarios
        }

    assert questions(1) == questions(1)
    assert not questions(1) & questions(2)


def test_tasks_mix_with_other_sources_whatever_fields_say():
    rows = [{"question": "What is 1 + 1?", "target": "2"}]
    spec = [
        Source(rows=rows, weight=1.0),
        Source(reasoning_gym="spell_backward", size=3, weight=2.0, rewards=["reasoning_gym"]),
    ]
    read = read_split(spec, "train", RowOptions(fields={"prompt": "question"}))
    assert read.names == ["data.train item 1", "spell_backward"]
    assert read.source_of.tolist() == [0, 1, 1, 1]
    assert read.scenarios[1].rewards == ("reasoning_gym",)
    assert "reasoning_gym" not in (read.scenarios[0].model_extra or {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"reasoning_gym": "chain_sums", "size": 3},
            "reasoning_gym='chain_sums' is no task of the library; it has: ab, ",
        ),
        ({"reasoning_gym": "composite", "size": 3}, "is no task"),
        (
            {"reasoning_gym": "chain_sum", "size": 3, "options": {"terms": 2}},
            "does not take options={'terms': 2}: .*terms",
        ),
        (
            {"reasoning_gym": "chain_sum", "size": 3, "options": {"min_terms": 0}},
            "does not take options={'min_terms': 0}: ",
        ),
        ({"reasoning_gym": "chain_sum"}, "needs a size"),
        ({"reasoning_gym": "chain_sum", "size": "many"}, "needs a size"),
        ({"reasoning_gym": "chain_sum", "size": 0}, "size=0 must be at least 1"),
        ({"reasoning_gym": "chain_sum", "size": 3, "seed": 5000}, "seed=5000 must be at most 2000"),
        (
            {"reasoning_gym": "chain_sum", "size": 3, "path": "x"},
            "needs one of path, rows, reasoning_gym, but has path and reasoning_gym",
        ),
        ({"reasoning_gym": "chain_sum", "size": 3, "fields": {"prompt": "q"}}, "takes no fields"),
        ({"path": "x.jsonl", "size": 3}, "size, seed and options belong to a source of reasoning_gym"),
    ],
)
def test_bad_sources_are_refused(source, message):
    with pytest.raises(ConfigError, match=f"data.train item 1.*{message}"):
        read_split([source], "train")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r'pip install "stateset-lightning\[gym\]"'):
        read_split([{"reasoning_gym": "chain_sum", "size": 3}], "train")
