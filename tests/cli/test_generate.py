"""`generate`: prompts from a pipe and as a flag, messages with its own flags. Trained models: test_export.py."""

import io
import sys
from pathlib import Path

import pytest

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
        "error: the prompt 'caf\\udce9' is no UTF-8; convert it (iconv -t UTF-8)"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "--prompt", " "], "--prompt is empty; give a text"),
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
        (["last", "--prompt", "a"], "there is no checkpoint in runs/ yet: give a .ckpt file, or leave ckpt_path out"),
    ],
)
def test_mistakes_are_told_in_a_line_with_the_flags_that_there_are(empty_folder, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        main([*WORDS, *words])
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert said in told[0]
    assert "model." not in told[0]
