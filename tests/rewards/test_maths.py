"""MathEquivalence against math-verify itself, in this process and in workers."""

import math
import pickle
import subprocess
import sys

import pytest

from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.rewards import MathEquivalence, Scorer, failure_counts
from stateset_lightning.types import Turn


def result(text, target, **options):
    return MathEquivalence(**options).compute_reward(
        [Turn("user", "q"), Turn("assistant", text)], {"id": "s1", "target": target}
    )


@pytest.mark.parametrize(
    ("text", "target", "score"),
    [
        # GSM8K: a longer target with a marker, currency, thousands
        ("She makes $18 every day.", "9 * 2 = <<9*2=18>>18\n#### 18", 1),
        ("It costs \\$1,000.", "#### 1000", 1),
        ("She has $5 and earns $6, so $11", "#### 11", 1),
        ("The answer is 12.", "5 + 6 = 11\n#### 11", 0),
        # fractions, decimals, percent
        ("\\boxed{0.5}", "\\frac{1}{2}", 1),
        ("1/2", "\\frac12", 1),
        ("$-0.75$", "-\\frac{3}{4}", 1),
        ("0.3", "\\frac{1}{3}", 0),
        ("50%", "0.5", 1),
        ("50", "50\\%", 1),
        ("$1.5$", "1 \\frac{1}{2}", 1),
        # expressions
        ("$\\sqrt{12}$", "2\\sqrt{3}", 1),
        ("$(x+1)^2$", "x^2+2x+1", 1),
        ("$(x+2)^2$", "x^2+2x+1", 0),
        ("$2i+1$", "1+2i", 1),
        ("1024", "2^{10}", 1),
        ("3.14159", "\\pi", 0),
        # sets, intervals, tuples, matrices, equations
        ("$\\{2, 1\\}$", "\\{1,2\\}", 1),
        ("$\\{2, 3\\}$", "\\{1,2\\}", 0),
        ("$(1, 2]$", "(1,2]", 1),
        ("$[1, 2]$", "(1,2]", 0),
        ("$(2,1)$", "(1,2)", 0),
        ("$\\begin{pmatrix}1\\\\2\\end{pmatrix}$", "$\\begin{pmatrix}1\\\\2\\end{pmatrix}$", 1),
        ("\\boxed{3}", "x=3", 1),
        ("$x = 3$", "3", 1),
        # units, degrees, text
        ("\\boxed{5\\text{ cm}}", "5", 1),
        ("5 cm", "5 \\text{ cm}", 1),
        ("$90$", "90^\\circ", 1),
        ("5 dollars", "\\$5", 1),
        ("\\boxed{\\text{Monday}}", "\\text{Monday}", 1),
        # a target that is a whole solution, of several answers, or a number
        ("\\boxed{7}", "We add $3$ and $4$, so it is $\\boxed{7}$.", 1),
        ("\\boxed{7}", ["8", "7"], 1),
        ("100000", 1e5, 1),
        ("0.00001", 1e-5, 1),
        # where the answer stands
        ("\\boxed{3} is what I get. The final answer is $4$.", "3", 1),
        ("First 3, then 4", "4", 1),
        # no answer
        ("", "72", 0),
        ("I do not know", "72", 0),
        ("$\\frac{$", "72", 0),
    ],
)
def test_answers_are_compared(text, target, score):
    assert result(text, target).score == score


def test_breakdown_says_what_was_read():
    assert result("so it is $\\frac{2}{4}$", "0.5").breakdown == {"answer": "\\frac{2}{4}", "target": "\\frac{1}{2}"}
    assert result("none", "7").breakdown == {"answer": None, "target": "7"}


@pytest.mark.parametrize("target", [None, "", "  ", [], True, float("nan"), {"a": 1}, ["7", ""]])
def test_a_target_without_a_formula_is_a_data_error(target):
    with pytest.raises(DataError, match="s1"):
        result("72", target)


@pytest.mark.slow  # a worker process imports sympy, and another one after the first is killed
def test_it_runs_in_a_worker_and_one_that_hangs_is_killed():
    texts = ["\\boxed{\\frac{1}{2}}", "\\boxed{9^{9^{9^{9}}}}", "1/3", "0.5"]
    with Scorer(MathEquivalence(timeout=6.0)) as scorer:
        session = scorer.start(len(texts))
        for n, text in enumerate(texts):
            session.submit(n, [Turn("user", "q"), Turn("assistant", text)], {"target": "\\frac{1}{2}"})
        scores = session.collect()
    first, hung, third, last = scores.totals_N.tolist()
    assert (first, third, last) == (1.0, 0.0, 1.0)
    assert math.isnan(hung)
    assert failure_counts(scores) == {"reward_failures/math_equivalence/TimeoutError": 1}


@pytest.mark.slow  # a process imports sympy
def test_the_library_is_loaded_before_the_first_completion():
    code = (
        "import sys, pickle; reward = pickle.loads(sys.stdin.buffer.read()); "
        "print('math_verify' in sys.modules, 'torch' in sys.modules, reward.timeout)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(MathEquivalence(timeout=3)), capture_output=True, check=True
    )
    assert done.stdout.split() == [b"True", b"False", b"3"]


def test_bad_options_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="timeout=None of reward 'math_equivalence'"):
        MathEquivalence(timeout=None)
    with pytest.raises(ConfigError, match="target_marker=''"):
        MathEquivalence(target_marker="")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'math-verify: pip install "stateset-lightning\[math\]"'):
        MathEquivalence()
