"""What algorithms share: options, terms, corrections; and how a preset or a class of one's own is made."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import pytest
import torch
from annotated_types import Gt, Lt
from jsonargparse import ArgumentParser
from torch import Tensor

from stateset_lightning.algorithm import (
    DPPO,
    GRPO,
    GSPO,
    KL,
    AdaptiveEntropy,
    Algorithm,
    Clipped,
    Mismatch,
    TokenBatch,
    fixed,
)
from stateset_lightning.errors import ConfigError
from stateset_lightning.types import Metrics


def batch(
    ratios: list[float], advantages: list[float], lengths: list[int], reference: list[float] | None = None
) -> TokenBatch:
    logprobs_T = torch.tensor(ratios).log() - 1
    return TokenBatch(
        logprobs_T,
        torch.full_like(logprobs_T, -1),
        torch.tensor(advantages),
        torch.tensor(lengths),
        ref_logprobs_T=None if reference is None else torch.tensor(reference),
    )


def test_the_upper_bound_defaults_to_the_lower() -> None:
    assert Clipped(epsilon_low=0.1).epsilon_high == 0.1
    algorithm = Clipped(epsilon_low=0.1, epsilon_high=0.5)
    assert (algorithm.epsilon_low, algorithm.epsilon_high) == (0.1, 0.5)
    loss_T, _ = algorithm.per_token_loss(batch([1.45, 1.6, 0.85], [1.0, -1.0], [2, 1]))
    assert loss_T.tolist() == pytest.approx([-1.45, -1.5, 0.9])


def test_advantages_are_per_completion_and_losses_per_token() -> None:
    loss_T, _ = Clipped().per_token_loss(batch([1.0] * 5, [2.0, -1.0], [2, 3]))
    assert loss_T.tolist() == pytest.approx([-2.0, -2.0, 1.0, 1.0, 1.0])


def test_the_kl_term_is_added_with_its_coefficient_and_reported_without() -> None:
    # The policy's log-prob is -1; the reference's is log 2 more: k3 = 1 - log 2 = 0.30685.
    tokens = batch([1.0, 1.0], [2.0], [2], reference=[-1 + 0.6931472, -1.0])
    loss_T, metrics = Clipped(beta=0.5).per_token_loss(tokens)
    assert loss_T.tolist() == pytest.approx([-2.0 + 0.5 * 0.3068528, -2.0], abs=1e-6)
    total, count = metrics["policy/kl"]
    assert float(total) == pytest.approx(0.3068528, abs=1e-6)
    assert count == 2


def test_without_a_coefficient_a_reference_is_neither_needed_nor_used() -> None:
    algorithm = Clipped(beta=0.0)
    loss_T, metrics = algorithm.per_token_loss(batch([1.0], [2.0], [1], reference=[-5.0]))
    assert loss_T.tolist() == [-2.0]
    assert "policy/kl" not in metrics
    assert not algorithm.needs_reference
    assert not algorithm.trains_on_zero_advantage


def test_a_coefficient_needs_a_reference_and_trains_completions_without_advantage() -> None:
    algorithm = Algorithm(beta=0.1)
    assert algorithm.needs_reference
    assert algorithm.trains_on_zero_advantage
    with pytest.raises(ValueError, match=r"algorithm\.beta=0\.1 needs TokenBatch\.ref_logprobs_T"):
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
    assert Algorithm().token_weights(lengths_N, groups_N, torch.tensor([False, True])).tolist() == pytest.approx(
        [0, 1 / 4]
    )


def test_the_loss_keeps_the_precision_of_its_log_probs() -> None:
    tokens = TokenBatch(torch.zeros(2), torch.zeros(2), torch.tensor([1.0], dtype=torch.float64), torch.tensor([2]))
    assert Algorithm().per_token_loss(tokens)[0].dtype == torch.float32


def test_the_plain_policy_gradient_by_hand() -> None:
    # -A log-prob, whose gradient is -A whatever the old log-prob.
    logprobs_T = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    tokens = TokenBatch(logprobs_T, torch.zeros(3), torch.tensor([2.0, -1.0]), torch.tensor([2, 1]))
    loss_T, _ = Algorithm().per_token_loss(tokens)
    loss_T.sum().backward()
    assert loss_T.tolist() == [2.0, 4.0, -3.0]
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.tolist() == [-2.0, -2.0, 1.0]


def test_tokens_may_have_advantages_of_their_own() -> None:
    # -A log-prob with A by token; those of the completions, 2 and -1, are not read.
    logprobs_T = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    own_T = torch.tensor([0.5, 0.0, 4.0], dtype=torch.float64)
    tokens = TokenBatch(logprobs_T, torch.zeros(3), torch.tensor([2.0, -1.0]), torch.tensor([2, 1]), advantages_T=own_T)
    assert Algorithm.advantages_per_token(tokens).tolist() == [0.5, 0.0, 4.0]
    assert Algorithm.advantages_per_token(tokens).dtype == torch.float32
    loss_T, _ = Algorithm().per_token_loss(tokens)
    loss_T.sum().backward()
    assert loss_T.tolist() == [0.5, 0.0, 12.0]
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.tolist() == [-0.5, 0.0, -4.0]


# Terms and corrections ------------------------------------------------------------------------------------------------


def test_kl_in_the_reward_leaves_the_loss_alone_and_is_reported() -> None:
    algorithm = Clipped(beta=0.5, kl=KL(estimator="k1", place="reward"))
    assert algorithm.kl_in_reward
    assert algorithm.needs_reference
    assert not algorithm.trains_on_zero_advantage
    loss_T, metrics = algorithm.per_token_loss(batch([1.0, 1.0], [2.0], [2], reference=[-1.5, -1.0]))
    assert loss_T.tolist() == [-2.0, -2.0]
    assert float(metrics["policy/kl"][0]) == pytest.approx(0.5)


def test_kl_scores_add_up_a_completions_estimates() -> None:
    # k1 is policy - reference: 0.5 + 0.25 for the first completion, -1 for the second.
    logprobs_T, ref_T = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True), torch.tensor([-1.5, -1.25, -2.0])
    scores_N = Algorithm(beta=1.0, kl=KL("k1", "reward")).kl_scores(logprobs_T, ref_T, torch.tensor([2, 1]))
    assert scores_N.tolist() == [0.75, -1.0]
    assert not scores_N.requires_grad


def test_an_adaptive_kl_coefficient_follows_its_target_and_is_kept() -> None:
    # 1909.08593: the relative error is cut at 20 %, and a tenth of it is applied.
    algorithm = Clipped(beta=0.1, kl=KL(target=0.5, horizon=10))
    for kl, factor in ((5.0, 1.02), (0.55, 1.01), (0.5, 1.0), (0.0, 0.98)):
        before = algorithm.kl_coefficient
        algorithm.adapt({"policy/kl": kl})
        assert algorithm.kl_coefficient == pytest.approx(before * factor)
    assert algorithm.beta == 0.1
    other = Clipped(beta=0.1, kl=KL(target=0.5))
    other.load_state_dict(algorithm.state_dict())
    assert other.kl_coefficient == algorithm.kl_coefficient
    tokens = batch([1.0], [0.0], [1], reference=[-1 + 0.6931472])
    assert other.per_token_loss(tokens)[0].item() == pytest.approx(other.kl_coefficient * 0.3068528)


def test_a_fixed_coefficient_does_not_move() -> None:
    algorithm = Clipped(beta=0.1, entropy_coefficient=0.2)
    algorithm.adapt({"policy/kl": 100.0, "policy/entropy": 0.0})
    assert (algorithm.kl_coefficient, algorithm.entropy_coefficient) == (0.1, 0.2)
    assert algorithm.state_dict() == {}


def with_entropies(entropies: list[float], lengths: list[int]) -> TokenBatch:
    count = len(entropies)
    entropies_T = torch.tensor(entropies, requires_grad=True)
    return TokenBatch(
        torch.zeros(count), torch.zeros(count), torch.ones(len(lengths)), torch.tensor(lengths), entropies_T=entropies_T
    )


def test_the_entropy_bonus_by_hand() -> None:
    tokens = with_entropies([2.0, 0.5], [2])
    loss_T, metrics = Clipped(entropy_coefficient=0.1).per_token_loss(tokens)
    loss_T.sum().backward()
    assert loss_T.tolist() == pytest.approx([-1.2, -1.05])
    assert tokens.entropies_T is not None
    assert tokens.entropies_T.grad is not None
    assert tokens.entropies_T.grad.tolist() == pytest.approx([-0.1, -0.1])
    assert float(metrics["policy/entropy"][0]) == 2.5
    assert Clipped(entropy_coefficient=0.1).trains_on_zero_advantage
    with pytest.raises(ValueError, match=r"entropy_coefficient needs TokenBatch\.entropies_T"):
        Clipped(entropy_coefficient=0.1).per_token_loss(batch([1.0], [1.0], [1]))


def test_an_adaptive_entropy_coefficient_acts_below_its_target_alone() -> None:
    algorithm = Clipped(
        entropy_coefficient=0.01, adaptive_entropy=AdaptiveEntropy(target=0.5, delta=0.005, maximum=0.02)
    )
    assert algorithm.trains_on_zero_advantage
    assert algorithm.entropy_bonus == 0.0  # nothing measured yet
    for entropy, coefficient, bonus in (
        (0.4, 0.015, 0.015),
        (0.4, 0.02, 0.02),
        (0.4, 0.02, 0.02),
        (0.5, 0.015, 0.015),
        (0.9, 0.01, 0.0),
    ):
        algorithm.adapt({"policy/entropy": entropy})
        assert algorithm.entropy_coefficient == pytest.approx(coefficient)
        assert algorithm.entropy_bonus == pytest.approx(bonus)
    for _ in range(4):
        algorithm.adapt({"policy/entropy": 0.9})
    assert algorithm.entropy_coefficient == 0.0
    algorithm.adapt({"policy/entropy": 0.4})
    other = Clipped(adaptive_entropy=AdaptiveEntropy(target=0.5))
    other.load_state_dict(algorithm.state_dict())
    assert (other.entropy_coefficient, other.entropy_bonus) == (0.005, 0.005)
    assert set(other.state_dict()) == set(Clipped(adaptive_entropy=AdaptiveEntropy()).state_dict())


def test_top_entropy_trains_the_chosen_tokens_alone_and_keeps_the_other_terms() -> None:
    tokens = batch([1.0, 1.0, 1.0, 1.0], [2.0], [4], reference=[-1 + 0.6931472] * 4)
    entropies_T = torch.tensor([0.1, 3.0, 2.0, 0.2])
    algorithm = Clipped(top_entropy=0.5, beta=0.5)
    assert algorithm.selects_tokens
    chosen_T = algorithm.select(replace(tokens, entropies_T=entropies_T), seed=0)
    assert chosen_T.tolist() == [False, True, True, False]
    loss_T, _ = algorithm.per_token_loss(replace(tokens, select_T=chosen_T))
    kl = 0.5 * 0.3068528
    assert loss_T.tolist() == pytest.approx([kl, -2 + kl, -2 + kl, kl], abs=1e-6)
    with pytest.raises(ValueError, match=r"top_entropy needs TokenBatch\.select_T"):
        algorithm.per_token_loss(tokens)


def test_the_off_policy_mask_drops_drifted_completions_with_a_negative_advantage() -> None:
    # Log-probs have fallen by log 2 = 0.69 in the first two completions, and not in the third; only the second is
    # negative.
    tokens = batch([0.5, 0.5, 0.5, 0.5, 1.0], [1.0, -1.0, -1.0], [2, 2, 1])
    loss_T, metrics = Algorithm(off_policy_threshold=0.6).per_token_loss(tokens)
    plain_T, _ = Algorithm().per_token_loss(tokens)
    assert loss_T.tolist() == [*plain_T[:2].tolist(), 0.0, 0.0, plain_T[4].item()]
    assert tuple(map(float, metrics["policy/off_policy"])) == (1.0, 3.0)
    assert torch.equal(Algorithm(off_policy_threshold=0.7).per_token_loss(tokens)[0], plain_T)
    # Where the sampler's log-probs are known, drift is from those.
    known = replace(tokens, sampling_logprobs_T=tokens.logprobs_T)
    assert torch.equal(Algorithm(off_policy_threshold=0.6).per_token_loss(known)[0], plain_T)


def test_a_mismatch_weighs_the_policy_loss_and_not_the_kl() -> None:
    # The trainer finds the first token e^0.5 as likely as the sampler did, the second e^1 (weight cut at 2).
    tokens = replace(
        batch([1.0, 1.0], [1.0], [2], reference=[-1 + 0.6931472, -1.0]), sampling_logprobs_T=torch.tensor([-1.5, -2.0])
    )
    plain_T, metrics = Clipped(beta=0.5).per_token_loss(tokens)
    assert plain_T.tolist() == pytest.approx([-1 + 0.1534264, -1.0], abs=1e-6)
    assert {"mismatch/kl", "mismatch/ess"} <= set(metrics)
    loss_T, metrics = Clipped(beta=0.5, mismatch=Mismatch("token_tis")).per_token_loss(tokens)
    assert loss_T.tolist() == pytest.approx([-(2.718281828**0.5) + 0.1534264, -2.0], abs=1e-6)
    assert tuple(map(float, metrics["mismatch/masked"])) == (0.0, 2.0)
    with pytest.raises(ValueError, match=r"mismatch needs TokenBatch\.sampling_logprobs_T"):
        Clipped(mismatch=Mismatch()).per_token_loss(batch([1.0], [1.0], [1]))


def test_the_likelihood_of_right_completions_is_raised_whatever_their_advantage() -> None:
    # The policy gradient of the first, and 0.5 x 1.5 and 0.5 x 2 on the tokens of the second and third.
    tokens = replace(batch([1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1, 1, 1]), right_N=torch.tensor([0.0, 1.5, 2.0]))
    algorithm = Algorithm(positive_coefficient=0.5)
    assert algorithm.trains_on_zero_advantage
    loss_T, _ = algorithm.per_token_loss(tokens)
    expected = -torch.tensor([1.0, 0.75, 1.0]) * tokens.logprobs_T
    assert loss_T.tolist() == pytest.approx(expected.tolist())
    with pytest.raises(ValueError, match=r"positive_coefficient needs TokenBatch\.right_N"):
        algorithm.per_token_loss(replace(tokens, right_N=None))


def test_advantages_are_held_within_their_clip() -> None:
    scores_PGF = torch.tensor([[[9.0], [0.0], [0.0], [float("nan")]]])
    advantages_PG = Algorithm(scale="none", advantage_clip=4.0).advantages(scores_PGF, torch.ones(1))
    assert advantages_PG[0, :3].tolist() == [4.0, -3.0, -3.0]
    assert advantages_PG[0, 3].isnan()


def test_the_adaptive_entropy_has_the_papers_numbers() -> None:
    assert AdaptiveEntropy() == AdaptiveEntropy(target=0.2, delta=1e-4, maximum=0.005)


# Bad options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KL("k1", "loss"), "gradient of zero in expectation"),
        (lambda: KL("k3_unbiased", "reward"), "a reward has none"),
        (lambda: KL(target=0.0), r"kl\.target=0.0 must be above 0"),
        (lambda: Clipped(kl=KL(target=0.1)), r"kl\.target=0\.1 has no effect with beta=0"),
        (lambda: Clipped(delta=1.1), r"delta=1\.1 must be above 1 \+ epsilon_high = 1\.2"),
        (lambda: Clipped(top_entropy=1.0), r"top_entropy=1\.0 must be below 1"),
        (lambda: Clipped(entropy_coefficient=-1.0), r"entropy_coefficient=-1\.0 must be at least 0"),
        (lambda: Clipped(off_policy_threshold=0.0), r"off_policy_threshold=0\.0 must be above 0"),
        (lambda: AdaptiveEntropy(delta=0.0), r"adaptive_entropy\.delta=0\.0 must be above 0"),
        (lambda: Clipped(advantage_clip=0.0), r"advantage_clip=0\.0 must be above 0"),
        (lambda: Mismatch("none", low=0.5), r"mismatch\.low=0\.5 has no effect on kind='none'"),
        (lambda: Mismatch("token_tis", low=2.5), r"mismatch\.low=2\.5 must be below high=2\.0"),
        (lambda: Mismatch("icepop", low=6.0), r"mismatch\.low=6\.0 must be below high=5\.0"),
    ],
)
def test_contradictory_options_are_refused_and_say_why(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_algorithm_without_state_refuses_anothers() -> None:
    assert Algorithm().state_dict() == {}
    Algorithm().load_state_dict({})
    with pytest.raises(ConfigError, match=r"holds the adaptive kl_coefficient, and Algorithm is not set to adapt them"):
        Algorithm().load_state_dict({"kl_coefficient": 0.1})


def test_a_sampler_elsewhere_is_corrected_unless_told_otherwise() -> None:
    def after_setup(algorithm: Algorithm) -> Mismatch | None:
        algorithm.setup(8, samples_elsewhere=True)
        return algorithm.mismatch

    assert after_setup(Algorithm()) == Mismatch("token_tis")
    assert after_setup(Algorithm(mismatch=Mismatch("none"))) == Mismatch("none")
    assert after_setup(GSPO()) == Mismatch("sequence_tis")
    assert after_setup(DPPO()) == Mismatch("none")


# Presets and classes of one's own -------------------------------------------------------------------------------------


def halved_loss(tokens: TokenBatch, *, factor: float, epsilon_low: float) -> tuple[Tensor, Metrics]:
    return -factor * (1 - epsilon_low) * tokens.advantages_N, {}


def constant_advantages(rewards_PG: Tensor, lengths_PG: Tensor, factor: float) -> Tensor:
    return rewards_PG * lengths_PG * factor


class Own(Clipped, advantage=constant_advantages, loss=halved_loss):
    """A formula of one's own.

    Args:
        factor: Read by both formulas.
    """

    factor: Annotated[float, Gt(0), Lt(1)] = 0.5
    epsilon_low = 0.25
    aggregation = "token_mean"
    top_entropy = fixed(None)


class Later(Own):
    """Inherits formulas and options."""

    factor = 0.25


class WithConstructor(GRPO):
    """An ordinary class, with a constructor of its own.

    Args:
        gain: A factor.
    """

    def __init__(self, *, gain: Annotated[float, Gt(0)] = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gain = gain

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        return -self.gain * self.advantages_per_token(tokens), {}


def test_a_formula_gets_quantities_and_options_by_the_names_of_its_parameters() -> None:
    scores_PGF, weights_F = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([1.0, 0.5])
    tokens = TokenBatch(torch.zeros(1), torch.zeros(1), torch.tensor([2.0]), torch.tensor([1]))
    for algorithm, factor in ((Own(), 0.5), (Own(factor=0.1), 0.1), (Later(), 0.25)):
        # Weighted sums 2 and 5, lengths 10 and 20.
        got_PG = algorithm.advantages(scores_PGF, weights_F, torch.tensor([[10, 20]]))
        assert got_PG[0].tolist() == pytest.approx([20 * factor, 100 * factor])
        assert algorithm.per_token_loss(tokens)[0].item() == pytest.approx(-factor * 0.75 * 2)


def test_a_preset_changes_adds_and_fixes_options_and_leaves_its_base_alone() -> None:
    assert (Own().epsilon_low, Own().epsilon_high, Own().aggregation) == (0.25, 0.25, "token_mean")
    assert (Clipped().epsilon_low, Clipped().aggregation) == (0.2, "sequence_mean")
    assert Later(beta=0.1).beta == 0.1
    with pytest.raises(TypeError, match="top_entropy"):
        Later(top_entropy=0.5)
    with pytest.raises(ConfigError, match=r"model\.algorithm\.factor=1\.0 must be below 1"):
        Later(factor=1.0)
    with pytest.raises(ConfigError, match=r"model\.algorithm\.epsilon_low=0 must be above 0"):
        Own(epsilon_low=0)


@pytest.mark.parametrize(
    ("name", "option", "others"),
    [("Later", "factor", {"epsilon_low", "beta"}), ("WithConstructor", "gain", {"epsilon_low", "beta", "top_entropy"})],
)
def test_the_command_line_reads_a_class_of_ones_own(
    name: str, option: str, others: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "own_module", sys.modules[__name__])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--algorithm", type=Algorithm)
    chosen = [f"--algorithm=own_module.{name}", "--algorithm.delta=3.0"]
    config = parser.parse_args([*chosen, f"--algorithm.{option}=0.75"])
    assert {option} | others <= set(vars(config.algorithm.init_args))
    assert ("top_entropy" in vars(config.algorithm.init_args)) == (name == "WithConstructor")
    algorithm = parser.instantiate(config).algorithm
    assert (getattr(algorithm, option), algorithm.delta) == (0.75, 3.0)
    with pytest.raises(Exception, match="greater than 0"):
        parser.parse_args([*chosen, f"--algorithm.{option}=0"])


class Inherited(WithConstructor):
    """Has its base's constructor."""


@pytest.mark.parametrize("kind", [WithConstructor, Inherited])
def test_a_constructor_of_ones_own_works_with_all_that_is_inherited(kind: type[WithConstructor]) -> None:
    algorithm = kind(beta=0.5, gain=3.0)
    tokens = batch([1.0], [2.0], [1], reference=[-1 + 0.6931472])
    assert algorithm.per_token_loss(tokens)[0].item() == pytest.approx(-6 + 0.5 * 0.3068528)
    assert (kind().beta, kind().gain) == (0.04, 2.0)
    with pytest.raises(TypeError, match="scal"):
        kind(scal="none")
