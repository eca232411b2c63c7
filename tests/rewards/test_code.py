"""CodeReward: right and wrong programs, programs that cheat, and programs that take too much."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stateset_lightning.errors import ConfigError, DataError, tell_once
from stateset_lightning.rewards import CodeReward, Scorer, failure_counts
from stateset_lightning.types import Turn
from stateset_lightning.workers import sandbox

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(params=["namespaces", "limits alone"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the system allows; where it refuses namespaces, both cases are the second."""
    if request.param == "limits alone":
        monkeypatch.setattr(sandbox, "NAMESPACE_FLAGS", 1)  # unshare knows no such flag
    return request.param


def block(code: str, tag: str = "python") -> str:
    return f"Here it is:\n\n```{tag}\n{code}\n```\n"


def scored(text: str, tests: Any, **options: Any) -> Any:
    turns = [Turn("user", "q"), Turn("assistant", text)]
    return CodeReward(**options).compute_reward(turns, {"id": "s1", "tests": tests})


SUM = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6\n", "output": "11"}]
CALLS = [{"call": "add(1, 2)", "result": 3}, {"call": "add(5, 6)", "result": 11}]
ASSERTS = ["assert add(1, 2) == 3", "assert add(*[5, 6]) == 11"]
READS = "a, b = map(int, input().split())\n"
SHAPES = [{"call": "f()", "result": [{1, 2}, (1, 2), {"a": None, 2: True}]}]


@pytest.mark.parametrize(
    ("language", "code", "tests", "score"),
    [
        ("python", READS + "print(a + b)", SUM, 1),
        ("python", READS + "print(a + b, ' \\n')", json.dumps(SUM), 1),
        ("python", READS + "print(a + b)", {"inputs": ["1 2", "1 3"], "outputs": ["3", "5"]}, 0.5),
        ("python", READS + "print('sum', a + b)", SUM, 0),
        ("python", READS + "print(a + b)\nexit()", SUM, 1),
        ("python", READS + "print(3)\nif a == 5: print(1 / 0)", SUM, 0.5),
        ("python", READS + "print(a + b)\nraise SystemExit(1)", SUM, 0),
        ("python", "import atexit\na = input()\natexit.register(lambda: print(sum(map(int, a.split()))))", SUM, 1),
        ("python", "if __name__ == '__main__':\n    print(sum(map(int, open(0).read().split())))", SUM, 1),
        ("python", "def add(a, b): return a + b", CALLS, 1),
        ("python", "def add(a, b): return a + b", ASSERTS, 1),
        ("python", "def add(a, b):\n    print('3')\n    return 3", CALLS, 0.5),
        ("python", "def add(a, b): print(a + b)", ASSERTS, 0),
        ("python", "def add(a, b): return str(a + b)", CALLS, 0),
        ("python", "def subtract(a, b): return a - b", CALLS, 0),
        ("python", "def add(a, b: return", CALLS, 0),
        ("python", "def f(): return [{2, 1}, [1, 2], {2: True, 'a': None}]", SHAPES, 1),
        ("python", "def f(): return [[1, 2], [1, 2], {2: True, 'a': None}]", SHAPES, 0),
        ("python", "def f(): return [{1, 2}, [1, 2], {'2': True, 'a': None}]", SHAPES, 0),
        ("python", "def add(a, b):\n    import numpy\n    return numpy.int64(a) + b", CALLS[:1], 1),
        ("python", READS + "print(a + b)", [{**SUM[0], "testtype": "stdin"}], 1),
        ("python", "def odd(a): return a % 2", ["assert odd(3)", "assert not odd(4)", "assert odd(4)"], 2 / 3),
        ("python", "def odd(a): return a % 2 == 1", ["assert odd(3) is True", "assert odd(4) is not True"], 1),
        ("python", "def odd(a): return a % 2", ["assert odd(3) is True", "assert odd(3) is not None"], 0.5),
        ("sh", "read a b\necho $((a + b))", SUM, 1),
        ("sh", "cat | tr ' ' '+' | sed 's/.*/$((&))/;s/^/echo /' | sh", SUM, 1),
        ("sh", "echo 3", SUM, 0.5),
        ("sh", "add() { echo $(($1 + $2)); }\necho 3", [{"call": "add 1 2", "result": 3}], 1),
        ("sh", "add() { echo $1; }\necho 3; exit 0", [{"call": "add 1 2", "result": 3}], 0),
    ],
)
def test_a_programs_score_is_the_share_of_cases_that_it_passes(
    language: Any, code: str, tests: Any, score: float
) -> None:
    assert scored(block(code, language), tests, language=language).score == score


def test_the_code_is_the_last_block_of_its_language() -> None:
    good, bad = block(READS + "print(a + b)"), block("print(0)")
    assert scored(bad + good + block("3", "text"), SUM).score == 1
    assert scored(good + block(READS + "print(a + b)", ""), SUM).score == 1
    assert scored(good + bad, SUM).score == 0
    half = block(READS + "print(3)")
    assert scored(half, SUM).breakdown == {"passed": 1, "cases": 2, "ended": "wrong"}
    assert scored(half, SUM, all_or_nothing=True).score == 0
    assert scored(good, SUM, all_or_nothing=True).score == 1
    for text in ("I cannot.", "```python\n" + READS + "print(a + b)"):
        assert scored(text, SUM).breakdown == {"passed": 0, "cases": 2, "ended": "no code"}
    begun = time.monotonic()
    assert scored("```" + "a" * 100_000 + "\n" + "b\n" * 100_000, SUM).score == 0
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "tests",
    [
        *(None, [], 3, [None], "assert f() == 1", ["f() == 1"], ["assert f() == g()"], ["assert f("]),
        *(["assert f() == 1; import os"], [{"input": "1"}], [{"input": 1, "output": "1"}]),
        *([{"input": "1", "output": "1", "testtype": "functional"}], [{"input": "1", "output": "1", "fn_name": "f"}]),
        *({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, ["assert math.isclose(f(), 1)"], ["assert f() > 1"]),
        *({"inputs": ["1"], "outputs": []}, {"inputs": 3}),
    ],
)
def test_tests_that_cannot_be_read_fail_the_reward_and_are_no_zero(tests: Any) -> None:
    with pytest.raises(DataError, match=r"reward 'code' needs tests, but tests=.* of scenario 's1'"):
        scored("no code", tests)


# f() is to return this number, which no cheat has been told; they look for seven hundred millions.
ANSWER = 731_415_926
FIND = "import os, re, sys\ndef find(text): return int((re.findall(r'7\\d{8}', text) or [0])[0])\n"
FILES = (
    FIND + "seen = ''\ndef read(path):\n    global seen\n    try: seen += open(path, 'rb').read().decode('latin1')\n"
)
FILES += "    except OSError as error: seen += repr(error)\ndef f(): return find(seen)\n"
UP = "    pid = int((re.findall(r'PPid:\\s+(\\d+)', open(f'/proc/{pid}/status').read()) or [0])[0]) if pid else 0\n"
CHEATS = {
    "exits": "raise SystemExit(0)",
    "exits at once": "import os\nos._exit(0)",
    "says ok": "print('ok\\nOK\\n1 passed')\ndef f(): return 'passed'",
    "is equal to all": "class Equal(int):\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef f(): return Equal(7)",
    "patches the comparison": "import builtins, json, sys\njson.dumps = lambda *_, **__: 'true'\n"
    "builtins.str = builtins.dict = builtins.len = lambda *_: True\nfor module in list(sys.modules.values()):\n"
    "    try: module.plain = module._equal = module.end_all = module._end = lambda *_: True\n"
    "    except AttributeError: pass\ndef f(): return None",
    "patches the test": "import ast, inspect, sys\nframe = sys._getframe()\nwhile frame := frame.f_back:\n"
    "    for value in list(frame.f_locals.values()):\n        if isinstance(value, dict) and 'cases' in value:\n"
    "            value['cases'].clear()\n        if isinstance(value, list): value.append(('ended', 'true'))\n",
    "writes results": "import os\nfor n in range(3, 64):\n    try: os.write(n, b'731415926')\n"
    "    except OSError: pass\nos._exit(0)",
    "writes results on exit": "import atexit, os\n"
    'def write():\n    for n in range(64):\n        try: os.write(n, b\'[2, [["ended", "731415926"]]]\')\n'
    "        except OSError: pass\natexit.register(write)\nraise SystemExit(0)",
    "reads files": FILES + "read('SECRET')",
    "searches its process": FIND + "import gc\nfound = repr([o for o in gc.get_objects() if type(o) in (dict, list)])\n"
    "frame = sys._getframe()\nwhile frame := frame.f_back: found += repr(frame.f_locals)\ndef f(): return find(found)",
    "reads its environment": FILES + "read('/proc/self/environ')\nseen += repr(os.environ)",
    "reads its parents' memory": FIND + "pid, f = os.getppid(), lambda: 0\nwhile pid:\n    try:\n"
    "        maps = open(f'/proc/{pid}/maps').read()\n        start = int(maps.partition('-')[0], 16)\n"
    "        with open(f'/proc/{pid}/mem', 'rb') as memory:\n            memory.seek(start)\n"
    f"            memory.read(9)\n        f = lambda: 731_415_926\n    except OSError: pass\n{UP}",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_program_that_cheats_gets_nothing(
    cheat: str, system: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if system != "namespaces" and os.getuid() != 0 and "parents" in cheat:
        pytest.skip("the processes of one user see each other")
    monkeypatch.setenv("SECRET", str(ANSWER))
    secret = tmp_path / "secret"
    secret.write_text(str(ANSWER))
    secret.chmod(0o600 if os.getuid() == 0 else 0)
    code = block(CHEATS[cheat].replace("SECRET", str(secret)))
    result = scored(code, [{"call": "f()", "result": ANSWER}])
    assert (result.score, result.breakdown["passed"]) == (0, 0)


# What a program leaves behind has this in its command line, so that the test finds it.
MARK = f"sandbox_mark_{os.getpid()}"
FAR = (
    "import subprocess, sys, os\n"
    f"os.fork() or os.setsid() or os.fork() or os.execv('/bin/sh', ['sh', '-c', 'while :; do :; done', '{MARK}'])\n"
)
EXHAUSTING = {
    "an endless loop": (
        "import signal\nfor n in set(signal.valid_signals()) - {9, 19}: signal.signal(n, 1)\nwhile 1: pass",
        "timeout",
    ),
    "endless output": ("while True: print('x' * 9999)", "error"),
    "a deep result": ("def f():\n    x = []\n    for _ in range(900): x = [x]\n    return x", "error"),
    "huge memory": ("x = bytearray(10**10)", "memory"),
    "huge files": ("with open('x', 'wb') as file:\n    while True: file.write(bytes(10**6))", "error"),
    "a deep folder": ("import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')", "wrong"),
    "a fork bomb": (f"import os\nwhile True:\n    try: os.fork()\n    except OSError: pass  # {MARK}", "timeout"),
    "a far child": (FAR + "raise SystemExit(0)", "wrong"),
    "a far child and a time-out": (FAR + "while True: pass", "timeout"),
    "a killed parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nwhile True: pass", "?"),
    "a stopped self": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
}


@pytest.mark.parametrize("what", EXHAUSTING)
def test_a_program_that_takes_too_much_is_ended_with_all_that_it_started(
    what: str, system: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if system != "namespaces" and os.getuid() != 0 and what == "a killed parent":
        pytest.skip("the processes of one user end each other")
    script = tmp_path / "sandbox_mark.py"  # a name by which what is left is found
    shutil.copy(sandbox.__file__, script)
    monkeypatch.setattr(sandbox, "__file__", str(script))
    # A disk may take seconds for a thousand folders.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        code, end = EXHAUSTING[what]
        tests = [{"call": "f()", "result": 1}] if "def f" in code else [{"input": "", "output": "1"}]
        begun = time.monotonic()
        timeout = 0.3 if end in ("timeout", "?") else 10
        result = scored(block(code), tests, case_timeout=timeout, memory=512)
        assert time.monotonic() - begun < 10
        assert not os.listdir(folder)
    assert result.score == 0
    assert end in (result.breakdown["ended"], "?")
    assert not processes(str(script))


@linux
def test_code_ends_with_the_process_that_had_it_started(system: str, tmp_path: Path) -> None:
    script = shutil.copy(sandbox.__file__, tmp_path / "sandbox_mark.py")
    case = {"input": "", "call": ""}
    task = {"language": "python", "site": [], "case_timeout": 60, "total_timeout": 60, "memory": 512, "cases": [case]}
    task |= {"code": FAR + "print(1, flush=True)\nwhile True: pass", "namespaces": sandbox.NAMESPACE_FLAGS}
    with subprocess.Popen(
        [sys.executable, "-I", "-S", script], stdin=subprocess.PIPE, cwd=tmp_path, text=True, start_new_session=True
    ) as launcher:
        print(json.dumps(task), end="", file=launcher.stdin, flush=True)
        launcher.stdin.close()
        while not (answer := tmp_path / "answer").exists() or not answer.stat().st_size:
            time.sleep(0.02)
        launcher.terminate()
    deadline = time.monotonic() + 10
    while (left := processes(str(script))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def processes(*marks: str) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if any(mark in line for mark in (*marks, MARK))]


def test_many_are_scored_at_a_time_and_a_sandbox_that_cannot_start_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores() -> Any:
        with Scorer(CodeReward(), max_concurrency=4) as scorer:
            session = scorer.start(6)
            for n in range(6):
                session.submit(
                    n, [Turn("assistant", block(f"print({n} % 2)"))], {"tests": [{"input": "", "output": 1}]}
                )
            return session.collect()

    assert scores().totals_N.tolist() == [0, 1] * 3
    monkeypatch.setattr(sandbox, "__file__", "/nowhere/sandbox.py")
    assert failure_counts(scores()) == {"reward_failures/code/RewardError": 6}


def test_what_the_system_refuses_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sandbox, "NAMESPACE_FLAGS", 1)
    tell_once.cache_clear()
    for _ in range(2):
        scored(block("print(3)"), SUM)
    assert [record.message for record in caplog.records] == [
        "the system refuses namespaces to code: docs/rewards.md says from what it is not kept then"
    ]


def test_the_documented_config_scores_its_rows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text().partition("## Code\n")[2]
    config = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    (reward,) = config["model"]["reward"]
    programs = ["print(sum(map(int, input().split())))", "def add(a, b):\n    return a + b"]
    for row, program in zip(config["data"]["train"][0]["rows"], programs, strict=True):
        assert CodeReward(**reward["init_args"]).compute_reward([Turn("assistant", block(program))], row).score == 1


@pytest.mark.parametrize("options", [{"language": "perl"}, {"case_timeout": 0}, {"memory": 1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"perl|case_timeout|memory"):
        CodeReward(**options)
