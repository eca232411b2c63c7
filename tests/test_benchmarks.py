"""The benchmarks take minutes and are run by hand: what breaks them without a sound is found here."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from stateset_lightning.environments.tool_calls import Call, find_calls

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GPU_CHECK = BENCHMARKS / "gpu" / "check.sh"


def test_benchmarks_find_what_they_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for path in sorted(BENCHMARKS.glob("*.py")):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
        runpy.run_path(str(path), run_name="imported")


@pytest.mark.parametrize("task", ["tools", "class"])
def test_our_side_of_conversations_trains_a_model_that_was_taught_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    conversations = runpy.run_path(str(BENCHMARKS / "conversations.py"))
    maker = sys.modules["make_tool_model"]
    tokenizer = maker.make_tokenizer(maker.SENTENCES, [*maker.SPECIAL_TOKENS, "<|tool|>"], maker.CHAT_TEMPLATE)
    maker.make_model(tokenizer, 32, 32, 128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    conversations["save_model"](tmp_path, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    function = {"name": "multiply", "arguments": {"a": 12, "b": 34}}
    said = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    text = tokenizer.apply_chat_template([said], tokenize=False).removeprefix("<|assistant|>").removesuffix("<|end|>")
    assert find_calls(text, tokenizer) == [Call(**function)]
    rows = [{"prompt": f"What is {a} * 34?", "target": str(34 * a)} for a in range(12, 28)]
    conversations["run_ours"].__globals__.update(NUM_PROMPTS=2, MAX_TOKENS=16)
    found = conversations["run_ours"](tmp_path / "ours", rows, task, 2, 1)
    assert [len(found[name]) for name in ("rewards", "calls", "cpu_s", "wall_s")] == [2] * 4


def test_what_a_curve_starts_from_is_made_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    learning = runpy.run_path(str(BENCHMARKS / "learning.py"))
    runs = list(learning["all_runs"]([1, 2]))
    chosen = [run for run in runs if run.name == "distilled: GKD" and run.seed == 2]
    names = ["six GRPO", "distilled: the student's start", "distilled: GKD"]
    assert [(run.name, run.seed) for run in learning["with_starts"](runs, chosen)] == [(name, 2) for name in names]


def test_each_mutant_changes_one_place() -> None:
    for mutant in runpy.run_path(str(BENCHMARKS / "mutants.py"))["MUTANTS"]:
        text = (BENCHMARKS.parent / "stateset_lightning" / mutant.file).read_text()
        assert text.count(mutant.old) == 1, mutant


IMPORT_ALL = """
import importlib, pathlib, sys
folder = pathlib.Path(sys.argv[1])
sys.path[:0] = [str(folder), str(folder.parent), str(folder.parents[1] / "tests")]
for path in sorted(folder.glob("*.py")):
    importlib.import_module(path.stem)
"""


@pytest.mark.slow  # a fresh interpreter imports torch and Lightning
def test_the_gpu_check_finds_what_it_imports() -> None:
    """In a process of its own: the stand-in for CUDA is registered with PyTorch for good."""
    program = [sys.executable, "-c", IMPORT_ALL, str(BENCHMARKS / "gpu")]
    run = subprocess.run(program, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_gpu_check_that_fails_is_said_and_ends_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"GPU_CHECK_DEVICE": "cpu", "GPU_CHECK_SECONDS": "50", "OUT": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    harness = runpy.run_path(str(BENCHMARKS / "gpu" / "harness.py"))
    check, exit_status = harness["check"], harness["exit_status"]

    def fails() -> str:
        raise AssertionError("one is not two")

    def breaks() -> str:
        raise KeyError("a")

    check("good", lambda: "seen")
    check("late", lambda: "never", seconds=100)
    assert exit_status() == 0
    check("bad", fails)
    check("broken", breaks)
    check("next", lambda: None)
    assert exit_status() == 1
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    states = {"good": "ok", "late": "SKIP", "bad": "FAIL", "broken": "ERROR", "next": "ok"}
    assert {row["check"]: row["state"] for row in rows} == states
    printed = capsys.readouterr().out
    assert "failed: bad; broken" in printed
    assert "one is not two" in printed
    assert "KeyError: 'a'" in (tmp_path / "errors.txt").read_text()


@pytest.mark.parametrize("status", [0, 1])
def test_the_gpu_rehearsal_ends_as_its_parts_do(tmp_path: Path, status: int) -> None:
    """Every part runs, also after one that failed."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "part $(basename "$1")"\ncase $1 in *stand_in.py) exit {status};; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path)}
    run = subprocess.run([GPU_CHECK, "rehearse"], capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == status, run.stdout + run.stderr
    parts = [line.removeprefix("part ") for line in run.stdout.splitlines() if line.startswith("part ")]
    both = ["speed.py", "peer_trl.py"]
    assert parts == ["exactness.py", "stand_in.py", "checks.py", *both, *both, "speed.py", "speed.py"]
    assert (tmp_path / "log.txt").read_text() == run.stdout


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        (["speed"], [234, 234, 234, 234]),
        (["--minutes", "5", "speed"], [114] * 4),
        (["checks", "--minutes", "3"], [165]),
    ],
)
def test_the_gpu_check_has_the_minutes_that_are_asked_for(
    tmp_path: Path, arguments: list[str], seconds: list[int]
) -> None:
    """A quarter of a minute is kept back, and no shape's steps take most of the time."""
    for name, text in {"python": 'echo "part $(basename "$1") $GPU_CHECK_SECONDS"', "nvidia-smi": "true"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path), "PATH": path}
    command = [GPU_CHECK, *arguments, "--shapes", "1x2:3/4 5x6:7/8"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    found = [int(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("part ")]
    assert found[: len(seconds)] == pytest.approx(seconds, abs=5)


@pytest.mark.parametrize("arguments", [["--minutes", "soon"], ["--minutes"], ["fast"], ["--baseline", "missing.jsonl"]])
def test_the_gpu_check_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    run = subprocess.run([GPU_CHECK, *arguments], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr


RESULTS = [
    {"machine": "a card", "date": "2026-01-02", "versions": {"torch": "2.11", "vllm": "none"}},
    {"check": "good", "state": "ok"},
    {"check": "late", "state": "SKIP"},
    {"note": "Something is missing here"},
    {"ceiling": "bf16 products", "tflops": 700.0},
    {"ceiling": "copy", "gigabytes_per_s": 3000.0},
    {"train": "one shape: as it is", "shape": "64x8:512/512", "seconds": 0.3, "tflops": 210.0, "peak": 24.0},
    {"sample": "engine graph", "rows": 8, "tokens": 10, "steps": 10, "seconds": 0.04, "gigabytes_per_s": 600.0},
    {"step": "ours", "shape": "64x8:512/512", "index": 0, "seconds": 14.0, "sampling": 7.0, "peak": 20.0},
    {"step": "ours", "shape": "64x8:512/512", "index": 1, "seconds": 12.0, "sampling": 6.0, "peak": 20.0},
    {"step": "TRL, generate", "shape": "64x8:512/512", "index": 1, "seconds": 48.0, "peak": 40.0},
    {"step": "TRL, vllm", "shape": "64x8:512/512", "index": 0, "seconds": 10.0, "peak": 40.0},
]
TABLE = """\
2026-01-02, a card; torch 2.11.

| step of | by | seconds | of them sampling | peak GiB | TRL's time / ours | our memory / TRL's |
| --- | --- | --- | --- | --- | --- | --- |
| 64x8:512/512 | ours | 12 | 6 | 20 | 4 | 0.5 |
| 64x8:512/512 | TRL, generate | 48 |  | 40 |  |  |
| 64x8:512/512 | TRL, vllm (its first step) | 10 |  | 40 |  |  |

| against what was wanted of an H100 | wanted | measured |
| --- | --- | --- |
| TRL's time / ours, 64x8:512/512 | 2 | 4 |
| our memory / TRL's, 64x8:512/512 | 0.5 | 0.5 |
| share of the bfloat16 peak, micro-step 64x8:512/512, one shape: as it is | 0.4 | 0.3 |
| share of the memory's speed, decoding, 8 rows x 10 tokens, engine graph | 0.6 | 0.2 |

| measured | ms | TFLOP/s | GB/s | peak GiB |
| --- | --- | --- | --- | --- |
| ceiling: bf16 products |  | 700 |  |  |
| ceiling: copy |  |  | 3,000 |  |
| micro-step 64x8:512/512, one shape: as it is | 300 | 210 |  | 24 |
| decoding, 8 rows x 10 tokens, engine graph | 4 |  | 600 |  |

Before: 2026-01-01, a card; torch 2.11. 2 of 7 measurements are in both.

| measured | before | now | now / before |
| --- | --- | --- | --- |
| ceiling: bf16 products, tflops | 350 | 700 | 2 |
| step 64x8:512/512, ours, seconds | 16 | 12 | 0.75 |

Checks passed: 1.
Not run for lack of time: late.
Something is missing here.
"""


def test_results_of_the_gpu_check_become_tables_beside_those_of_before(tmp_path: Path) -> None:
    older = [{**RESULTS[0], "date": "2026-01-01"}, {**RESULTS[4], "tflops": 350.0}, {**RESULTS[9], "seconds": 16.0}]
    for name, rows in (("new", RESULTS), ("old", older)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = [sys.executable, str(BENCHMARKS / "gpu" / "table.py"), "new", "--baseline", "old"]
    run = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert run.stdout == TABLE, run.stderr


@pytest.mark.long  # three runs of the command line, and they wait
def test_waiting_conversations_take_their_wait_and_no_more_memory_than_doctor_says() -> None:
    program = [sys.executable, str(BENCHMARKS / "waiting_conversations.py"), "--quick"]
    run = subprocess.run(program, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert "| async |" in run.stdout
