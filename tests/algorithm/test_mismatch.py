"""Corrections for a sampler that differs from the trainer, by hand."""

import math
from typing import Any

import pytest
import torch

from stateset_lightning.algorithm.mismatch import Mismatch, mismatch_metrics, mismatch_weights

# The trainer's probability over the sampler's: two completions of 3 and 2 tokens.
RATIOS = torch.tensor([1.0, 4.0, 0.25, 1.5, 3.0], dtype=torch.float64)
LENGTHS = torch.tensor([3, 2])
SAMPLING = torch.full((5,), -2.0, dtype=torch.float64)


def weights(kind: Any, low: float | None = None, high: float | None = None) -> list[float]:
    return mismatch_weights(SAMPLING + RATIOS.log(), SAMPLING, LENGTHS, Mismatch(kind, low, high)).tolist()


def test_token_truncation() -> None:
    assert weights("token_tis") == pytest.approx([1.0, 2.0, 0.25, 1.5, 2.0])
    assert weights("token_tis", high=3.5) == pytest.approx([1.0, 3.5, 0.25, 1.5, 3.0])


def test_sequence_truncation() -> None:
    # The products are 1 and 4.5.
    assert weights("sequence_tis") == pytest.approx([1.0, 1.0, 1.0, 2.0, 2.0])
    assert weights("sequence_tis", high=5.0) == pytest.approx([1.0, 1.0, 1.0, 4.5, 4.5])


def test_icepop_drops_tokens_on_both_sides() -> None:
    assert weights("icepop") == pytest.approx([1.0, 4.0, 0.0, 1.5, 3.0])
    assert weights("icepop", low=0.2, high=2.0) == pytest.approx([1.0, 0.0, 0.25, 1.5, 0.0])


def test_the_sequence_mask_drops_completions_by_their_geometric_mean() -> None:
    # 1 and sqrt(4.5) = 2.12.
    assert weights("sequence_mask") == pytest.approx([1.0, 4.0, 0.25, 0.0, 0.0])
    assert weights("sequence_mask", low=1.5, high=2.2) == pytest.approx([0.0, 0.0, 0.0, 1.5, 3.0])


def test_equal_samplers_change_nothing() -> None:
    for kind in ("token_tis", "sequence_tis", "icepop", "sequence_mask"):
        assert mismatch_weights(SAMPLING, SAMPLING, LENGTHS, Mismatch(kind)).tolist() == [1.0] * 5  # type: ignore[arg-type]
    metrics = {
        name: float(total) / float(count) for name, (total, count) in mismatch_metrics(SAMPLING, SAMPLING).items()
    }
    assert metrics == {"mismatch/kl": 0.0, "mismatch/ess": 1.0}


def test_metrics_by_hand() -> None:
    # k3 of a ratio w is w - 1 - log w; the effective sample size is 1 / mean(w^2).
    metrics = mismatch_metrics(SAMPLING + RATIOS.log(), SAMPLING)
    kl = sum(w - 1 - math.log(w) for w in RATIOS.tolist())
    assert tuple(map(float, metrics["mismatch/kl"])) == pytest.approx((kl, 5))
    assert tuple(map(float, metrics["mismatch/ess"])) == pytest.approx((5, 1 + 16 + 1 / 16 + 2.25 + 9))


def test_weights_carry_no_gradient() -> None:
    old_T = (SAMPLING + RATIOS.log()).requires_grad_()
    assert not mismatch_weights(old_T, SAMPLING, LENGTHS, Mismatch("token_tis")).requires_grad


def test_on_average_untruncated_weights_turn_the_samplers_mean_into_the_trainers() -> None:
    sampler, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    values = torch.tensor([1.0, 5.0, -2.0])
    weights_T = mismatch_weights(
        trainer.log(), sampler.log(), torch.tensor([1, 1, 1]), Mismatch("token_tis", high=100.0)
    )
    torch.testing.assert_close((sampler * weights_T * values).sum(), (trainer * values).sum())
