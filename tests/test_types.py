"""What passes between rooms: turns as mappings, scenarios as conversations, rollouts as lists."""

import pytest
import torch
from pydantic import ValidationError

from stateset_lightning.types import FinishReason, PromptBatch, Rollout, Scenario, Turn


def test_a_turn_is_a_mapping_too() -> None:
    turn = Turn("user", "hello")
    assert (turn.role, turn["role"], turn.get("role")) == ("user",) * 3
    assert dict(turn) == {"role": "user", "content": "hello"}
    assert turn.get("name") is None
    assert turn.get("name", "nobody") == "nobody"
    with pytest.raises(KeyError, match="__class__"):
        turn["__class__"]


def test_a_scenario_has_exactly_one_question() -> None:
    assert Scenario(id="1", prompt="hi").turns() == [Turn("user", "hi")]
    with pytest.raises(ValidationError, match="not neither"):
        Scenario(id="1")
    with pytest.raises(ValidationError, match="not both"):
        Scenario(id="1", prompt="hi", messages=(Turn("user", "hi"),))
    with pytest.raises(ValidationError, match="at least 1 character"):
        Scenario(id="1", prompt="")
    with pytest.raises(ValidationError, match="at least 1 item"):
        Scenario(id="1", messages=())


def test_instructions_become_one_system_turn_in_order() -> None:
    scenario = Scenario(id="1", prompt="hi", context="be brief")
    assert scenario.turns() == [Turn("system", "be brief"), Turn("user", "hi")]
    assert scenario.turns("you are a clerk") == [Turn("system", "you are a clerk\n\nbe brief"), Turn("user", "hi")]
    with_system = Scenario(id="1", messages=(Turn("system", "own"), Turn("user", "hi")), context="be brief")
    assert with_system.turns("general") == [Turn("system", "general\n\nbe brief\n\nown"), Turn("user", "hi")]
    assert len(with_system.turns("general")) == len(with_system.turns("general"))  # the scenario itself does not change
    assert Scenario(id="1", messages=(Turn("system", "own"), Turn("user", "hi"))).turns() == [
        Turn("system", "own"),
        Turn("user", "hi"),
    ]


def test_messages_may_be_plain_mappings() -> None:
    scenario = Scenario.model_validate(
        {"id": "1", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    assert scenario.turns() == [Turn("user", "a"), Turn("assistant", "b")]
    with pytest.raises(ValidationError, match="role"):
        Scenario.model_validate({"id": "1", "messages": [{"role": "robot", "content": "a"}]})


def test_further_columns_are_kept_and_given_to_rewards() -> None:
    scenario = Scenario.model_validate({"id": "1", "prompt": "hi", "target": 7, "difficulty": "hard"})
    columns = scenario.columns()
    assert (columns["difficulty"], columns["target"], columns["prompt"], columns["topic"]) == ("hard", 7, "hi", None)
    with pytest.raises(ValidationError, match="frozen"):
        scenario.target = 8  # type: ignore[misc]


def test_a_rollout_splits_its_tokens() -> None:
    rollout = Rollout(
        [[1], [2]],
        torch.tensor([5, 6, 7, 8, 9]),
        torch.tensor([2, 0, 1, 2]),
        torch.zeros(5),
        torch.tensor([True, False, True, True, True]),
        [FinishReason.STOP] * 4,
        [""] * 4,
    )
    assert rollout.completions() == [[5, 6], [], [7], [8, 9]]
    assert rollout.sampled_lengths_N.tolist() == [1, 0, 1, 2]
    assert rollout.sampled_lengths_N.dtype == torch.int64
    assert rollout.num_generations == 2


def test_a_finish_reason_is_its_name() -> None:
    assert FinishReason.LENGTH == "length"
    assert f"{FinishReason.STOP}" == "stop"


def test_a_prompt_batch_counts_its_prompts() -> None:
    scenarios = [Scenario(id="1", prompt="a"), Scenario(id="2", prompt="b")]
    batch = PromptBatch([[1], [2]], [scenario.turns() for scenario in scenarios], scenarios, [4, 6], episode_index=3)
    assert len(batch) == 2
    assert batch.conversations == [[Turn("user", "a")], [Turn("user", "b")]]
    assert (batch.micro_step, batch.num_micro_steps, batch.steps_per_episode, batch.split) == (0, 1, 1, "train")
