"""Stop strings within a token, across tokens and across the bytes of a character."""

from typing import Any

import pytest

from stateset_lightning.rollout.stopping import StopStrings


def first_stop(text: str, stops: list[str], tokenizer: Any) -> int | None:
    """After how many tokens of `text` a stop string is found."""
    tokens = tokenizer.encode(text)
    stop = StopStrings(stops, tokenizer)
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
    stop = StopStrings(["XY"], tiny_tokenizer)
    early = [*tiny_tokenizer.encode("XY"), *tiny_tokenizer.encode("abcdefgh" * 20)]
    assert not stop.found(early)  # it would have been found when it was the end
    assert stop.found([*early, *tiny_tokenizer.encode("XY")])


def test_a_string_at_the_edge_of_the_window_is_found(tiny_tokenizer: Any) -> None:
    long_stop = "0123456789" * 3  # each digit is a token of its own
    assert len(tiny_tokenizer.encode(long_stop)) == 30
    assert first_stop("9999" + long_stop, [long_stop], tiny_tokenizer) == 34


def test_the_text_ends_before_the_first_stop_string(tiny_tokenizer: Any) -> None:
    stop = StopStrings(["bb", "c"], tiny_tokenizer)
    assert stop.cut("aabbacc") == "aa"
    assert stop.cut("aacbb") == "aa"
    assert stop.cut("aab") == "aab"
    assert stop.cut("c") == ""


def test_without_stop_strings_nothing_is_found_or_cut(tiny_tokenizer: Any) -> None:
    stop = StopStrings([], tiny_tokenizer)
    assert not stop.found(tiny_tokenizer.encode("anything"))
    assert stop.cut("anything") == "anything"
