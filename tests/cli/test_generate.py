"""`generate`: prompts from a pipe and as a flag, conversations, messages with its own flags. Trained models:
test_export.py.
"""

import io
import json
import sys
from pathlib import Path

import pytest
import yaml
from cli_runs import CONFIG, start_in

from stateset_lightning.cli.main import main

WORDS = ["generate", "--device", "cpu", "--max_new_tokens", "1", "--ckpt_path"]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()


def test_in_a_pipe_blank_lines_are_skipped_and_end_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n1 + 1\n\n  \n2 + 2\r\n3 + 3"))
    main([*WORDS, "tiny"])
    assert len(capsys.readouterr().out.splitlines()[-3:]) == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    main([*WORDS, "tiny"])
    assert not [line for line in capsys.readouterr().out.splitlines() if not line.startswith("policy: ")]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second where no locale is set
def test_a_line_that_is_no_utf_8_is_refused_and_the_next_one_answered(errors, monkeypatch, capsys):
    piped = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n1 + 1\n"), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", piped)
    main([*WORDS, "tiny"])
    printed = capsys.readouterr()
    assert len([line for line in printed.out.splitlines() if not line.startswith("policy: ")]) == 1
    assert [line for line in printed.err.splitlines() if "error: " in line] == [
        "error: --prompt: 1 row cannot be used; correct or remove:"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "--prompt", "a", "--temperature", "0"], "error: --temperature=0.0 must be above 0"),
        (
            ["tiny", "--prompt", "1 " * 3000],
            "--max_new_tokens=1 exceed the model's 2048 positions: shorten the prompt to 2047 ",
        ),
        (["./nowhere", "--prompt", "a"], "ckpt_path=./nowhere: there is no such file or folder"),
        # The hub would be asked for these, for half a minute where there is none.
        (["out/model", "--prompt", "a"], "ckpt_path=out/model: there is no such file or folder"),
        (["runs/mine", "--prompt", "a"], "ckpt_path=runs/mine: there is no such file or folder"),
        (["weights.safetensors", "--prompt", "a"], "ckpt_path=weights.safetensors: there is no such file or folder"),
        (["last", "--prompt", "a"], "there is no checkpoint in runs/ yet: give a .ckpt file, or leave it out"),
    ],
)
def test_mistakes_are_told_in_a_line_with_the_flags_that_there_are(empty_folder, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        main([*WORDS, *words])
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert said in told[0]
    assert "model." not in told[0]


COUNTING = """
class Counts:
    '''Asks for the scenario's next sum, and gives 1 for each answer with a digit.'''

    def reset(self, scenario, seed):
        self.sums = list(scenario["sums"])

    def step(self, text):
        reward = float(any(character.isdigit() for character in text))
        return (f"What is {self.sums.pop(0)}?", reward, False) if self.sums else (None, reward, True)
"""
ROWS = [{"id": "a", "prompt": "What is 3 + 14?", "sums": ["5 + 9", "2 + 2"]}, {"prompt": "What is 6 + 7?", "sums": []}]


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A working folder with an environment, and what `test` and `predict` have written of it."""
    start_in(tmp_path, monkeypatch, CONFIG, 2)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "counting", raising=False)
    Path("counting.py").write_text(COUNTING)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = {"environment": {"factory": "counting.Counts"}, "reward": "stateset_lightning.rewards.EnvironmentReward"}
    model["rollout"] = {"max_new_tokens": 6}
    Path("counts.yaml").write_text(yaml.safe_dump({"model": model, "data": {"system_prompt": "Just the number."}}))
    words = ["--config", "config.yaml", "--config", "counts.yaml"]
    main(["test", *words, "--data.test", "rows.jsonl"])
    main(["predict", *words, "--data.predict", "rows.jsonl", "--predictions.path", "told.jsonl"])
    files = [*Path("out").rglob("samples.jsonl"), Path("told.jsonl")]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_a_conversation_is_played_as_evaluation_and_predictions_have_it(played, monkeypatch, capsys):
    evaluated, predicted = played
    assert [{**row, "split": "test", "step": 0} for row in predicted] == evaluated
    assert [row["num_turns"] for row in predicted] == [3, 1]
    for row in predicted:
        said = [f"[{turn['role']}] {turn['content']}" for turn in row["turns"]]
        assert said[0] == "[system] Just the number."
        assert "\n".join(said[2:]).removeprefix("[assistant] " if len(said) == 3 else "") == row["completion"]
        assert row["ended_by"] == "environment"
        assert (
            row["reward"]
            == row["environment_reward"]
            == sum(any(c.isdigit() for c in turn) for turn in said if "[ass" in turn)
        )
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(row) + "\n" for row in ROWS)))
    capsys.readouterr()
    main([*WORDS[:3], "--max_new_tokens", "6", "--ckpt_path", "tiny", "--config", "counts.yaml"])
    expected = []
    for row in predicted:
        expected += [f"[{turn['role']}] {turn['content']}" for turn in row["turns"]]
        end = ", ".join(f"{name}={row[name]}" for name in ("ended_by", "num_turns", "environment_reward"))
        expected.append(f"[end] {end}")
    assert capsys.readouterr().out.splitlines()[1:] == expected


def test_a_scripted_user_says_what_the_row_has_and_without_it_the_conversation_fails(tmp_path, capsys):
    (tmp_path / "scripts.yaml").write_text("model: {environment: {max_turns: 3}}")
    words = [*WORDS, "tiny", "--config", str(tmp_path / "scripts.yaml"), "--samples", "2", "--max_new_tokens", "6"]
    main([*words, "--prompt", json.dumps({"user_responses": ["What is 3 + 4?", "And 5 + 6?"]})])
    first, *others = capsys.readouterr().out.partition("[1] ")[2].split("[2] ")
    for said in (first, others[0]):
        roles = [line.split()[0] for line in said.splitlines()]
        assert roles == ["[user]", "[assistant]", "[user]", "[assistant]", "[end]"]
        assert said.splitlines()[-1] == "[end] ended_by=environment, num_turns=2, environment_reward=None"
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--prompt", "What is 3 + 4?"])
    (told,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "'replies' must be a list of texts, not null; --prompt takes a row as JSON" in told


def test_a_run_without_an_environment_takes_json_for_a_prompt(capsys):
    main([*WORDS, "tiny", "--prompt", json.dumps(ROWS[0])])
    assert "[user]" not in capsys.readouterr().out
