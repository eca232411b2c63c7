"""Tokens from logits and uniform numbers, exact at chosen points and distributed as the softmax; stop strings."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from stateset_lightning.rollout import RolloutConfig
from stateset_lightning.rollout.sampling import StopStrings, filter_probabilities, sample_tokens
from stateset_lightning.seeding import uniforms

PLAIN = RolloutConfig()


def draw(
    probabilities: list[float], points: list[float], sampling: RolloutConfig = PLAIN
) -> tuple[list[int], list[float]]:
    logits = torch.tensor(probabilities, dtype=torch.float64).log().float().expand(len(points), -1)
    tokens, logprobs = sample_tokens(logits, torch.tensor(points, dtype=torch.float64), sampling)
    return tokens.tolist(), logprobs.tolist()


def filtered(probabilities: list[float], **options: float) -> list[float]:
    return filter_probabilities(torch.tensor([probabilities], dtype=torch.float64), RolloutConfig(**options))[
        0
    ].tolist()  # type: ignore[arg-type]


def test_the_cumulative_distribution_is_inverted() -> None:
    tokens, logprobs = draw([0.1, 0.2, 0.3, 0.4], [0.05, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.999])
    assert tokens == [0, 0, 1, 1, 2, 2, 3, 3]
    assert logprobs == pytest.approx([math.log(p) for p in (0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4)], abs=1e-6)


def test_temperature_divides_the_logits_of_token_and_logprob_alike() -> None:
    # At temperature 1/2 probabilities are squared and normalised: (1, 4, 9, 16) / 30.
    tokens, logprobs = draw([0.1, 0.2, 0.3, 0.4], [0.03, 0.04, 0.16, 0.17, 0.46, 0.47], RolloutConfig(temperature=0.5))
    assert tokens == [0, 1, 1, 2, 2, 3]
    assert logprobs == pytest.approx([math.log(p / 30) for p in (1, 4, 4, 9, 9, 16)], abs=1e-6)


def test_logprobs_are_those_before_filtering() -> None:
    sampling = RolloutConfig(top_k=3, top_p=0.8, min_p=0.6)
    # top-k leaves 0.3, 0.4, 0.2; top-p of their 0.9 (0.72) needs 0.4, 0.3 and 0.2; min-p (0.24) drops 0.2. So (0.3,
    # 0.4), over 0.7.
    tokens, logprobs = draw([0.1, 0.3, 0.4, 0.2], [0.001, 0.42, 0.43, 0.9999], sampling)
    assert tokens == [1, 1, 2, 2]
    assert logprobs == pytest.approx([math.log(0.3)] * 2 + [math.log(0.4)] * 2, abs=1e-6)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert filtered([0.1, 0.4, 0.2, 0.3], top_k=2) == [0.0, 0.4, 0.0, 0.3]
    assert filtered([0.1, 0.4, 0.2, 0.3], top_k=1) == [0.0, 0.4, 0.0, 0.0]
    assert filtered([0.1, 0.4, 0.2, 0.3], top_k=9) == [0.1, 0.4, 0.2, 0.3]


def test_top_k_keeps_the_lower_token_of_a_tie() -> None:
    assert filtered([0.2, 0.3, 0.2, 0.3], top_k=1) == [0.0, 0.3, 0.0, 0.0]
    assert filtered([0.2, 0.3, 0.2, 0.3], top_k=3) == [0.2, 0.3, 0.0, 0.3]
    assert filtered([0.25] * 4, top_k=2) == [0.25, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("k", [1, 3, 40, 199])
def test_top_k_keeps_what_a_stable_sort_puts_first(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    probs_BV = torch.randint(0, 20, (30, 200), generator=generator).float() / 64  # many ties, also of zeros
    order_BV = probs_BV.sort(dim=-1, descending=True, stable=True).indices
    expected = probs_BV.scatter(-1, order_BV[:, k:], 0.0)
    assert torch.equal(filter_probabilities(probs_BV, RolloutConfig(top_k=k)), expected)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    probabilities = [0.125, 0.5, 0.125, 0.25]
    assert filtered(probabilities, top_p=0.4) == [0.0, 0.5, 0.0, 0.0]
    assert filtered(probabilities, top_p=0.5) == [0.0, 0.5, 0.0, 0.0]
    assert filtered(probabilities, top_p=0.51) == [0.0, 0.5, 0.0, 0.25]
    assert filtered(probabilities, top_p=0.8) == [0.125, 0.5, 0.0, 0.25]  # the lower token of the tie
    assert filtered(probabilities, top_p=1.0) == probabilities
    assert filtered(probabilities, top_p=1e-9) == [0.0, 0.5, 0.0, 0.0]


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    # top-k leaves 0.4 and 0.2; two thirds of 0.6 is 0.4, which the first token has alone.
    assert filtered([0.2, 0.4, 0.15, 0.25], top_k=2, top_p=0.6) == [0.0, 0.4, 0.0, 0.0]
    assert filtered([0.2, 0.4, 0.15, 0.25], top_p=0.6) == [0.0, 0.4, 0.0, 0.25]


def test_min_p_keeps_tokens_with_a_share_of_the_likeliest() -> None:
    assert filtered([0.125, 0.5, 0.125, 0.25], min_p=0.5) == [0.0, 0.5, 0.0, 0.25]
    assert filtered([0.125, 0.5, 0.125, 0.25], min_p=0.25) == [0.125, 0.5, 0.125, 0.25]
    assert filtered([0.25] * 4, min_p=1.0) == [0.25] * 4


@pytest.mark.parametrize(
    "sampling", [PLAIN, RolloutConfig(temperature=1.7), RolloutConfig(temperature=1.6, top_k=7, top_p=0.9, min_p=0.05)]
)
def test_frequencies_match_the_filtered_softmax(sampling: RolloutConfig) -> None:
    draws = 20_000
    logits = torch.tensor(np.random.default_rng(3).normal(size=12) * 1.5, dtype=torch.float32)
    expected = filter_probabilities((logits.double() / sampling.temperature).softmax(-1)[None], sampling)[0]
    expected = expected / expected.sum()
    points = torch.from_numpy(uniforms(range(draws), 1)[:, 0])
    tokens, _ = sample_tokens(logits.expand(draws, -1), points, sampling)
    counts = torch.bincount(tokens, minlength=12).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - draws * expected)[possible].square() / (draws * expected[possible])).sum().item()
    freedom = int(possible.sum()) - 1
    assert freedom >= 2
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("point", [0.0, 5e-324, 2.0**-53, 1 - 2.0**-53, 1.0])
def test_a_token_without_probability_is_never_drawn(point: float) -> None:
    tokens, logprobs = draw([0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0], [point])
    assert tokens == [2 if point < 0.5 else 4]
    assert logprobs == pytest.approx([math.log(0.5)], abs=1e-6)
    tokens, _ = draw([0.1, 0.2, 0.4, 0.3], [point], RolloutConfig(top_k=1))
    assert tokens == [2]


def test_a_rare_token_of_a_large_vocabulary_has_its_place() -> None:
    logits = torch.zeros(1, 100_000)
    logits[0, -1] = -12.0  # its probability, 6e-11, is lost in a float32 sum
    last = math.exp(-12.0) / (99_999 + math.exp(-12.0))
    assert sample_tokens(logits, torch.tensor([1 - last * 0.5], dtype=torch.float64), PLAIN)[0].item() == 99_999
    assert sample_tokens(logits, torch.tensor([1 - last * 1.5], dtype=torch.float64), PLAIN)[0].item() == 99_998


def test_rows_are_independent() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    points = torch.tensor([0.5, 0.96, 0.5], dtype=torch.float64)
    together, logprobs = sample_tokens(logits, points, PLAIN)
    for i in range(3):
        alone, logprob = sample_tokens(logits[i : i + 1], points[i : i + 1], PLAIN)
        assert alone.item() == together[i]
        assert logprob.item() == logprobs[i]
    # Row 1: probabilities 0.936, 0.047, 0.017; row 2: a third each.
    assert together.tolist() == [2, 1, 1]


def test_greedy_takes_the_likeliest_and_the_lower_of_a_tie() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [2.0, 0.0, 2.0]])
    tokens, logprobs = sample_tokens(logits, None, RolloutConfig(temperature=2.0, top_k=2))
    assert tokens.tolist() == [1, 0]
    assert logprobs[0].item() == pytest.approx(1.5 - math.log(sum(math.exp(x / 2) for x in (1, 3, 2))), abs=1e-6)


def test_logprobs_are_float32_whatever_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    _, expected = sample_tokens(logits, None, PLAIN)
    _, logprobs = sample_tokens(logits.bfloat16(), None, PLAIN)
    assert logprobs.dtype == torch.float32
    assert torch.equal(logprobs, expected)


# Stop strings within a token, across tokens and across the bytes of a character --------------------------------------


def first_stop(text: str, stops: list[str], tokenizer: Any) -> int | None:
    """After how many tokens of `text` a stop string is found."""
    tokens = tokenizer.encode(text)
    stop = StopStrings(stops, tokenizer, [])
    return next((length for length in range(1, len(tokens) + 1) if stop.found(tokens[:length])), None)


@pytest.mark.parametrize("stop", ["hello", "lowo", " world", "d again", "he", "n"])
def test_a_string_is_found_with_the_token_that_completes_it(tiny_tokenizer: Any, stop: str) -> None:
    text = "say helloworld and hello world again"
    tokens = tiny_tokenizer.encode(text)
    expected = next(length for length in range(1, len(tokens) + 1) if stop in tiny_tokenizer.decode(tokens[:length]))
    assert first_stop(text, [stop], tiny_tokenizer) == expected


def test_a_string_of_several_byte_characters_is_found_across_tokens(tiny_tokenizer: Any) -> None:
    text = "price: 12 €…€ end"
    tokens = tiny_tokenizer.encode(text)
    length = first_stop(text, ["€…€"], tiny_tokenizer)
    assert length is not None
    assert tiny_tokenizer.decode(tokens[:length]).endswith("€…€")
    assert "€…€" not in tiny_tokenizer.decode(tokens[: length - 1])


def test_a_long_completion_is_searched_only_at_its_end(tiny_tokenizer: Any) -> None:
    stop = StopStrings(["XY"], tiny_tokenizer, [])
    early = [*tiny_tokenizer.encode("XY"), *tiny_tokenizer.encode("abcdefgh" * 20)]
    assert not stop.found(early)  # it would have been found when it was the end
    assert stop.found([*early, *tiny_tokenizer.encode("XY")])


def test_a_string_at_the_edge_of_the_window_is_found(tiny_tokenizer: Any) -> None:
    long_stop = "0123456789" * 3  # each digit is a token of its own
    assert len(tiny_tokenizer.encode(long_stop)) == 30
    assert first_stop("9999" + long_stop, [long_stop], tiny_tokenizer) == 34


def test_the_text_ends_before_the_first_stop_string(tiny_tokenizer: Any) -> None:
    stop = StopStrings(["bb", "c"], tiny_tokenizer, [tiny_tokenizer.eos_token_id])
    for text, kept in (("aabbacc", "aa"), ("aacbb", "aa"), ("aab", "aab"), ("c", "")):
        assert stop.text([*tiny_tokenizer.encode(text), tiny_tokenizer.eos_token_id]) == kept


def test_without_stop_strings_nothing_is_found_or_cut(tiny_tokenizer: Any) -> None:
    stop = StopStrings([], tiny_tokenizer, [])
    assert not stop.found(tiny_tokenizer.encode("anything"))
    assert stop.text(tiny_tokenizer.encode("anything")) == "anything"
