"""Which micro-step trains which completion: even work inside an optimizer step, whole groups where possible.

Work is counted in tokens of a packed forward: a prompt once, its completions behind it. Taking a group apart computes
its prompt again, so it is done only where there are fewer groups than micro-steps, or where a budget would be exceeded.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A prompt of `prompt_tokens` and some of its completions, as (number, tokens)."""

    prompt_tokens: int
    completions: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + sum(tokens for _, tokens in self.completions)

    def halves(self) -> tuple[Piece, Piece]:
        """The same completions in two pieces of about as many tokens each."""
        total, before, cut = sum(tokens for _, tokens in self.completions), 0, 0
        while cut < len(self.completions) - 1 and 2 * before < total:
            before += self.completions[cut][1]
            cut += 1
        return Piece(self.prompt_tokens, self.completions[:cut]), Piece(self.prompt_tokens, self.completions[cut:])


def share_out(groups: Sequence[Piece], micro_steps: int, max_tokens: int | None = None) -> list[list[Piece]]:
    """The pieces of each micro-step.

    No micro-step is above `max_tokens` where taking groups apart can help; see `tokens_over` for what cannot be helped.
    """
    pieces = list(groups)
    while True:
        steps = _balance(pieces, micro_steps)
        if len(pieces) < micro_steps:
            candidates = pieces
        elif max_tokens is not None and load(pieces) <= micro_steps * max_tokens < micro_steps * load(
            fullest := max(steps, key=load)
        ):
            candidates = fullest
        else:
            return steps
        divisible = [piece for piece in candidates if len(piece.completions) > 1]
        if not divisible:
            return steps
        largest = max(divisible, key=lambda piece: piece.tokens)
        pieces.remove(largest)
        pieces += largest.halves()


def load(pieces: Sequence[Piece]) -> int:
    """Tokens of a micro-step."""
    return sum(piece.tokens for piece in pieces)


def tokens_over(steps: Sequence[Sequence[Piece]], max_tokens: int) -> int:
    """Tokens of all micro-steps beyond `max_tokens` each."""
    return sum(max(0, load(pieces) - max_tokens) for pieces in steps)


def _balance(pieces: Sequence[Piece], micro_steps: int) -> list[list[Piece]]:
    """The largest piece first, each to the micro-step with the least work so far (Graham, 1969: at most 4/3 of the
    best).
    """
    steps: list[list[Piece]] = [[] for _ in range(micro_steps)]
    loads = [(0, k) for k in range(micro_steps)]
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        tokens, k = heapq.heappop(loads)
        steps[k].append(piece)
        heapq.heappush(loads, (tokens + piece.tokens, k))
    return steps
