"""What version 0.1 wrote is resumed, evaluated, tried and exported as it was then; `data/version_0_1/README.md` says
what is there.
"""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stateset_lightning.cli.main import main

FILES = Path(__file__).parent / "data" / "version_0_1"
EXPECTED = json.loads((FILES / "expected.json").read_text())
PROMPTS = [json.loads(line)["prompt"] for line in (FILES / "rows.jsonl").read_text().splitlines()]
TOLERANCE = 1e-6
"""Of weights: other machines round otherwise. A run that goes on from anything less than its whole state is off by 3e-5
and more.
"""

runs = pytest.mark.parametrize("name", EXPECTED)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder holds a copy of the files: runs go on in it."""
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])


def checkpoint(name: str) -> str:
    return f"{name}/version_0/checkpoints/middle.ckpt"


def run(*words: str) -> Any:
    cli = main(list(words))
    assert cli is not None
    return cli


def answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """The greedy completion of each prompt."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(prompt + "\n" for prompt in PROMPTS)))
    capsys.readouterr()
    main(["generate", "--device", "cpu", *words])
    return capsys.readouterr().out.splitlines()[-len(PROMPTS) :]


def exported(folder: str) -> dict[str, torch.Tensor]:
    """The weights of an exported folder: a whole model's, or an adapter's."""
    (file,) = Path(folder).glob("*.safetensors")
    return load_file(file)


def difference(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert mine.keys() == other.keys()
    return max(float((mine[name] - other[name]).abs().max()) for name in mine)


@runs
def test_a_run_goes_on_and_ends_as_it_did_uninterrupted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", checkpoint(name), "middle"])
    capsys.readouterr()
    cli = run("fit", "--config", f"{name}.yaml", "--ckpt_path", checkpoint(name))
    assert "the checkpoint does not say what its run was made of (version 0.1)" in capsys.readouterr().out
    assert cli.trainer.global_step == 5
    cli.trainer.save_checkpoint("end.ckpt")
    main(["export", "end.ckpt", "end"])
    assert difference(exported("end"), exported(f"exported/{name}")) < TOLERANCE
    assert difference(exported("end"), exported("middle")) > 1000 * TOLERANCE


@runs
def test_a_checkpoint_evaluates_as_it_did(name: str) -> None:
    words = ["--config", f"{name}/version_0/config.yaml", "--trainer.logger=false"]
    evaluated = run("validate", *words, "--ckpt_path", checkpoint(name))
    assert evaluated.trainer.callback_metrics["val/reward"] == pytest.approx(EXPECTED[name]["middle"]["reward"])


@runs
def test_a_checkpoint_answers_as_it_did_and_so_does_its_export(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answers(capsys, monkeypatch, "--ckpt_path", checkpoint(name)) == EXPECTED[name]["middle"]["answers"]
    main(["export", checkpoint(name), "middle", *(["--merge"] if name == "lora" else [])])
    told = ["--system_prompt", "Only digits.", "--max_new_tokens", "5"]
    assert answers(capsys, monkeypatch, "--ckpt_path", "middle", *told) == EXPECTED[name]["middle"]["answers"]
    card = Path("middle", "README.md").read_text()
    assert "`model`, trained by group-relative policy optimisation for 3 optimizer steps." in card
    assert "- system prompt: 'Only digits.'" in card


@runs
def test_an_exported_folder_is_a_model_as_it_was(name: str) -> None:
    option = (
        f"--model.policy.adapter=exported/{name}" if name == "lora" else f"--model.policy.model_name=exported/{name}"
    )
    evaluated = run("validate", "--config", f"{name}.yaml", "--trainer.logger=false", option)
    assert evaluated.trainer.callback_metrics["val/reward"] == pytest.approx(EXPECTED[name]["end"]["reward"])
