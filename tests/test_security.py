"""What SECURITY.md promises: no data, config or model file runs code. Secrets: `test_redaction.py`."""

import sys
from pathlib import Path

import pytest

from stateset_lightning.cli.main import main
from stateset_lightning.data import read_split
from stateset_lightning.errors import DataError
from stateset_lightning.policy import PolicyConfig

TAGS = [
    '!!python/object/apply:os.system ["touch hacked"]',
    '!!python/object/new:os.system ["touch hacked"]',
    "!!python/name:os.system ''",
]
GOOD = "model: {policy: {model_name: tiny}, reward: stateset_lightning.rewards.ExactMatch}\n"


@pytest.mark.parametrize("tag", TAGS)
def test_a_scenario_file_runs_no_code(tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.yaml").write_text(f"- prompt: {tag}\n")
    with pytest.raises(DataError, match="malformed YAML"):
        read_split("rows.yaml", "train")
    Path("rows.jsonl").write_text('{"prompt": "a", "target": "__import__(\'os\').system(\'touch hacked\')"}\n')
    assert read_split("rows.jsonl", "train").scenarios[0].target.startswith("__import__")
    assert not Path("hacked").exists()


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    "key", ["data: {system_prompt: %s}", "trainer: {default_root_dir: %s}", "data: {chat_template_kwargs: {a: %s}}"]
)
def test_a_config_runs_no_code(tag, key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    Path("c.yaml").write_text(GOOD + key % tag + "\n")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "c.yaml"])
    assert stopped.value.code == 2
    assert "c.yaml:2: malformed YAML" in capsys.readouterr().err
    assert not Path("hacked").exists()


def test_a_flag_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    flags = ["--model.policy.model_name=tiny", "--model.reward=stateset_lightning.rewards.ExactMatch"]
    for key in ("data.chat_template_kwargs", "data.system_prompt", "data.train"):
        with pytest.raises(SystemExit):
            main(["fit", *flags, f'--{key}={{"a": {TAGS[0]}}}'])
    assert not Path("hacked").exists()


def test_a_bomb_of_aliases_is_refused_quickly(tmp_path):
    lines = ["- a: &a [x, x, x, x, x, x, x, x, x]", "  prompt: x"]
    lines += [
        f"  {new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
    ]
    lines += ["- prompt: *l", "- messages: *l", "- {prompt: y, id: *l}"]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(DataError, match="3 rows cannot be used"):
        read_split(str(tmp_path / "bomb.yaml"), "train")
    rows = [{"prompt": _nested(40)}, {"prompt": "a", "context": _nested(40)}, {"messages": [_nested(40)]}]
    with pytest.raises(DataError, match="3 rows cannot be used"):
        read_split(rows, "train")


def _nested(depth):
    value = ["x"] * 9
    for _ in range(depth):
        value = [value] * 9  # 9 ** 40 items, should anybody write them out
    return value


def test_code_of_the_hub_needs_a_flag():
    assert PolicyConfig("tiny").trust_remote_code is False


def test_no_reward_of_the_package_runs_code():
    """Should one be added, it belongs into a process with limits, and `SECURITY.md` has to say so."""
    for file in (Path(__file__).parents[1] / "stateset_lightning" / "rewards").glob("*.py"):
        text = file.read_text()
        assert not any(call in text for call in ("exec(", "eval(", "os.system(")), file
