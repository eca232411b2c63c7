"""What each of the Trainer's precisions means for weights and sampling."""

import pytest
import torch

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy.precision import sampling_dtype, weights_dtype


@pytest.mark.parametrize(
    ("dtype", "precision", "weights", "sampling"),
    [
        (None, "32-true", torch.float32, None),
        (None, "bf16-true", torch.bfloat16, None),
        (None, "16-true", torch.float16, None),
        (None, "64-true", torch.float64, None),
        (None, "bf16-mixed", torch.float32, torch.bfloat16),
        (None, "16-mixed", torch.float32, torch.float16),
        ("float32", "bf16-mixed", torch.float32, torch.bfloat16),
        ("bfloat16", "bf16-true", torch.bfloat16, None),
        ("bfloat16", "32-true", torch.bfloat16, None),
        ("float16", "32-true", torch.float16, None),
    ],
)
def test_weights_and_sampling(
    dtype: str | None, precision: str, weights: torch.dtype, sampling: torch.dtype | None
) -> None:
    assert weights_dtype(dtype, precision) == weights  # type: ignore[arg-type]
    assert sampling_dtype(precision) == sampling


@pytest.mark.parametrize(
    ("dtype", "precision", "needed"),
    [
        ("bfloat16", "bf16-mixed", "float32"),
        ("float32", "bf16-true", "bfloat16"),
        ("float16", "bf16-true", "bfloat16"),
        ("float32", "64-true", "float64"),
    ],
)
def test_a_contradiction_is_refused(dtype: str, precision: str, needed: str) -> None:
    with pytest.raises(
        ConfigError, match=f"dtype='{dtype}' contradicts trainer.precision='{precision}' .which needs {needed} weights"
    ):
        weights_dtype(dtype, precision)  # type: ignore[arg-type]


def test_an_unknown_precision_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError,
        match=r"'transformer-engine' is not supported: use one of 16-mixed, 16-true, 32-true, 64-true, bf16-mixed",
    ):
        weights_dtype(None, "transformer-engine")
