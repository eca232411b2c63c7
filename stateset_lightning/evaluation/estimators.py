"""Estimates from several samples of a prompt, and how far a mean over prompts can be trusted. No torch."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import stdev

# Quantile of the normal distribution that leaves 2.5% above.
Z95 = 1.959963984540054


def pass_at_k(n: int, c: int, k: int) -> float:
    """pass@k, the chance that k of n samples, c of which are right, hold a right one: 1 - C(n - c, k) / C(n, k).

    arXiv:2107.03374, unbiased. NaN if there are fewer than k samples.

    Example:
        >>> pass_at_k(4, 1, 2)
        0.5
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k) if n >= k else math.nan


def pass_hat_k(n: int, c: int, k: int) -> float:
    """pass^k, the chance that all k of n samples are right: C(c, k) / C(n, k) (arXiv:2406.12045, unbiased).

    NaN if there are fewer than k samples.
    """
    return math.comb(c, k) / math.comb(n, k) if n >= k else math.nan


def majority(answers: Sequence[str | None], solved: Sequence[bool]) -> float:
    """Chance that the commonest answer is right, ties broken at random (arXiv:2203.11171).

    Each of the tied answers counts alike. Completions of one answer may differ in their score (by format, say): the
    answer counts by the share that is solved. None does not vote; without any vote it is 0.

    Example:
        >>> majority(["4", "5", "5", "4", None], [True, False, False, True, True])
        0.5
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    # All tied answers have the same number of votes, so the mean of their shares is the share among their completions.
    right = [ok for answer, ok in zip(answers, solved, strict=True) if answer is not None and votes[answer] == most]
    return sum(right) / len(right)


def half_width(values: Sequence[float]) -> float:
    """Half the width of a mean's 95% interval, by the normal approximation; NaN for fewer than two values."""
    return Z95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n prompts, which also holds near 0 and 1.

    Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    reach = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)
