"""A reward for answers that are programs: the share of a scenario's tests that they pass, run in a sandbox."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import ast
import json
import math
import os
import re
import site
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from stateset_lightning.errors import DataError, RewardError, tell_once
from stateset_lightning.rewards.base import Context, RewardFunction, RewardResult, Turns, completion, options
from stateset_lightning.workers import sandbox

Seconds = Annotated[float, Gt(0), Lt(math.inf)]

_Case = tuple[str, str, Any]  # a program's input, a call, and what is expected of either

# Possessive: an opening that is never closed would else be tried in all ways that its line can be divided.
_BLOCK = re.compile(r"^```[ \t]*+(\w*+).*+\n([\s\S]*?)^```", re.MULTILINE)
_TAGS = {"python": ("", "python", "python3", "py"), "sh": ("", "sh", "bash", "shell")}
# More at a time would wait for each other while their clocks run.
_slots = threading.BoundedSemaphore(os.cpu_count() or 1)


@options
class CodeReward(RewardFunction):
    """The share of the scenario's tests that the completion's code passes, between 0 and 1.

    The code is the last fenced block of the completion (of the language, or of none). It runs in a sandbox that sees
    the inputs of the tests alone; what comes back is data, and is compared here. A completion without code scores 0.

    Tests are a list of cases, or JSON of one. A case is a program's input and output, `{"input": "1 2", "output": "3"}`
    (all in one as `{"inputs": [...], "outputs": [...]}`, too), whose lines are compared without the spaces at their
    ends; or a call and its result, `{"call": "f(1, 2)", "result": 3}`, `"assert f(1, 2) == 3"` or `"assert f(1)"`. In
    `sh` a call is a command, and its result what it prints. Inputs of functions (LiveCodeBench's `functional`, APPS's
    `fn_name`) are refused.

    Args:
        language: In which the code is written. `python` is the trainer's own, with its libraries.
        tests: The scenario's column with the tests.
        all_or_nothing: Score 1 if all cases pass, else 0.
        case_timeout: Seconds that the code may take for each case.
        total_timeout: Seconds for all cases; those that are left then have failed.
        memory: MiB of address space for each of the code's processes.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If an option is unusable.
    """

    language: Literal["python", "sh"] = "python"
    tests: str = "tests"
    all_or_nothing: bool = False
    case_timeout: Seconds = 5.0
    total_timeout: Seconds = 60.0
    memory: Annotated[int, Ge(64)] = 1024

    def compute_reward(self, turns: Turns, context: Context = None) -> RewardResult:
        cases = self._cases(context or {})
        blocks = [code for tag, code in _BLOCK.findall(completion(turns)) if tag.lower() in _TAGS[self.language]]
        ends = self._run(blocks[-1], cases) if blocks else ["no code"] * len(cases)
        passed = ends.count("passed")
        score = passed == len(cases) if self.all_or_nothing else passed / len(cases)
        worst = next((end for end in ends if end != "passed"), "passed")
        return RewardResult(float(score), {"passed": passed, "cases": len(cases), "ended": worst})

    def _cases(self, context: Mapping[str, Any]) -> list[_Case]:
        tests = context.get(self.tests)
        try:
            given: Any = json.loads(tests) if isinstance(tests, str) else tests
            if isinstance(given, Mapping):
                pairs = zip(given["inputs"], given["outputs"], strict=True)
                given = [{**given, "input": input_, "output": output} for input_, output in pairs]
            if cases := list(map(_case, given)):
                return cases
            problem = "holds no case"
        except (KeyError, TypeError, ValueError, SyntaxError, RecursionError) as error:
            problem = f"cannot be read ({type(error).__name__}: {error})"
        place = f"{self.tests}={tests!r:.200} of scenario {context.get('id')!r} {problem}"
        form = "give a list of {input, output} or {call, result}"
        raise DataError(f"reward '{self.name}' needs tests, but {place}: {form}")

    def _run(self, code: str, cases: list[_Case]) -> list[str]:
        """How each case ended: `passed`, `wrong`, `timeout`, `memory` or `error`."""
        task = {name: getattr(self, name) for name in ("language", "case_timeout", "total_timeout", "memory")}
        task |= {"code": code, "cases": [{"input": given, "call": call} for given, call, _ in cases]}
        task |= {"site": site.getsitepackages(), "namespaces": sandbox.NAMESPACE_FLAGS}
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        run: Any = partial(subprocess.run, capture_output=True, env=environment, start_new_session=True)
        folder = tempfile.mkdtemp(prefix="code-")
        try:
            with _slots:
                python, given = [sys.executable, "-I", "-S", sandbox.__file__], json.dumps(task).encode()
                done = run(python, input=given, cwd=folder, timeout=self.total_timeout + 60)
        finally:  # not with Python's own means, which fail where folders lie deeper than it can call functions
            run(["sh", "-c", 'rm -rf "$0" || { chmod -R u+rwx "$0"; rm -rf "$0"; }', folder])
        if done.stderr:  # the code's goes elsewhere
            raise RewardError(f"the sandbox of reward '{self.name}' could not start: {done.stderr.decode()[-2000:]}")
        if not done.stdout:  # without namespaces, code can kill it
            return ["error"] * len(cases)
        enclosed, reports = json.loads(done.stdout)
        if not enclosed:
            tell_once("the system refuses namespaces to code: docs/rewards.md says from what it is not kept then")
        equal = [self._equal(output, *case[1:]) for (_, output), case in zip(reports, cases, strict=True)]
        verdicts = ["passed" if is_equal else "wrong" for is_equal in equal]
        return [verdict if end == "ended" else end for (end, _), verdict in zip(reports, verdicts, strict=True)]

    def _equal(self, output: str, call: str, expected: Any) -> bool:
        if not call or self.language == "sh":
            return _lines(output) == _lines(str(expected))
        try:
            return bool(json.loads(output) == json.loads(json.dumps(sandbox.plain(expected))))
        except (ValueError, RecursionError):  # there is no result, or one that is cut off
            return False


def _case(test: Any) -> _Case:
    """Read a case.

    Raises:
        ValueError: If it is none; a SyntaxError, if it is no Python.
    """
    match test:
        case {"input": str(given), "output": str() | int() | float() as output} if _is_program(test):
            return given, "", output
        case {"call": str(call), "result": result}:
            return "", call, result
        case str():
            match ast.parse(test.strip()).body:
                case [ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]))]:
                    # What is expected stays here: it must be a value, not an expression.
                    return "", ast.unparse(left), ast.literal_eval(right)
                case [ast.Assert(test=truth)] if _is_simple(truth):
                    return "", f"not not ({ast.unparse(truth)})", True
    raise ValueError(f"{test!r:.80} is no case")


def _is_program(test: Mapping[str, Any]) -> bool:
    """Whether a test is of what a program reads and prints; else its input is a function's arguments."""
    kinds = {str(test.get(name) or "stdin").partition("_")[0] for name in ("testtype", "type")}
    return kinds == {"stdin"} and not (test.get("fn_name") or test.get("func_name"))


def _is_simple(truth: ast.expr) -> bool:
    """Whether a condition is a call of a function by its name, its negation, or that it is True, False or None."""
    match truth:
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return _is_simple(inner)
        case ast.Compare(left=ast.Call() as inner, ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant()]):
            return _is_simple(inner)
    return isinstance(truth, ast.Call) and isinstance(truth.func, ast.Name)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
