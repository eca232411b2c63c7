"""What each of the Trainer's precisions means for weights and sampling."""

from typing import Any

import pytest
import torch

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy.precision import exact_products, product_dtype, sampling_dtype, weights_dtype


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


@pytest.mark.parametrize(("precision", "own"), [("bf16-mixed", "bfloat16"), ("16-mixed", "float16")])
def test_mixed_precision_takes_a_model_of_its_own_dtype_under_an_adapter(precision: str, own: Any) -> None:
    assert weights_dtype(own, precision, is_adapted=True) == getattr(torch, own)
    other = "float16" if own == "bfloat16" else "bfloat16"
    for dtype, is_adapted in ((own, False), (other, True)):
        with pytest.raises(ConfigError, match="contradicts"):
            weights_dtype(dtype, precision, is_adapted)  # type: ignore[arg-type]


def test_products_are_exact_where_they_must_be_and_otherwise_as_torch_is_set() -> None:
    assert product_dtype(torch.float32) == torch.float32
    try:
        torch.set_float32_matmul_precision("high")
        assert (product_dtype(torch.float32), product_dtype(torch.bfloat16)) == (torch.float16, torch.bfloat16)
        with exact_products():
            assert product_dtype(torch.float32) == torch.float32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


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
