"""Turns that go on from what is kept of the turns before are those that are sampled from whole prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from recurrent_models import RECURRENT, small_family
from windowed_models import FAMILIES, windowed_model

from stateset_lightning.policy import Policy, PolicyConfig
from stateset_lightning.rollout import InProcessEngine, RolloutConfig, running_batch
from stateset_lightning.rollout.cuda_decoding import GraphBatch
from stateset_lightning.rollout.decoding import KeptRows
from stateset_lightning.rollout.kept import Kept, stacked
from stateset_lightning.rollout.running_batch import RunningBatch
from stateset_lightning.types import FinishReason, Rollout

PROMPTS = [[20, 31, 42, 7, 9], [53, 64, 75, 86, 97, 108, 119], [130]]
MANY_ENDS = [1, *range(300, 360)]
SAMPLING = RolloutConfig(num_generations=4, max_new_tokens=12, stop=["7"], max_batch_rows=12)


@pytest.fixture
def make_engine(make_model: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., InProcessEngine]:
    def make_engine(name: str) -> InProcessEngine:
        if name in RECURRENT:
            model = small_family(name, RECURRENT[name])
        else:
            model = windowed_model(name, vocab_size=384) if name in FAMILIES else make_model(name)
        model.generation_config.eos_token_id = MANY_ENDS
        engine = InProcessEngine(tiny_tokenizer)
        engine.sync(Policy(model, PolicyConfig("random")))
        return engine

    return make_engine


def play(engine: InProcessEngine, sampling: RolloutConfig, keeps: bool, turns: int = 4) -> list[Rollout]:
    """Each completion gets a reply of its own length, 1 to 7 tokens; those that were cut off do not go on."""
    said = []
    with engine.keeping_caches() if keeps else nullcontext():
        prompts, size = PROMPTS, 4
        for turn in range(turns):
            seeds = [100 * turn + n for n in range(len(prompts) * size)]
            said.append(engine.generate(prompts, size, sampling, seeds))
            whole = [prompts[n // size] + tokens for n, tokens in enumerate(said[-1].completions())]
            ended = [reason is FinishReason.LENGTH for reason in said[-1].finish_reasons]
            prompts, size = [t + [40 + n] * (1 + n % 7) for n, t in enumerate(whole) if not ended[n]], 1
    return said


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of each call that computes some from their beginnings."""
    calls: list[int] = []
    for kind in (RunningBatch, running_batch.SharingBatch, GraphBatch):
        admit = kind.admit
        monkeypatch.setattr(
            kind,
            "admit",
            lambda batch, prompts, rows, admit=admit: calls.append(len(prompts)) or admit(batch, prompts, rows),
        )
    return calls


@pytest.mark.parametrize("looks_every", [1, 5])
@pytest.mark.parametrize(
    ("name", "share_from", "decoding"),
    [
        *[(name, share_from, "eager") for name in ("llama", "gemma2", "gpt2", "gpt_oss") for share_from in (0, 256)],
        ("qwen3", 256, "graph"),
    ],
)
def test_a_turn_is_that_of_the_whole_prompt(
    make_engine: Callable[..., InProcessEngine],
    monkeypatch: pytest.MonkeyPatch,
    prefilled: list[int],
    name: str,
    share_from: int,
    decoding: Any,
    looks_every: int,
) -> None:
    monkeypatch.setattr(running_batch, "SHARE_FROM", share_from)
    monkeypatch.setattr(running_batch, "tokens_between_looks", lambda device: looks_every)
    monkeypatch.setattr(running_batch, "TOGETHER", 256 // looks_every**3)  # or a token of each row at a time
    engine = make_engine(name)
    sampling = replace(SAMPLING, decoding=decoding)
    expected = play(engine, sampling, keeps=False)
    assert len(expected[-1].texts) >= 3  # some were cut off, and some are left
    assert len(expected[-1].texts) < 12
    prefilled.clear()
    got = play(engine, sampling, keeps=True)
    assert prefilled == [3]
    for ours, whole in zip(got, expected, strict=True):
        assert ours.completions() == whole.completions()
        assert (ours.finish_reasons, ours.texts) == (whole.finish_reasons, whole.texts)
        torch.testing.assert_close(ours.logprobs_T, whole.logprobs_T, atol=1e-5, rtol=0)


def test_rows_with_long_replies_do_not_have_others_computed_again(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shapes, forward = make_model("llama"), list[tuple[int, ...]](), RunningBatch._forward
    monkeypatch.setattr(
        RunningBatch,
        "_forward",
        lambda batch, ids, *rest, **more: shapes.append(tuple(ids.shape)) or forward(batch, ids, *rest, **more),
    )
    with torch.inference_mode():
        batch = RunningBatch(model, 4)
        batch.admit(PROMPTS, [0, 1, 2, 2])
        kept = [batch.kept(row, len(PROMPTS[p])).copied() for row, p in enumerate((0, 1, 2, 2))]
        rows = [PROMPTS[p] + [9 + p] * count for p, count in ((0, 1), (1, 2), (2, 10), (2, 30))]
        shapes.clear()
        batch = RunningBatch(model, 4)
        batch.resume(kept, rows)
        assert shapes == [(1, 20), (4, 10)]  # of 4 x 30
        for row, logits_V in zip(rows, batch.logits_BV, strict=True):
            whole = model(torch.tensor([row])).logits[0, -1]
            torch.testing.assert_close(logits_V, whole, atol=1e-5, rtol=0)


def test_nothing_is_kept_where_it_would_not_fit_nor_by_states_nor_afterwards(
    make_engine: Callable[..., InProcessEngine], prefilled: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    few = replace(SAMPLING, max_batch_rows=11)
    for name, sampling in (("llama", few), ("falcon_h1", SAMPLING)):
        engine = make_engine(name)
        expected = play(engine, sampling, keeps=False, turns=2)
        prefilled.clear()
        got = play(engine, sampling, keeps=True, turns=2)
        assert sum(prefilled) == 3 + len(expected[1].texts)
        assert got[1].completions() == expected[1].completions()
    assert "max_batch_rows=11 is less than the conversations at a time" in caplog.text
    engine = make_engine("llama")
    play(engine, SAMPLING, keeps=True, turns=1)
    with torch.no_grad():  # what was kept is of other weights now
        engine.policy.model.lm_head.weight.neg_()
    changed = play(engine, SAMPLING, keeps=True, turns=2)
    assert changed[1].completions() == play(engine, SAMPLING, keeps=False, turns=2)[1].completions()


def test_rows_are_found_by_their_tokens_the_longest_first() -> None:
    rows = {tokens: Kept([torch.full((1, len(tokens), 1), i)]) for i, tokens in enumerate([(1,), (1, 2), (3, 4)])}
    kept = KeptRows((RunningBatch, True), rows)
    found = kept.before([[1, 2, 5, 6], [3, 4, 5], [1, 3]])
    assert [int(row.columns[0].max()) for row in found] == [1, 2, 0]
    assert kept.before([[1, 2, 5], [3, 4]]) == []  # all in the call, or none; at least one token behind


def test_rows_of_different_lengths_are_stacked_at_either_side() -> None:
    def rows() -> list[Kept]:
        one, two = (Kept([torch.tensor([values])]) for values in ([1.0, 2.0], [3.0]))
        return [one, two, one]

    assert stacked(rows(), 0, 4).tolist() == [[[1, 2, 0, 0]], [[3, 0, 0, 0]], [[1, 2, 0, 0]]]
    kept = rows()
    assert stacked(kept, 0, 4, starts=[1, 2, 1]).tolist() == [[[0, 1, 2, 0]], [[0, 0, 3, 0]], [[0, 1, 2, 0]]]
    assert [row.columns[0].shape[1] for row in kept] == [0, 0, 0]  # they are in one place
