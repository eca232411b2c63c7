"""Configs and flags -> one mapping: text stays text, mappings merge, lists replace, classes start anew."""

import os
import socket
import sys
import threading
from pathlib import Path

import pytest
import yaml
from cli_runs import overlay, printed_config
from lightning.pytorch.callbacks.timer import Interval

from stateset_lightning.cli import overlays
from stateset_lightning.cli.main import main
from stateset_lightning.cli.overlays import dump_yaml, merge, merged_words, read_yaml
from stateset_lightning.errors import ConfigError

TEXTS = ["####", "# You are", "~", "&x", "*x", "null ", "Null", "yes", "off", "1_000", "0x10", "1e3", "1.5", "true"]
TEXTS += ["2024-01-01", "  x ", "key: value", "a: b\nc: d", "[x", "[x]", "{x}", "---", "!x", "", "rows.jsonl", "-- x"]

ECHO = """
from stateset_lightning.rewards import RewardFunction
class Echo(RewardFunction):
    def __init__(self, text: str = "d", other: str | None = "d", texts: list[str] | None = None):
        super().__init__()
    def compute_reward(self, turns, context=None):
        return 0.0
"""


@pytest.fixture
def echo(config, tmp_path, monkeypatch):
    Path("echo_reward.py").write_text(ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "echo_reward", raising=False)
    return config


def test_text_stays_text_in_flags_files_and_printed_configs(echo):
    """All texts in one list, as the parser takes most of a second."""
    flags = [f"--data.fields.f{number}={text}" for number, text in enumerate(TEXTS)]
    written = {"class_path": "echo_reward.Echo", "init_args": {"texts": TEXTS, "text": "~", "other": "1e3"}}
    later = Path("texts.yaml")
    later.write_text(yaml.dump({"model": {"reward": written}}, default_style='"'))
    printed = printed_config("fit", "--config", echo, "--config", str(later), *flags)
    assert printed["model"]["reward"]["init_args"] == written["init_args"]
    assert list(printed["data"]["fields"].values()) == TEXTS
    Path("again.yaml").write_text(dump_yaml(printed))
    assert printed_config("fit", "--config", "again.yaml") == printed


@pytest.mark.parametrize("text", ["####", "~", "null ", "1e3", "yes", "key: value", "{x}", "rows.jsonl"])
def test_text_stays_text_in_an_option_of_a_class(echo, text):
    flags = ["--model.reward", "echo_reward.Echo", f"--model.reward.text={text}", "--model.reward.other", text]
    options = printed_config("fit", "--config", echo, *flags)["model"]["reward"]["init_args"]
    assert (options["text"], options["other"]) == (text, text)


def test_null_is_null(echo):
    flags = ["--model.reward", "echo_reward.Echo", "--model.reward.other", "null"]
    assert printed_config("fit", "--config", echo, *flags)["model"]["reward"]["init_args"]["other"] is None


ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.2}}
SAVE = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "val/reward"}}


@pytest.mark.parametrize(
    ("base", "later", "merged"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"callbacks": [SAVE]}, {"callbacks": [{"class_path": SAVE["class_path"]}]}, None),
        ({"callbacks": [SAVE]}, {"callbacks+": "Timer"}, {"callbacks": [SAVE, "Timer"]}),
        ({"callbacks": SAVE}, {"callbacks+": ["Timer", "B"]}, {"callbacks": [SAVE, "Timer", "B"]}),
        ({}, {"callbacks+": "[A, B]"}, {"callbacks": ["A", "B"]}),
        ({"optimizer": ADAM}, {"optimizer": "SGD"}, {"optimizer": {"class_path": "SGD", "init_args": {"lr": 1e-4}}}),
        ({"optimizer": ADAM}, {"optimizer": "torch.optim.AdamW"}, {"optimizer": ADAM}),
        ({"optimizer": {"lr": 1}}, {"optimizer": "SGD"}, {"optimizer": {"class_path": "SGD", "init_args": {"lr": 1}}}),
        ({"algorithm": ADAM}, {"algorithm": "GSPO"}, {"algorithm": {"class_path": "GSPO"}}),
        ({"lr_scheduler": {"decay": "cosine"}}, {"lr_scheduler": ADAM}, {"lr_scheduler": ADAM}),
        ({"logger": SAVE}, {"logger": "false"}, {"logger": "false"}),
        ({"policy": "tiny"}, {"policy": {"lora": {}}}, {"policy": {"model_name": "tiny", "lora": {}}}),
        ({"reward": [SAVE]}, {"reward": {"mode": "max"}}, {"reward": [merge(SAVE, {"init_args": {"mode": "max"}})]}),
        ({"a": "GRPO"}, {"a": {"beta": "0.1"}}, {"a": {"class_path": "GRPO", "init_args": {"beta": "0.1"}}}),
    ],
)  # fmt: skip
def test_merging(base, later, merged):
    before = dump_yaml(base)
    result = merge(base, later)
    assert result == (later if merged is None else merged)
    assert dump_yaml(base) == before


def test_overlays_of_files_and_flags(config):
    first = overlay(
        "a.yaml",
        {
            "data": {"fields": {"prompt": "q", "target": "a"}, "chat_template_kwargs": {"x": 1}},
            "model": {"optimizer": ADAM, "lr_scheduler": {"decay": "cosine"}},
            "trainer": {"callbacks": [SAVE], "check_val_every_n_epoch": 5},
        },
    )
    second = overlay(
        "b.yaml",
        {
            "data": {"fields": {"prompt": None}, "chat_template_kwargs": {"y": 2}, "batch_size": None},
            "model": {"lr_scheduler": {"class_path": "StepLR", "init_args": {"step_size": 3}}},
            "trainer": {"callbacks": [{"class_path": "ModelCheckpoint"}], "check_val_every_n_epoch": None},
        },
    )
    flags = ["--model.optimizer", "SGD", "--trainer.callbacks+", "Timer", "--trainer.callbacks.interval", "epoch"]
    printed = printed_config(
        "fit", *flags, "--data.fields.id", "i", "--config", config, "--config", first, "-c", second
    )
    data, model, trainer = printed["data"], printed["model"], printed["trainer"]
    assert data["fields"] == {"target": "a", "id": "i"}
    assert data["chat_template_kwargs"] == {"x": 1, "y": 2}
    assert data["batch_size"] == 8  # null: the default, where an option cannot be null
    assert trainer["check_val_every_n_epoch"] is None
    assert (model["optimizer"]["init_args"]["lr"], model["optimizer"]["init_args"]["weight_decay"]) == (1e-4, 0.0)
    assert model["lr_scheduler"]["init_args"]["step_size"] == 3
    assert [each["class_path"].split(".")[-1] for each in trainer["callbacks"]] == ["ModelCheckpoint", "Timer"]
    assert trainer["callbacks"][0]["init_args"]["monitor"] is None
    assert trainer["callbacks"][1]["init_args"]["interval"] == "epoch"


def aliases(levels):
    lines = ["a0: &a0 [x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {}\nmodel: {}\ndata: {}\n", "x.yaml:3: the key data stands in line 1 already"),
        ("model:\n  reward:\n    - weight: 1\n      name: a\n      weight: 2\n", "x.yaml:5: the key weight"),
        ("data: {seed: 1, seed: 2}", "x.yaml:1: the key seed"),
        ("data: {seed: 1}\n---\nmodel: {}", "x.yaml:2: malformed YAML: but found another document"),
        ("[" * 3000 + "]" * 3000, "nested more than 100 deep"),
        (aliases(12), "more than 100,000 values, or nested more than 100 deep"),
        ("a: &a [*a]", "nested more than 100 deep"),
        ('a: "\0"', "malformed YAML"),
        ("a: " * 3000, "malformed YAML"),
        ("- " * 40_000, "nested more than 100 deep"),
        (aliases(12) + "\n? [*a11]\n: 1", "more than 100,000 values"),
        (f"a: 1{':59' * 200_000}", "x.yaml:1: an integer of 600,001 characters"),
        ("a: " + "x" * 5_000_000, "cannot be read (more than 5,000,000 bytes)"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml") as error:
        read_yaml("x.yaml", "--config x.yaml", "keys")
    assert said in str(error.value)


def test_a_config_from_a_pipe(config, tmp_path):
    os.mkfifo("pipe")
    threading.Thread(target=lambda: Path("pipe").write_text("data: {batch_size: 6}")).start()
    assert printed_config("fit", "--config", config, "--config", "pipe")["data"]["batch_size"] == 6


NO_FILES = {
    "pipe": (os.mkfifo, "cannot be read (it does not end within 0.2 s)"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "cannot be read (more than 5,000,000 bytes)"),
    "empty device": (lambda path: path.symlink_to("/dev/null"), "the file is empty"),
    "socket": (lambda path: socket.socket(socket.AF_UNIX).bind(path.name), "cannot be read (No such device"),
    "folder": (Path.mkdir, "cannot be read (Is a directory)"),
}


@pytest.mark.parametrize(("make", "said"), NO_FILES.values(), ids=NO_FILES.keys())
@pytest.mark.parametrize("words", [["fit", "--config"], ["doctor", "--config"], ["convert"]], ids=str)
def test_a_config_that_is_no_file_or_does_not_end_is_one_line(tmp_path, monkeypatch, capsys, make, said, words):
    monkeypatch.setattr(overlays, "_MAX_SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)
    make(Path("x.yaml"))
    with pytest.raises(SystemExit) as ended:
        main([*words, "x.yaml"])
    assert ended.value.code == (1 if words[0] == "doctor" else 2)
    assert said in (told := capsys.readouterr().err.strip())
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("key", ["trainer", "model.optimizer", "model.policy", "data.train", "ckpt_path"])
@pytest.mark.parametrize("in_file", [False, True], ids=["flag", "config"])
def test_a_pipe_in_place_of_a_value_is_not_waited_for(tmp_path, monkeypatch, key, in_file):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    *sections, name = key.split(".")
    Path("x.yaml").write_text(f"{sections[0]}: {{{name}: pipe}}" if sections else f"{name}: pipe")
    with pytest.raises(ConfigError, match=rf"{key}=pipe is a pipe, which may never end"):
        merged_words(["--config", "x.yaml"] if in_file else [f"--{key}", "pipe"])


def test_a_section_that_holds_comments_alone_changes_nothing(config):
    Path("later.yaml").write_text("trainer:\n#  max_steps: 2\nmodel:\ndata:\n")
    assert merged_words(["--config", config, "--config", "later.yaml"]) == merged_words(["--config", config])


def test_an_enum_of_text_is_written_as_its_text():
    """`Timer.interval` has one for its default."""
    assert dump_yaml({"interval": Interval.step}) == "interval: step\n"
