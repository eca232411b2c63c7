"""Even work among the micro-steps of an optimizer step."""

from hypothesis import given
from hypothesis import strategies as st

from stateset_lightning.micro_steps import Piece, load, share_out, tokens_over

GROUPS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6)).map(
        lambda group: Piece(group[0], tuple(enumerate(group[1])))
    ),
    max_size=8,
)


def numbers(piece: Piece) -> list[int]:
    return [n for n, _ in piece.completions]


def test_halves_have_about_as_many_tokens() -> None:
    first, second = Piece(5, ((0, 8), (1, 1), (2, 1), (3, 6))).halves()
    assert (numbers(first), first.tokens) == ([0], 13)
    assert (numbers(second), second.tokens) == ([1, 2, 3], 13)
    assert [numbers(half) for half in Piece(1, ((0, 1), (1, 99))).halves()] == [[0], [1]]


@given(GROUPS, st.integers(1, 4), st.none() | st.integers(1, 200))
def test_every_completion_is_trained_once(groups: list[Piece], micro_steps: int, max_tokens: int | None) -> None:
    steps = share_out(groups, micro_steps, max_tokens)
    assert len(steps) == micro_steps
    given_out = sorted(
        (piece.prompt_tokens, *completion) for pieces in steps for piece in pieces for completion in piece.completions
    )
    assert given_out == sorted(
        (group.prompt_tokens, *completion) for group in groups for completion in group.completions
    )


@given(GROUPS, st.integers(1, 4))
def test_without_a_budget_work_is_even_up_to_one_piece(groups: list[Piece], micro_steps: int) -> None:
    steps = share_out(groups, micro_steps)
    largest = max((piece.tokens for pieces in steps for piece in pieces), default=0)
    assert max(map(load, steps)) - min(map(load, steps)) <= largest
    if len(groups) >= micro_steps:
        assert sum(map(load, steps)) == load(groups)  # nothing was taken apart


def test_a_budget_is_kept_where_it_can_be() -> None:
    groups = [Piece(2, ((0, 10), (1, 10), (2, 10), (3, 10))), Piece(2, ((4, 3), (5, 3)))]
    whole = share_out(groups, 2)
    assert [load(pieces) for pieces in whole] == [42, 8]
    assert tokens_over(whole, 30) == 12
    halved = share_out(groups, 2, max_tokens=30)
    assert [load(pieces) for pieces in halved] == [30, 22]
    assert tokens_over(halved, 30) == 0


def test_a_group_is_left_whole_where_a_budget_cannot_be_kept() -> None:
    groups = [Piece(2, ((0, 10), (1, 10)))]
    steps = share_out(groups, 1, max_tokens=15)
    assert steps == [groups]
    assert tokens_over(steps, 15) == 7
