"""Every command and snippet of the README and the docs is run, and every link leads somewhere."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stateset_lightning.cli.main import main
from stateset_lightning.data import read_split

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "SECURITY.md",
    *sorted((ROOT / "examples").glob("**/README.md")),
]
README = (ROOT / "README.md").read_text()
MY_REWARDS = """
from stateset_lightning.rewards import RewardFunction
def is_polite(completion): return "please" in completion
def compute_score(solution_str, ground_truth): return float(solution_str == ground_truth)
class Brevity(RewardFunction):
    def compute_reward(self, turns, context=None): return -float(len(turns[-1].content))
"""


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("stateset-lightning")]


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags that keep a README command short and its files away."""
    monkeypatch.chdir(ROOT)
    rows = [{"prompt": f"What is {a} + 2?", "target": str(a + 2)} for a in range(4)]
    (tmp_path / "my_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--trainer.max_steps=1",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--data.batch_size=2",
        "--data.eval_batch_size=64",
    ]


@pytest.mark.slow  # each one starts a run
@pytest.mark.parametrize("command", commands())
def test_each_command_of_the_readme_runs(
    command: str, small_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = shlex.split(command)[1:]
    # Stand-ins for what a reader brings along: rows, and a model that no hub is needed for.
    args = [{"my_rows.jsonl": str(tmp_path / "my_rows.jsonl"), "Qwen/Qwen3-0.6B": "tiny"}.get(arg, arg) for arg in args]
    if "--print_config" in args or args[0] == "doctor":
        with pytest.raises(SystemExit) as exit_:
            main(args if args[0] != "doctor" else [*args, *small_run])
        assert exit_.value.code == 0
        if args[0] == "doctor":
            assert "no contradictions: the run can start" in capsys.readouterr().out
            return
        assert yaml.safe_load(capsys.readouterr().out)["data"]["batch_size"] == 32
        return
    if args[0] == "report":
        main(["fit", "--config", "configs/single_turn.yaml", *small_run])
        main(["report", str(tmp_path / "single_turn" / "version_0")])
        page = (tmp_path / "single_turn" / "version_0" / "report.html").read_text()
        assert "<title>single_turn/version_0" in page
        assert "What is" in page  # a prompt
        return
    cli = main([*args, *small_run])
    assert cli is not None
    assert cli.trainer.state.finished
    if args[0] == "predict":
        (predictions,) = tmp_path.rglob("predictions.jsonl")
        assert len(predictions.read_text().splitlines()) == 256


def test_each_python_block_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    reward, training = blocks("python")
    namespace: dict[str, Any] = {}
    exec(reward, namespace)
    turn = {"content": "4"}
    result = namespace["ShortAndRight"]().compute_reward([type("Turn", (), turn)], {"target": "4"})
    assert result.score == pytest.approx(0.99)
    exec(training, namespace)
    assert namespace["trainer"].global_step == 3


@pytest.mark.slow  # five runs, of a step each
def test_a_good_start_leads_from_targets_to_samples_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/good-start.md").read_text().replace("\\\n", "")
    small = ["--data.batch_size=4", "--trainer.limit_val_batches=0", "--baseline=false"]
    steps = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", text, flags=re.DOTALL):
        if language == "python":
            exec(block, {})
        for command in block.splitlines() if language == "bash" else []:
            args = shlex.split(command)[1:]
            # a run that goes on makes one more step
            short = [*small, f"--trainer.max_steps={2 if '--ckpt_path' in args else 1}"] if args[0] == "fit" else []
            cli = main([*args, *short])
            steps += [cli.trainer.global_step] if cli is not None else []
    assert steps == [1, 1, 2, 1, 1]
    chosen = [json.loads(line) for line in Path("chosen.jsonl").read_text().splitlines()]
    assert chosen
    right = [json.loads(line) for line in Path("examples/arithmetic/train.jsonl").read_text().splitlines()]
    assert {row["prompt"]: row["target"] for row in chosen}.items() <= {r["prompt"]: r["target"] for r in right}.items()
    samples = [json.loads(line) for line in Path("runs/chosen/version_0/samples.jsonl").read_text().splitlines()]
    assert {row["completion"] for row in samples} <= {row["target"] for row in chosen}


def test_python_blocks_about_data_run() -> None:
    pytest.importorskip("datasets")
    namespace: dict[str, Any] = {}
    for block in blocks("python", (ROOT / "docs/data.md").read_text()):
        exec(block, namespace)


def test_the_json_row_of_the_readme_is_a_scenario() -> None:
    rows = [json.loads(block) for block in blocks("json")]
    assert read_split(rows, "train").scenarios[0].target == "4"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_yaml_blocks_name_existing_keys(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(tmp_path)  # a reader's own rewards
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    for number, block in enumerate(blocks("yaml", page.read_text())):
        overlay = tmp_path / f"{number}.yaml"
        overlay.write_text(block)
        with pytest.raises(SystemExit) as exit_:
            main(["fit", "--config", "configs/single_turn.yaml", "--config", str(overlay), "--print_config"])
        assert exit_.value.code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """Inside the text; a command may name files of the reader's."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    places = (ROOT, page.parent, ROOT / "stateset_lightning")
    for name in re.findall(r"`([\w.-]+/[\w/.-]+\.(?:py|yaml|md|sh))`", text):
        assert any((place / name).exists() for place in places), name


FOLDERS = [ROOT / "configs", ROOT / "examples", ROOT / "docs"]


@pytest.mark.parametrize("folder", [ROOT / "README.md", *FOLDERS], ids=lambda folder: folder.name)
def test_no_file_outside_the_repository_is_named(folder: Path) -> None:
    """A reader has none of them. Links of a page into the repository are relative to the page."""
    for file in (
        [folder]
        if folder.is_file()
        else [file for file in folder.rglob("*.*") if file.suffix not in (".png", ".safetensors")]
    ):
        text = re.sub(r"\]\([^)]+\)", "", file.read_text()) if file.suffix == ".md" else file.read_text()
        assert "../" not in text, file


@pytest.mark.parametrize(
    ("page", "after", "column"),
    [("docs/reliability.md", "## Faults", 4), ("SECURITY.md", "## What is promised", 2)],
    ids=["faults", "promises"],
)
def test_every_fault_and_promise_names_tests_that_exist(page: str, after: str, column: int) -> None:
    rows = re.findall(r"^\| .* \|$", (ROOT / page).read_text().partition(after)[2], flags=re.MULTILINE)
    rows = [row for row in rows if not row.startswith(("| fault", "| promise"))]
    tests = set(
        re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py")))
    )
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[column])
        assert named, row
        assert set(named) <= tests, row


def test_every_cure_names_a_test_or_a_measurement() -> None:
    rows = re.findall(r"^\| .* \|$", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    tests = set(
        re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py")))
    )
    cures = [row for row in rows if not row.startswith("| symptom")]
    assert len(cures) > 15
    for row in cures:
        checked = row.split("|")[4]
        assert set(re.findall(r"`(test_\w+)`", checked)) & tests or "[measured](" in checked, row


@pytest.mark.slow  # starts a process that imports torch and lightning
def test_an_example_runs_as_a_program() -> None:
    program = [sys.executable, ROOT / "examples" / "train_from_python.py", "2"]
    run = subprocess.run(program, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "reward" in run.stdout


@pytest.mark.parametrize("name", sorted({file.name for file in ROOT.glob("examples/*.py")} - {"train_from_python.py"}))
def test_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, without those imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as Python does for a program's own folder
    monkeypatch.setattr(sys, "argv", [name, "2"])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert "reward" in capsys.readouterr().out


def test_the_tables_of_what_to_expect_are_those_that_are_computed() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from scaling_estimate import MODELS, choice_table, memory_table, traffic_table

    page = (ROOT / "docs" / "scaling.md").read_text()
    assert choice_table() in page
    assert memory_table() in page
    assert traffic_table() in page
    # Parameters of Qwen2.5-1.5B, Llama-3.1-8B, Qwen2.5-32B and Llama-3.1-70B, as their model cards give them.
    published = [1.54e9, 8.03e9, 32.8e9, 70.6e9]
    assert [model.parameters for model in MODELS] == [pytest.approx(count, rel=0.003) for count in published]
