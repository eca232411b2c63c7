"""Rows of completions for files: what is written, and what stands for a failure."""

import json
import math

import torch

from stateset_lightning.records import make_records
from stateset_lightning.types import NOT_APPLICABLE, FinishReason, PromptBatch, RewardFailure, Rollout, Scenario, Scores


def make(values, totals, failures=(), advantages=None):
    batch = PromptBatch.__new__(PromptBatch)
    object.__setattr__(batch, "scenarios", [Scenario(id="a", prompt="one?", topic="t"), Scenario(id="b", prompt="two?")])
    rollout = Rollout(
        prompt_tokens=[[1], [2]],
        completion_tokens_T=torch.tensor([1, 2, 3, 4, 5]),
        lengths_N=torch.tensor([1, 2, 1, 1]),
        logprobs_T=torch.zeros(5),
        finish_reasons=[FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP, FinishReason.STOP],
        texts=["A", "B", "C", "D"],
    )
    names = tuple(f"r{i}" for i in range(len(values[0])))
    scores = Scores(
        names, torch.tensor(values, dtype=torch.float64), torch.tensor(totals, dtype=torch.float64), [{}] * 4, list(failures), 0.0
    )
    return make_records(batch, rollout, scores, advantages)


def test_completions_belong_to_their_prompts():
    records = make([[1.0], [0.0], [1.0], [0.5]], [1.0, 0.0, 1.0, 0.5], advantages=[0.7, -0.7, 0.1, -0.1])
    assert [(r.id, r.prompt, r.completion) for r in records] == [
        ("a", "one?", "A"),
        ("a", "one?", "B"),
        ("b", "two?", "C"),
        ("b", "two?", "D"),
    ]
    assert [r.num_tokens for r in records] == [1, 2, 1, 1]
    assert [r.advantage for r in records] == [0.7, -0.7, 0.1, -0.1]
    row = records[1].to_dict()
    assert row["finish_reason"] == "length"
    assert row["rewards"] == {"r0": 0.0}
    assert row["topic"] == "t"
    assert "topic" not in records[2].to_dict()


def test_a_failure_is_null_and_says_why():
    failure = RewardFailure(1, "r1", "KeyError", "'x'", "")
    records = make([[1.0, 1.0], [1.0, math.nan], [1.0, NOT_APPLICABLE], [0.0, 0.0]], [2.0, math.nan, 1.0, 0.0], [failure])
    failed = json.loads(json.dumps(records[1].to_dict(), allow_nan=False))
    assert failed["reward"] is None
    assert failed["rewards"] == {"r0": 1.0, "r1": None}
    assert failed["errors"] == ["r1: KeyError: 'x'"]
    assert records[2].rewards["r1"] is None  # does not apply
    assert records[2].reward == 1.0
    assert records[2].errors is None
    assert "advantage" not in failed
