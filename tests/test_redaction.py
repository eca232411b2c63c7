"""Secrets do not reach saved configs, logs, checkpoints or messages; ordinary settings do."""

import logging
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from stateset_lightning.cli.main import main
from stateset_lightning.redaction import is_secret_name, redacted, redacted_text
from stateset_lightning.rewards.base import failure

KEY = "sk-proj-0123456789abcdefghij"


@pytest.mark.parametrize(
    "name",
    ["api_key", "WANDB_API_KEY", "hf_token", "token", "openai.api_key", "password", "client_secret", "secretKey"],
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["max_new_tokens", "max_prompt_tokens", "tokenizer", "eos_token", "key", "monitor", "model_name", "author"]
)
def test_names_that_are_none(name):
    assert not is_secret_name(name)


def test_containers_are_copied_without_secrets():
    config = {
        "judge": {"init_args": {"api_key": "hunter2", "url": f"https://me:hunter2@host/v1?k={KEY}", "max_tokens": 5}},
        "token": None,
    }
    config["list"] = [{"password": "x"}, "hf_abcdefghijklmnopqrst"]
    assert redacted(config) == {
        "judge": {"init_args": {"api_key": "***", "url": "https://***@host/v1?k=***", "max_tokens": 5}},
        "token": None,
        "list": [{"password": "***"}, "***"],
    }
    assert config["judge"]["init_args"]["api_key"] == "hunter2"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("model.reward: api_key=hunter2 is refused", "model.reward: api_key=*** is refused"),
        ("{'hf_token': 'abc'}", "{'hf_token': '***'}"),
        (f"Incorrect key {KEY}.", "Incorrect key ***."),
        ("unexpected token: }", "unexpected token: }"),
        ("data.max_prompt_tokens=3", "data.max_prompt_tokens=3"),
    ],
)
def test_texts_lose_what_looks_like_a_key(text, clean):
    assert redacted_text(text) == clean


def test_the_value_of_a_secret_environment_variable_is_hidden(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "correct-horse-battery")
    monkeypatch.setenv("LANGUAGE_OF_JUDGE", "correct-ho")
    assert redacted_text("401 for correct-horse-battery, correct-ho") == "401 for ***, correct-ho"
    outcome = failure(RuntimeError("401 for correct-horse-battery"))
    assert "correct-horse" not in outcome.message + outcome.traceback


REWARD = f"""
from stateset_lightning.rewards import RewardFunction

class Judge(RewardFunction):
    def __init__(self, api_key: str = "", base: str = ""):
        self.api_key = api_key

    def compute_reward(self, turns, context=None):
        assert self.api_key == "{KEY}"  # the run itself gets it
        if "a" in turns[-1].content:
            raise PermissionError("401: bad key " + self.api_key)
        return float(len(turns[-1].content))
"""


def test_a_runs_files_and_output_hold_no_key(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    Path("judge_with_key.py").write_text(REWARD)
    config = {
        "model": {
            "policy": {"model_name": "tiny"},
            "reward": [
                {"class_path": "judge_with_key.Judge", "init_args": {"api_key": KEY, "base": "https://u:pw123@host"}}
            ],
            "rollout": {"num_generations": 4, "max_new_tokens": 3},
            "max_reward_failures": 1.0,
        },
        "data": {"train": [{"id": "s", "prompt": "Say a."}], "batch_size": 1},
        "trainer": {
            "max_steps": 1,
            "accelerator": "cpu",
            "enable_checkpointing": True,
            "logger": {"class_path": "CSVLogger"},
        },
    }
    config["trainer"]["logger"]["init_args"] = {"save_dir": str(tmp_path / "runs")}
    (tmp_path / "given").mkdir()
    Path("given/config.yaml").write_text(yaml.safe_dump(config))
    with caplog.at_level(logging.DEBUG):
        cli = main(["fit", "--config", "given/config.yaml"])
    assert isinstance(cli.trainer.logger, CSVLogger)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "hparams.yaml", "samples.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".ckpt" for path in files)
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
        assert b"pw123" not in path.read_bytes(), path
    out, err = capsys.readouterr()
    assert KEY not in out + err + caplog.text
    (saved,) = (yaml.safe_load(path.read_text()) for path in files if path.name == "config.yaml")
    assert saved["model"]["reward"][0]["init_args"] == {"api_key": "***", "base": "https://***@host"}
    assert saved["model"]["rollout"]["max_new_tokens"] == 3
    assert saved["data"]["batch_size"] == 1


def test_a_checkpoint_does_not_hold_the_hubs_token(tmp_path):
    from module_runs import make_module

    from stateset_lightning.policy import PolicyConfig

    module = make_module()
    module = type(module)(PolicyConfig("tiny", model_kwargs={"token": KEY}), reward=lambda t, c: 1.0)
    assert module.hparams["policy"]["model_kwargs"] == {"token": "***"}
    assert module.policy_config.model_kwargs == {"token": KEY}


def test_a_message_of_the_parser_holds_no_key(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    reward = (
        f'{{"class_path": "stateset_lightning.rewards.ExactMatch", "init_args": {{"api_key": "{KEY}", "weight":'
        f' "{KEY}"}}}}'
    )
    with pytest.raises(SystemExit):
        main(["fit", "--model.policy.model_name=tiny", f"--model.reward=[{reward}]"])
    assert KEY not in capsys.readouterr().err
