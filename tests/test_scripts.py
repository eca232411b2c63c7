"""The scripts of a checkout: the demo's data, the bundled tokenizer, the list of tests that may be skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import arithmetic  # noqa: E402
import check_skips  # noqa: E402
import make_tiny  # noqa: E402
import make_tool_model  # noqa: E402

from stateset_lightning.tiny import TINY_FOLDER  # noqa: E402


def test_arithmetic_writes_the_demos_scenarios(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, ROOT / "scripts" / "arithmetic.py", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "examples" / "arithmetic" / name).read_bytes()


def test_every_question_belongs_to_one_split() -> None:
    splits = [arithmetic.split_questions(name) for name in ("pretrain", "train", "validation")]
    questions = [question for split in splits for question in split]
    assert len(questions) == len(set(questions)) == 10_000 + 5_050
    assert [len(split) for split in splits[1:]] == [2048, 256]


@pytest.mark.parametrize(
    ("question", "keep_hundreds", "answer"),
    [
        ((12, "+", 34), False, "46"),
        ((19, "+", 23), False, "32"),  # the carry is forgotten
        ((80, "+", 45), True, "125"),
        ((80, "+", 45), False, "25"),
        ((52, "-", 37), False, "25"),  # 5 - 3, and 7 - 2
    ],
)
def test_a_careless_answer_forgets_the_carry(question: tuple[int, str, int], keep_hundreds: bool, answer: str) -> None:
    assert arithmetic.careless_answer(question, keep_hundreds) == answer


def test_the_bundled_tokenizer_is_the_one_that_is_made() -> None:
    made = json.loads(make_tiny.make_tokenizer().backend_tokenizer.to_str())
    bundled = json.loads((TINY_FOLDER / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == bundled["model"]["vocab"]
    assert [tuple(merge) for merge in made["model"]["merges"]] == [tuple(m) for m in bundled["model"]["merges"]]


SKIPPING = """
import pytest

@pytest.mark.parametrize("n", [1, 2])
def test_listed(n): pytest.skip("no device")

@pytest.mark.skip(reason="forgotten")
def test_unlisted(): ...

@pytest.mark.xfail
def test_fails(): assert False

def test_runs(): ...
"""


def test_skips_that_are_not_those_of_the_list_are_named(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(SKIPPING)
    (tmp_path / "tests" / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", "--junitxml=report.xml"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    skipped = check_skips.skipped_tests(tmp_path / "report.xml")
    listed = check_skips.listed_tests(
        "# test\nno_gpu | tests/test_some.py::test_listed | why\nno_gpu | tests/test_some.py::test_runs | why\n"
        "is_root | tests/test_some.py::test_unlisted | another machine\n",
        {"no_gpu": True, "is_root": False},
    )
    module, unlisted, ran = check_skips.differences(skipped, listed)
    assert module.startswith("tests/test_module.py was skipped and is not listed for this machine: ")
    assert "could not import 'no_such_module'" in module
    assert unlisted.startswith("tests/test_some.py::test_unlisted was skipped and is not listed for this machine: ")
    assert unlisted.endswith(": forgotten")
    assert ran == "tests/test_some.py::test_runs is listed as skipped on this machine and was not"
    assert check_skips.differences(skipped, {*skipped}) == []


@pytest.mark.parametrize("line", ["no_gpu | tests/test_some.py::test_x", "no_gpu | x | ", "sometimes | x | why"])
def test_a_line_that_says_no_reason_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="is not `condition"):
        check_skips.listed_tests(line, {"no_gpu": True})


def test_the_list_is_readable_and_names_tests_that_exist() -> None:
    conditions = dict.fromkeys(check_skips.conditions_here(), True)
    for test in check_skips.listed_tests((ROOT / "tests" / "skips.txt").read_text(), conditions):
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), test


def test_what_is_said_to_run_on_a_gpu_is_run_there() -> None:
    checks = (ROOT / "benchmarks" / "gpu" / "checks.py").read_text()
    conditions = {**dict.fromkeys(check_skips.conditions_here(), False), "no_gpu": True}
    listed = check_skips.listed_tests((ROOT / "tests" / "skips.txt").read_text(), conditions)
    assert listed
    for test in listed:
        assert f'"{test.partition("::")[0]}",' in checks, test


def test_the_tool_models_questions_are_apart_and_its_careless_products_are_wrong() -> None:
    splits = [set(make_tool_model.questions(split)) for split in ("pretrain", "train", "validation")]
    assert [len(split) for split in splits] == [len(make_tool_model.NUMBERS) ** 2 - 1280, 1024, 256]
    assert not splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2]
    assert all(make_tool_model.careless(a, b) != a * b for split in splits for a, b in split)


def test_the_tool_models_questions_are_those_of_the_example() -> None:
    for split in ("train", "validation"):
        rows = map(json.loads, (ROOT / "examples" / "calculator" / f"{split}.jsonl").read_text().splitlines())
        asked = [(row["prompt"], row["target"]) for row in rows]
        assert asked == [(f"What is {a} * {b}?", str(a * b)) for a, b in make_tool_model.questions(split)]


def test_the_tool_model_is_taught_what_it_says_and_not_what_the_tool_says() -> None:
    special = [*make_tool_model.SPECIAL_TOKENS, "<|tool|>"]
    tokenizer = make_tool_model.make_tokenizer(make_tool_model.SENTENCES, special, make_tool_model.CHAT_TEMPLATE)
    ids, labels = make_tool_model.encode(tokenizer, 37, 86, calls=True)
    prompt = "<|system|>multiply(a, b)<|end|><|user|>What is 37 * 86?<|end|><|assistant|>"
    call = '<tool_call>{"name": "multiply", "arguments": {"a": 37, "b": 86}}</tool_call><|end|>'
    assert tokenizer.decode(ids) == f"{prompt}{call}<|tool|>3182<|end|><|assistant|>It is 3182<|end|>"
    assert tokenizer.decode([label for label in labels if label != -100]) == f"{call}It is 3182<|end|>"
