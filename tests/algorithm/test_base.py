"""The stock algorithm: its options, its metrics and its terms."""

import pytest
import torch

from stateset_lightning.algorithm import Algorithm, TokenBatch
from stateset_lightning.errors import ConfigError


def batch(ratios: list[float], advantages: list[float], lengths: list[int], reference: list[float] | None = None) -> TokenBatch:
    logprobs_T = torch.tensor(ratios).log() - 1
    return TokenBatch(
        logprobs_T,
        torch.full_like(logprobs_T, -1),
        torch.tensor(advantages),
        torch.tensor(lengths),
        ref_logprobs_T=None if reference is None else torch.tensor(reference),
    )


def test_the_upper_bound_defaults_to_the_lower() -> None:
    assert Algorithm(epsilon_low=0.1).epsilon_high == 0.1
    algorithm = Algorithm(epsilon_low=0.1, epsilon_high=0.5)
    assert (algorithm.epsilon_low, algorithm.epsilon_high) == (0.1, 0.5)
    loss_T, _ = algorithm.per_token_loss(batch([1.45, 1.6, 0.85], [1.0, -1.0], [2, 1]))
    assert loss_T.tolist() == pytest.approx([-1.45, -1.5, 0.9])


def test_advantages_are_per_completion_and_losses_per_token() -> None:
    loss_T, _ = Algorithm().per_token_loss(batch([1.0] * 5, [2.0, -1.0], [2, 3]))
    assert loss_T.tolist() == pytest.approx([-2.0, -2.0, 1.0, 1.0, 1.0])


def test_the_kl_term_is_added_with_its_coefficient_and_reported_without() -> None:
    # The policy's log-prob is -1; the reference's is log 2 more: k3 = 1 - log 2 = 0.30685.
    tokens = batch([1.0, 1.0], [2.0], [2], reference=[-1 + 0.6931472, -1.0])
    loss_T, metrics = Algorithm(beta=0.5).per_token_loss(tokens)
    assert loss_T.tolist() == pytest.approx([-2.0 + 0.5 * 0.3068528, -2.0], abs=1e-6)
    total, count = metrics["policy/kl"]
    assert float(total) == pytest.approx(0.3068528, abs=1e-6)
    assert count == 2


def test_without_a_coefficient_a_reference_is_neither_needed_nor_used() -> None:
    algorithm = Algorithm(beta=0.0)
    loss_T, metrics = algorithm.per_token_loss(batch([1.0], [2.0], [1], reference=[-5.0]))
    assert loss_T.tolist() == [-2.0]
    assert "policy/kl" not in metrics
    assert not algorithm.needs_reference
    assert not algorithm.trains_on_zero_advantage


def test_a_coefficient_needs_a_reference_and_trains_completions_without_advantage() -> None:
    algorithm = Algorithm(beta=0.1)
    assert algorithm.needs_reference
    assert algorithm.trains_on_zero_advantage
    with pytest.raises(ValueError, match=r"beta=0.1 needs the reference's log-probs"):
        algorithm.per_token_loss(batch([1.0], [2.0], [1]))


def test_a_constant_length_is_the_rollouts_unless_given() -> None:
    algorithm = Algorithm(aggregation="constant_length")
    algorithm.setup(64)
    algorithm.setup(64)
    assert algorithm.token_weights(torch.tensor([3, 5]), torch.tensor([0, 0])).tolist() == pytest.approx([1 / 128] * 2)
    own = Algorithm(aggregation="constant_length", constant_length=10)
    own.setup(64)
    assert own.token_weights(torch.tensor([3, 5]), torch.tensor([0, 0])).tolist() == pytest.approx([1 / 20] * 2)


def test_a_constant_length_without_its_aggregation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"constant_length=10 has no effect with aggregation='sequence_mean'"):
        Algorithm(constant_length=10)


def test_all_completions_train_unless_said_otherwise() -> None:
    lengths_N, groups_N = torch.tensor([2, 4]), torch.tensor([0, 0])
    assert Algorithm().token_weights(lengths_N, groups_N).tolist() == pytest.approx([1 / 4, 1 / 8])
    assert Algorithm().token_weights(lengths_N, groups_N, torch.tensor([False, True])).tolist() == pytest.approx([0, 1 / 4])


def test_the_loss_keeps_the_precision_of_its_log_probs() -> None:
    tokens = TokenBatch(torch.zeros(2), torch.zeros(2), torch.tensor([1.0], dtype=torch.float64), torch.tensor([2]))
    assert Algorithm().per_token_loss(tokens)[0].dtype == torch.float32


def test_an_algorithm_without_state_refuses_anothers() -> None:
    assert Algorithm().state_dict() == {}
    Algorithm().load_state_dict({})
    with pytest.raises(ValueError, match=r"Algorithm has no adaptive state, the checkpoint holds \['beta'\]"):
        Algorithm().load_state_dict({"beta": 0.1})
