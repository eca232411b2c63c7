"""Upper bounds on time that hold on a busy machine: other work only ever adds time, so the quickest of a few attempts
counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, attempt: Callable[[], T], attempts: int = 5) -> T:
    """What the first attempt that took less than `seconds` returned; an AssertionError with all times when none did."""
    taken = []
    for _ in range(attempts):
        begin = time.perf_counter()
        result = attempt()
        taken.append(time.perf_counter() - begin)
        if taken[-1] < seconds:
            return result
    raise AssertionError(f"no attempt took less than {seconds} s: {[round(value, 2) for value in taken]}")
