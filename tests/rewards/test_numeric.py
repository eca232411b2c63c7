"""NumericAnswer and the reading of numbers."""

from fractions import Fraction

import numpy as np
import pytest
from timing import within

from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.rewards import NumericAnswer
from stateset_lightning.rewards.numeric import find_numbers
from stateset_lightning.types import Turn


def result(text, target, **options):
    return NumericAnswer(**options).compute_reward(
        [Turn("user", "q"), Turn("assistant", text)], {"id": "s1", "target": target}
    )


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("72", [72]),
        ("72.", [72]),
        ("**72**", [72]),
        ("so...72", [72]),
        ("1,234.5 or 1,000,000", [1234.5, 1000000]),
        ("12,34", [12, 34]),
        ("1,2345", [1, 2345]),
        (".5 and -.5", [0.5, -0.5]),
        ("-3 +4 \u22125", [-3, 4, -5]),
        ("5-3, 10 - 3, (5)-3", [5, 3, 10, 3, 5, 3]),
        ("$3 -$3 $-3 €1,000", [3, -3, -3, 1000]),
        ("3/4, 1 / 2", [0.75, 0.5]),
        ("2 1/2 cups, -2 1/2", [2.5, -2.5]),
        (r"\frac{1}{2} and \boxed{\dfrac{3}{4}}", [0.5, 0.75]),
        (r"1{,}000 \$5", [1000, 5]),
        ("1e5 2E-3", [100000, 0.002]),
        (r"1.5 x 10^5, 2 × 10^{-2}, 3 \times 10^2, 4*10**3", [150000, 0.02, 300, 4000]),
        ("H2O, v1.2.3, Q3", []),
        ("72km and 2nd", [72, 2]),
        ("1/0 1e999", []),
        ("3/4/2020", [0.75, 2020]),
        ("", []),
    ],
)
def test_numbers_are_read(text, numbers):
    assert [readings[0] for readings in find_numbers(text)] == pytest.approx(numbers)


def test_percent_has_two_readings():
    assert list(find_numbers("50% 50 % 5\\%")) == [[50, 0.5], [50, 0.5], [5, 0.05]]


@pytest.mark.parametrize(
    ("text", "target", "options", "score"),
    [
        ("48 + 24 = 72", 72, {}, 1.0),
        ("The answer is 72.", "72", {}, 1.0),
        ("72 clips, not 73", 72, {}, 0.0),
        ("I do not know", 72, {}, 0.0),
        ("", 72, {}, 0.0),
        ("$1,000", "1000", {}, 1.0),
        ("It is 72.", "48/2 = <<48/2=24>>24.\n#### 72", {}, 1.0),
        ("It is 24.", "48/2 = <<48/2=24>>24.\n#### 72 clips in 3 days", {}, 0.0),
        ("#### 72\nChecked in 3 ways.", 72, {"marker": "####"}, 1.0),
        ("#### 1\n#### 72", 72, {"marker": "####"}, 1.0),
        ("It is 72", 72, {"marker": "####"}, 0.0),
        ("72 ####", 72, {"marker": "####"}, 0.0),
        ("Answer: 72 apples and 3", "Answer: 72", {"marker": "answer:"}, 1.0),
        ("50%", 0.5, {}, 1.0),
        ("50", "50%", {}, 1.0),
        ("0.5", "50%", {}, 1.0),
        ("1000001", 1000000, {}, 0.0),
        ("0.3333333", Fraction(1, 3), {}, 0.0),
        ("0.3333333", Fraction(1, 3), {"absolute_tolerance": 1e-6}, 1.0),
        ("101", 100, {"relative_tolerance": 0.01}, 1.0),
        ("102", 100, {"relative_tolerance": 0.01}, 0.0),
        ("0.30000000000000004", 0.3, {}, 1.0),
        ("0", 0, {}, 1.0),
        ("-7", np.int64(-7), {}, 1.0),
        (r"1\frac{1}{2}", 1.5, {}, 1.0),
        (r"5.5", r"1\dfrac{1}{2}", {}, 0.0),
        ("8", ["7", 8], {}, 1.0),
        ("9", ["7", 8], {}, 0.0),
    ],
)
def test_answers_are_compared(text, target, options, score):
    assert result(text, target, **options).score == score


def test_breakdown_says_what_was_read():
    assert result("x = 3 or 4", "#### 5").breakdown == {"answer": 4.0, "target": 5.0}
    assert result("none", 5).breakdown == {"answer": None, "target": 5.0}


@pytest.mark.parametrize("target", ["seventy", "", None, True, float("nan"), [72, "x"]])
def test_a_target_without_a_number_is_a_data_error(target):
    with pytest.raises(DataError, match="s1"):
        result("72", target)


def test_bad_options_are_rejected():
    with pytest.raises(ConfigError, match="marker=''"):
        NumericAnswer(marker="")
    with pytest.raises(ConfigError, match="relative_tolerance=-1"):
        NumericAnswer(relative_tolerance=-1)


@pytest.mark.parametrize(
    "text", ["9" * 200_000, "1,000" * 40_000, "1 " * 100_000, "-$" * 100_000, "1/" * 100_000, r"\frac{1}{" * 20_000]
)
def test_reading_takes_linear_time(text):
    within(3, lambda: list(find_numbers(text)), attempts=2)
