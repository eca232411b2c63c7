"""Rows of completions for files: what is written, and what stands for a failure."""

import json
import math

import pytest
import torch

from stateset_lightning import records
from stateset_lightning.episode import Episode
from stateset_lightning.policy import Policy, PolicyConfig
from stateset_lightning.records import logprobs_now, make_records, token_rows, token_texts
from stateset_lightning.types import NOT_APPLICABLE, FinishReason, PromptBatch, RewardFailure, Rollout, Scenario, Scores


def make(values, totals, failures=(), advantages=None):
    batch = PromptBatch.__new__(PromptBatch)
    object.__setattr__(
        batch, "scenarios", [Scenario(id="a", prompt="one?", topic="t"), Scenario(id="b", prompt="two?")]
    )
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
        names,
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(totals, dtype=torch.float64),
        [{}] * 4,
        list(failures),
        0.0,
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
    records = make(
        [[1.0, 1.0], [1.0, math.nan], [1.0, NOT_APPLICABLE], [0.0, 0.0]], [2.0, math.nan, 1.0, 0.0], [failure]
    )
    failed = json.loads(json.dumps(records[1].to_dict(), allow_nan=False))
    assert failed["reward"] is None
    assert failed["rewards"] == {"r0": 1.0, "r1": None}
    assert failed["errors"] == ["r1: KeyError: 'x'"]
    assert records[2].rewards["r1"] is None  # does not apply
    assert records[2].reward == 1.0
    assert records[2].errors is None
    assert "advantage" not in failed


def test_tokens_join_to_the_text_and_a_character_is_not_torn(tiny_tokenizer):
    text = "12 é 🦊, what?"
    tokens = tiny_tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tiny_tokenizer, tokens)
    assert "".join(texts) == text
    assert len(texts) == len(tokens)
    assert [piece for piece in texts if "🦊" in piece] == [piece for piece in texts if piece.strip() == "🦊"]
    assert "" in texts  # the first bytes of the fox
    half = token_texts(tiny_tokenizer, tokens[: texts.index("🦊")])  # a completion cut inside a character
    assert half[-1].endswith("\ufffd")


class Pieces:
    """As SentencePiece does it: a text loses its leading space."""

    def decode(self, tokens, **options):
        return "".join([" the", " cat", "s"][token] for token in tokens).removeprefix(" ")


def test_leading_spaces_are_kept():
    assert token_texts(Pieces(), [0, 1, 2, 1]) == ["the", " cat", "s", " cat"]


def make_fixed_episode():
    return Episode(
        index=0, prompt_tokens=[[3, 4], [5]], completion_tokens_T=torch.tensor([40, 41, 42, 43, 44]), lengths_N=torch.tensor([2, 0, 1, 2]),
        sampling_logprobs_T=torch.tensor([-0.12345, -1.0, -2.0, -3.0, -4.0]), advantages_N=torch.zeros(4), weights_N=torch.ones(4),
        active_N=torch.tensor([True, False, False, True]), micro_step_N=torch.zeros(4), active_by_step=[2],
        ref_logprobs_T=torch.tensor([-0.5, -0.6, 0.0, -0.7, -0.8]),
    )  # fmt: skip


def test_token_rows_hold_what_is_known(tiny_tokenizer):
    rows = token_rows(make_fixed_episode(), 2, tiny_tokenizer, max_tokens=9)
    assert [row["logprobs"] for row in rows] == [[-0.1235, -1.0], [], [-2.0], [-3.0, -4.0]]
    # The reference scored active completions alone: what stands for the others is no log-prob.
    assert [row.get("ref_logprobs") for row in rows] == [[-0.5, -0.6], None, None, [-0.7, -0.8]]
    assert len(token_rows(make_fixed_episode(), 1, tiny_tokenizer, 9)) == 2


def test_log_probs_now_are_those_of_a_plain_forward(tiny_model):
    policy = Policy(tiny_model, PolicyConfig("tiny"))
    now = logprobs_now(make_fixed_episode(), 2, policy, temperature=2.0, max_tokens=9)
    assert [len(row) for row in now] == [2, 0, 1, 2]
    logits = tiny_model(input_ids=torch.tensor([[5, 43, 44]])).logits[0] / 2.0
    assert now[3] == pytest.approx(
        [float(logits.log_softmax(-1)[i, token]) for i, token in enumerate((43, 44))], abs=2e-4
    )
    assert logprobs_now(make_fixed_episode(), 2, policy, 2.0, max_tokens=1)[3] == now[3][:1]


def test_sharded_weights_are_not_asked(tiny_model, monkeypatch):
    monkeypatch.setattr(records, "DTensor", torch.nn.Parameter)  # as if all were
    assert logprobs_now(make_fixed_episode(), 2, Policy(tiny_model, PolicyConfig("tiny")), 1.0, max_tokens=9) is None
