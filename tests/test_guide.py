"""The guide's promises: every section and code block of it has a counterpart in docs/from-the-guide.md, which runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from guide_yaml import GUIDE as GUIDE_YAML

from stateset_lightning.cli.convert import convert
from stateset_lightning.cli.main import main

ROOT = Path(__file__).parents[1]
GUIDE = ROOT.parent / "shared" / "guide" / "single_turn_training_guide.md"
PAGE = (ROOT / "docs" / "from-the-guide.md").read_text()
FROM_TRL = (ROOT / "docs" / "from-trl.md").read_text()


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """Heading -> what follows it, up to the next one; code blocks may hold lines that begin with #."""
    parts = re.split(r"^##+ (.+)$", re.sub(r"^#(?=.*$)", "#", text, flags=re.MULTILINE), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture
def guide() -> str:
    if not GUIDE.exists():
        pytest.skip("the guide is not beside this checkout")
    return GUIDE.read_text()


def run_python_blocks(text: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    for block in blocks("python", text):
        exec(block, namespace)
    return namespace


def test_every_section_of_the_guide_has_one_and_every_code_block_a_counterpart(guide: str) -> None:
    ours = sections(PAGE)
    for heading, content in sections(guide).items():
        assert heading in ours
        runnable = [block for language in ("python", "yaml", "bash") for block in blocks(language, ours[heading])]
        assert len(runnable) >= content.count("```") // 2, heading


def test_what_is_quoted_stands_in_the_guide(guide: str) -> None:
    for block in blocks("py", PAGE) + blocks("yml", PAGE):
        assert block.strip("\n") in guide
    for name in ("CustomSingleTurnReward", "TrainingCallback"):  # run unchanged
        source = re.search(rf"class {name}.*?(?=\n\w)", guide, flags=re.DOTALL)
        assert source is not None
        assert source[0].strip() in PAGE


def test_the_guides_yaml_is_the_one_that_the_tests_convert(guide: str) -> None:
    assert blocks("yaml", guide) == [GUIDE_YAML]


@pytest.mark.slow  # four short trainings, one of them with the process of W&B
def test_the_snippets_run(tmp_path: Path, wandb_here: None, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = run_python_blocks(PAGE)
    assert (tmp_path / "checkpoints" / "single_turn_model.ckpt").exists()
    assert (tmp_path / "checkpoints" / "single_turn_model" / "config.json").exists()
    said = capsys.readouterr().out
    assert re.search(r"Starting episode 0\nEpisode 0 complete: .*'train/reward': ", said)
    wandb.finish()  # as the end of a process does
    assert list((tmp_path / "runs").rglob("*.wandb"))
    assert namespace["trainer"].global_step == 2


def test_the_converted_example_is_the_one_shown() -> None:
    shown = [
        yaml.safe_load(block) for block in blocks("yaml", sections(PAGE)["Example Config (single_turn_config.yaml)"])
    ]
    assert shown == [convert(yaml.safe_load(GUIDE_YAML))[0]]


def test_the_trl_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run_python_blocks(FROM_TRL)
    assert namespace["trainer"].global_step == 2
    records = namespace["module"].last_records
    assert {tuple(record["rewards"]) for record in records} == {("right", "brief")}
    for record in records:
        assert record["rewards"]["brief"] == pytest.approx(-0.01 * len(record["completion"]))
        assert record["reward"] == pytest.approx(record["rewards"]["right"] + 0.5 * record["rewards"]["brief"])


def test_every_key_of_trls_config_is_mapped() -> None:
    trl = pytest.importorskip("trl")
    own = set(trl.GRPOConfig.__annotations__) & {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.+?) \|", FROM_TRL, flags=re.MULTILINE))))
    assert len(own) > 70
    assert own <= named, own - named


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "single_turn_config.yaml").write_text(GUIDE_YAML)
    short = [
        "--model.policy.model_name=tiny",
        "--model.rollout.max_new_tokens=4",
        "--trainer.max_steps=1",
        "--trainer.accelerator=cpu",
    ]
    (commands,) = blocks("bash", PAGE)
    for line in commands.splitlines():
        words = line.split()[1:]
        cli = main(words + short * (words[0] == "fit"))
    assert cli is not None
    assert cli.trainer.global_step == 1
