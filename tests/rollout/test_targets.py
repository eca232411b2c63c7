"""A target becomes the completion that a model would have to sample."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from stateset_lightning import RolloutConfig, ScenarioDataModule
from stateset_lightning.errors import DataError
from stateset_lightning.rollout.targets import Targets, target_text
from stateset_lightning.types import FinishReason, PromptBatch, Scenario, Turn

END = 1  # `<|end|>` of the bundled tokenizer, which also ends a turn of its template


def scenario(target: Any) -> Scenario:
    return Scenario(id="a", prompt="?", target=target)


def targets(tokenizer: Any, **options: Any) -> Targets:
    return Targets.of(tokenizer, RolloutConfig(**{"max_new_tokens": 16, **options}), None)


def batch(*rows: tuple[str, str]) -> PromptBatch:
    """Of targets and what their prompts have opened."""
    turns = [[Turn("user", "?"), *([Turn("assistant", opened)] if opened else [])] for _, opened in rows]
    return PromptBatch([[5, 6]] * len(rows), turns, [scenario(target) for target, _ in rows], [*range(len(rows))], 0)


def test_a_rollout_is_what_an_engine_would_have_returned(tiny_tokenizer: Any) -> None:
    heard: list[tuple[int, str, int]] = []
    rollout = targets(tiny_tokenizer).rollout(
        batch(("12", ""), ("<think> 7", "<think>")), lambda *told: heard.append(told)
    )
    completions = [[*tiny_tokenizer(text)["input_ids"], END] for text in ("12", " 7")]
    assert rollout.completions() == completions
    assert rollout.texts == ["12", " 7"]
    assert heard == [(0, "12", len(completions[0])), (1, " 7", len(completions[1]))]
    assert rollout.logprobs_T is None
    assert rollout.sampled_T.all()
    assert rollout.num_generations == 1
    assert set(rollout.finish_reasons) == {FinishReason.STOP}


def test_a_stop_string_cuts_the_text_that_rewards_see_and_no_token(tiny_tokenizer: Any) -> None:
    rollout = targets(tiny_tokenizer, stop=["#"]).rollout(batch(("1#2", "")), lambda *told: None)
    assert rollout.texts == ["1"]
    assert rollout.completions()[0][:-1] == tiny_tokenizer("1#2")["input_ids"]


def test_special_tokens_of_a_target_are_plain_text_unless_they_are_to_be_parsed(tiny_tokenizer: Any) -> None:
    plain, parsed = (Targets(tiny_tokenizer, RolloutConfig(), END, parse) for parse in (False, True))
    (ids,), (others,) = (each.encode([scenario("a<|end|>b")]) for each in (plain, parsed))
    assert ids.count(END) == 1
    assert others.count(END) == 2
    assert tiny_tokenizer.decode(ids[:-1]) == "a<|end|>b"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        *[("Paris", "Paris"), (["Paris", "paris"], "Paris"), (7, "7"), (0, "0"), (True, "true"), (1e-05, "0.00001")],
        *[(" a", " a"), (None, ""), ([], ""), ("", ""), (" \n", ""), ([""], "")],
    ],
)
def test_the_text_of_a_target(target: Any, text: str) -> None:
    assert target_text(scenario(target)) == text


@pytest.mark.parametrize(("use_chat_template", "end"), [(None, "<|end|>"), (True, "<|end|>"), (False, "<|pad|>")])
def test_a_target_ends_as_its_chat_template_ends_a_turn_else_as_a_text(
    tiny_tokenizer: Any, use_chat_template: bool | None, end: str
) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|pad|>"  # another than the template's
    data = ScenarioDataModule(train=[{"prompt": "?"}], use_chat_template=use_chat_template)
    assert Targets.of(tokenizer, RolloutConfig(), data).end == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "a", "target": "b"}, {"prompt": "c"}], r"1 scenarios \(rows:2\) have no target: name its col"),
        ([{"prompt": str(n), "note": "b"} for n in range(5)], r"5 scenarios \(rows:1, rows:2, rows:3\)"),
        ([{"prompt": "a", "target": "123456789"}], r"rows:1\) have .*max_new_tokens=4 tokens: set it to 10, or"),
    ],
    ids=["missing", "no column", "too long"],
)  # fmt: skip
def test_a_row_without_a_target_that_fits_is_refused_by_file_and_row(
    tiny_tokenizer: Any, tmp_path: Path, rows: Any, says: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ScenarioDataModule(train=str(file), tokenizer=tiny_tokenizer)
    data.setup("fit")
    with pytest.raises(DataError, match=says):
        targets(tiny_tokenizer, max_new_tokens=4).encode(data.served("train")[0].known)
