"""The example's loss, a class outside the package, does what its formula says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stateset_lightning.algorithm import Algorithm, TokenBatch


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "own_loss_example", Path(__file__).parents[2] / "examples" / "own_loss.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_loss_and_gradient_by_hand(example: ModuleType) -> None:
    # Ratios 2, 2 and 1/4. Positive: weight 1. Negative: min(2, 1/2) and min(1/4, 1/2).
    logprobs_T = (torch.tensor([2.0, 2.0, 0.25]).log() - 1).requires_grad_()
    tokens = TokenBatch(logprobs_T, torch.full((3,), -1.0), torch.tensor([3.0, -2.0]), torch.tensor([1, 2]))
    algorithm = example.TOPR(truncation=0.5)
    loss_T, _ = algorithm.per_token_loss(tokens)
    loss_T.sum().backward()
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.tolist() == pytest.approx([-3.0, 2 * 0.5, 2 * 0.25])
    assert loss_T.tolist() == pytest.approx((logprobs_T.detach() * logprobs_T.grad).tolist())


def test_it_has_everything_that_algorithms_share(example: ModuleType) -> None:
    algorithm = example.TOPR(beta=0.1, aggregation="token_mean", entropy_coefficient=0.01)
    assert isinstance(algorithm, Algorithm)
    assert algorithm.needs_reference
    assert algorithm.token_weights(torch.tensor([1, 3]), torch.tensor([0, 0])).tolist() == [0.25, 0.25]
