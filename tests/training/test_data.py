"""Single turns or conversations: what a run reads of its rows, what it announces, and what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from module_runs import fit, make_data, make_module, make_trainer, weights

from stateset_lightning import ScenarioDataModule
from stateset_lightning.environments import EnvironmentConfig, ScriptedUser
from stateset_lightning.errors import ConfigError

GUIDE = [
    {"id": "a", "context": "Answer.", "user_responses": ["What is 3 + 14?", "What is 5 + 9?", "And 1 + 1?"]},
    {"id": "b", "user_responses": ["What is 6 + 7?"]},
]


def data_of(rows: Any = GUIDE, **options: Any) -> ScenarioDataModule:
    return make_data(train=rows, validation=None, batch_size=2, **options)


def run(folder: Path, environment: Any, data: ScenarioDataModule | None = None, **options: Any) -> Any:
    return fit(folder, make_module(environment=environment), data or data_of(), max_steps=1, **options)


@pytest.mark.parametrize("environment", [{"max_turns": 3}, ScriptedUser], ids=["max_turns", "factory"])
def test_user_responses_are_one_conversation_where_the_run_has_some(
    environment: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = run(tmp_path, environment)
    by_id = {record["id"]: record for record in trainer.lightning_module.last_records}
    assert by_id.keys() == {"a", "b"}
    texts = [turn["content"] for turn in by_id["a"]["turns"] if turn["role"] == "user"]
    assert texts == GUIDE[0]["user_responses"][: len(texts)]
    assert len(texts) > 1
    assert by_id["b"]["num_turns"] == 1
    (told,) = (line for line in caplog.messages if line.startswith("conversations: "))
    assert told == f"conversations: model.environment.max_turns={trainer.lightning_module.environment.max_turns}"
    assert "said one after another, in a conversation (1 rows)" in caplog.text


@pytest.mark.parametrize("environment", [None, {"max_turns": 1}, EnvironmentConfig(max_turns=1)])
def test_a_single_turn_is_todays_bit_by_bit_and_says_what_would_make_conversations(
    environment: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    each = [
        {"id": f"{row['id']}/{i}", "context": row.get("context"), "prompt": prompt}
        for row in GUIDE
        for i, prompt in enumerate(row["user_responses"])
    ]
    trainer, other = run(tmp_path / "a", environment), fit(tmp_path / "b", data=data_of(each), max_steps=1)
    assert trainer.datamodule.num_scenarios == {"train": 4}
    a, b = weights(trainer), weights(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "single turns: no model.environment answers" in caplog.messages
    assert "is a prompt of its own (model.environment.max_turns above 1: a conversation) (1 rows)" in caplog.text


def test_an_environment_that_only_scores_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run(tmp_path, EnvironmentConfig(ScriptedUser, options={"responses": ["Sure?"]}, max_turns=1))
    assert "single turns: model.environment.max_turns=1" in caplog.messages


def test_one_data_module_serves_runs_of_both_kinds(tmp_path: Path) -> None:
    data, seen = data_of(), []
    for environment in (None, {"max_turns": 2}, {"max_turns": 2}, None):
        run(tmp_path, environment, data)
        seen.append(data.num_scenarios["train"])
    assert seen == [4, 2, 2, 4]


def test_replies_beside_a_prompt_are_said_too(tmp_path: Path) -> None:
    rows = [{"prompt": "What is 3 + 14?", "replies": ["What is 5 + 9?"]}] * 2
    module = run(tmp_path, {"max_turns": 2}, data_of(rows)).lightning_module
    assert {record["num_turns"] for record in module.last_records} <= {1, 2}
    assert module.metrics.last["conversation/turns"] > 1


@pytest.mark.parametrize("rows", [[{"prompt": "a"}, {"prompt": "b"}], [{"user_responses": ["a"]}]])
def test_no_scenario_that_would_answer_is_refused_before_a_model_is_loaded(rows: Any, tmp_path: Path) -> None:
    module = make_module(environment={"max_turns": 3})
    said = r"max_turns=3 has the scenarios' own texts answer .*: give rows user_responses of several texts, or replies"
    with pytest.raises(ConfigError, match=said):
        make_trainer(tmp_path).fit(module, datamodule=data_of(rows))
    assert module.policy is None
