"""The fast path against the slow one over a whole run, and the work that it does, counted exactly: times are noisy,
counts are not.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from module_runs import GradientRecorder, fit, make_data, make_module, relative_difference, weights

from stateset_lightning import PolicyConfig, RolloutConfig
from stateset_lightning.algorithm import GRPO
from stateset_lightning.errors import tell_once
from stateset_lightning.policy import Group, Policy, head as head_file
from stateset_lightning.rollout import InProcessEngine, running_batch


class Curve(Callback):
    """What every optimizer step logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def run(
    folder: Path, scoring: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    # The fast path reads a prompt once for its group while sampling, too; the slow one has a copy for every row.
    monkeypatch.setattr(running_batch, "SHARE_FROM", 0 if scoring == "packed" else 10**9)
    curve = Curve()
    module = make_module(algorithm=GRPO(beta=0.05))
    module.policy_config = PolicyConfig("tiny", scoring=scoring)
    trainer = fit(folder, module, make_data(num_iterations=2), max_steps=12, callbacks=[curve])
    return curve.rows, weights(trainer)


def test_training_curves_with_and_without_the_fast_path_coincide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, fast_weights = run(tmp_path / "fast", "packed", monkeypatch)
    slow, slow_weights = run(tmp_path / "slow", "padded", monkeypatch)
    assert len(fast) == len(slow) == 12
    names = ("train/reward", "completion/mean_tokens", "policy/loss", "policy/kl", "policy/entropy", "policy/grad_norm")
    for mine, other in zip(fast, slow, strict=True):
        for name in names:
            # The loss is a small difference of large sums: in absolute terms.
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    assert fast[-1]["work/token_ratio"] > 2
    assert slow[-1]["work/token_ratio"] == 1
    assert fast[0]["policy/grad_norm"] > 0
    # twelve steps of AdamW, which divides by small gradients
    assert relative_difference(fast_weights, slow_weights) < 1e-4


@pytest.mark.parametrize("budget", [60, 1])
def test_a_token_budget_changes_the_micro_steps_and_not_the_gradient(
    tmp_path: Path, budget: int, caplog: pytest.LogCaptureFixture
) -> None:
    def gradient(max_tokens: int | None, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        recorder, curve = GradientRecorder(), Curve()
        fit(tmp_path, make_module(max_tokens_per_step=max_tokens), callbacks=[recorder, curve], max_steps=1, **options)
        return recorder.steps[0], curve.rows[-1]

    whole, metrics = gradient(None)
    assert "work/over_budget_tokens" not in metrics
    data = {"data": make_data(steps_per_episode=4), "accumulate_grad_batches": 4}
    tell_once.cache_clear()
    split, metrics = gradient(budget, **data)
    is_told = "micro-steps have more than model.max_tokens_per_step=1 tokens" in caplog.text
    assert (metrics["work/over_budget_tokens"] > 0) == is_told == (budget == 1)
    assert relative_difference(split, whole) < 1e-6


# Work, counted
# ----------------------------------------------------------------------------------------------------------------------


def forwarded_tokens(model: Any) -> list[int]:
    """Tokens of each forward from now on."""
    counts: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return counts


def test_the_work_of_a_step_is_what_it_has_to_be(
    make_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("qwen2")
    model.generation_config.eos_token_id = 10**6  # unreachable: every completion is full
    policy = Policy(model, PolicyConfig("random", head_chunk_tokens=16))
    engine = InProcessEngine(tiny_tokenizer)
    engine.sync(policy)
    prompts, group, length = [[5] * 30, [6] * 50], 4, 10
    tokens = forwarded_tokens(model)
    engine.generate(prompts, group, RolloutConfig(max_new_tokens=1), range(8))  # probes what it may do
    tokens.clear()
    rollout = engine.generate(prompts, group, RolloutConfig(max_new_tokens=length), range(8))
    # Two prompts in one prefill (padded to the longer one), then a token per row; the last one is sampled and not
    # forwarded.
    assert tokens == [2 * 50, *[8] * (length - 1)]
    assert engine.decoded_rows == 8 * length
    prefix = running_batch.SharingBatch(model, length)
    prefix.admit(prompts, [0] * 4 + [1] * 4)
    prefix.step(torch.zeros(8, dtype=torch.long))
    heads = model.config.num_key_value_heads
    for buffer in prefix.cache.layers[0].buffers:
        assert buffer.shape[:3] == (8, heads, length)  # nothing of the prompts
    assert prefix.prompts.keys[0].shape[:3] == (2, heads, 50)

    logits = []
    computed = head_file._logits
    monkeypatch.setattr(head_file, "_logits", lambda *arguments: logits.append(computed(*arguments)) or logits[-1])
    tokens.clear()
    completions = rollout.completions()
    groups = [Group(prompt, completions[i * group :][:group]) for i, prompt in enumerate(prompts)]
    policy.score(groups)[0].sum().backward()
    assert tokens == [30 + 50 + 8 * length]  # each prompt once, each completion once, no padding
    # Forward and, again, backward: only completion tokens, 16 at a time.
    assert [len(chunk) for chunk in logits] == [16] * 5 + [16] * 5
    assert sum(chunk.numel() * 4 for chunk in logits) == 2 * 8 * length * model.config.vocab_size * 4


HEAD_MEMORY = """
import resource, sys, torch
from stateset_lightning.policy.head import HeadOptions, token_logprobs

torch.set_num_threads(2)
tokens, vocabulary, width = int(sys.argv[1]), 151_936, 896
weight = torch.full((vocabulary, width), 1e-3).requires_grad_()
hidden = torch.full((tokens, width), 1e-3).requires_grad_()
targets = torch.arange(tokens) % vocabulary
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
logprobs, entropies = token_logprobs(hidden, weight, None, targets, HeadOptions())
(logprobs.sum() + entropies.sum()).backward()
gradients = sum(p.grad.numel() * p.grad.element_size() for p in (weight, hidden)) / 2**20
print(peak() - before - gradients)
"""


@pytest.mark.slow  # 10 s: the vocabulary and width of a real model
def test_memory_of_scoring_does_not_grow_with_the_vocabulary_times_the_tokens() -> None:
    # All logits of 512 tokens would take 311 MB once, and the plain path holds them four times.
    command = [sys.executable, "-c", HEAD_MEMORY, "512"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 600
