"""What users get wrong -> exit code 2 and a few lines that name the place and the remedy. Nothing here trains."""

import json
import re
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401 (here, so that its log handlers do not hold the stream of the first test)
import pytest
import torch
import yaml

from stateset_lightning.cli.main import main

REWARDS = """
from stateset_lightning.rewards import RewardFunction

class Raising(RewardFunction):
    def compute_reward(self, turns, context=None):
        raise KeyError("no such thing")

class Text(RewardFunction):
    def compute_reward(self, turns, context=None):
        return "good"

class Length(RewardFunction):
    def compute_reward(self, turns, context=None):
        return 2.0 + len(turns[-1].content)

class Refusing(RewardFunction):
    def __init__(self, path: str = "nowhere"):
        raise ValueError("no judge at " + path)
    def compute_reward(self, turns, context=None):
        return 0.0

class Abstract(RewardFunction):
    pass

class NoReward:
    pass

def one_argument(thing):
    return 1.0
"""

EXACT = "stateset_lightning.rewards.ExactMatch"
SCHEDULE = "stateset_lightning.training.schedule.Schedule"
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
STOPPING = "lightning.pytorch.callbacks.EarlyStopping"


def instance(path, **arguments):
    return {"class_path": path, "init_args": arguments}


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """Runs a command that must fail, and returns what it says."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_rewards", raising=False)
    Path("bad_rewards.py").write_text(REWARDS)
    Path("good.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "target": str(i)}) + "\n" for i in range(4))
    )

    def run(change=None, *flags, command="fit", max_lines=6):
        config = {
            "model": {
                "policy": {"model_name": "tiny"},
                "reward": [instance(EXACT)],
                "rollout": {"num_generations": 2, "max_new_tokens": 2},
            },
            "data": {"train": "good.jsonl", "batch_size": 2},
            "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        }
        Path("base.yaml").write_text(yaml.safe_dump(config))
        configs = ["--config", "base.yaml"]
        if change is not None:
            Path("change.yaml").write_text(yaml.safe_dump(change))
            configs += ["--config", "change.yaml"]
        with pytest.raises(SystemExit) as stopped:
            main([command, *configs, *flags])
        said = capsys.readouterr().err
        assert stopped.value.code == 2, said
        said = "\n".join(line for line in said.splitlines() if not line.startswith("Seed set"))
        assert said.startswith("stateset-lightning: error: ")
        assert len(said.splitlines()) <= max_lines, said
        assert "Traceback" not in said
        assert "usage:" not in said
        return said

    return run


def assert_told(said, words):
    for word in words:
        assert word in said, f"{word!r} is not in: {said}"


# Scenario files: name, content (None: no file), what the message must contain.
FILES = [
    ("missing.jsonl", None, ["data.train=missing.jsonl", "there is no such file"]),
    ("empty.jsonl", "", ["empty.jsonl", "empty", "at least one scenario"]),
    ("blank.jsonl", "\n\n", ["blank.jsonl", "empty"]),
    ("rows.txt", "hello", ["rows.txt", "unknown suffix '.txt'", ".jsonl", ".csv"]),
    ("bad.jsonl", '{"prompt": "a"}\n{"prompt": ', ["bad.jsonl:2", "malformed JSON", "correct or remove"]),
    ("list.jsonl", "[1, 2]", ["list.jsonl:1", "must be a JSON object", "a list"]),
    ("mapping.json", '{"rows": []}', ["mapping.json", "must hold a list of rows", "rows"]),
    ("numbers.json", "[1]", ["numbers.json item 1", "must be a mapping"]),
    ("broken.json", '[{"prompt": "a"},\n{]', ["broken.json:2", "malformed JSON"]),
    ("lines.json", '{"prompt": "a"}\n{"prompt": "b"}', ["lines.json:2", "name the file .jsonl"]),
    ("type.jsonl", '{"prompt": 5, "target": "5"}', ["type.jsonl:1", "prompt must be text", "5"]),
    ("column.jsonl", '{"text": "a"}', ["column.jsonl", "no column 'prompt'", "data.fields.prompt=text"]),
    ("no_prompt.jsonl", '{"prompt": "   "}', ["no_prompt.jsonl:1", "empty"]),
    (
        "twice.jsonl",
        '{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}',
        ["twice.jsonl:2", "'x'", "twice.jsonl:1", "differ"],
    ),
    ("messages.jsonl", '{"messages": "hello"}', ["messages.jsonl:1", "list of {role, content}"]),
    ("role.jsonl", '{"messages": [{"role": "x", "content": "a"}]}', ["role.jsonl:1", "'x'", "prompter, assistant"]),
    ("last.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', ["last.jsonl:1", "must be the user's"]),
    ("both.jsonl", '{"prompt": "a", "messages": []}', ["both.jsonl:1", "exactly one"]),
    ("latin.jsonl", b'{"prompt": "caf\xe9"}', ["latin.jsonl:1", "not valid UTF-8", "save the file as UTF-8"]),
    ("ragged.csv", "prompt,target\na,1\nb,2,3\n", ["ragged.csv:3", "3 cells", "header has 2", "quotes"]),
    ("columns.csv", "prompt,prompt\na,1\n", ["columns.csv", "'prompt' twice"]),
    ("bad.yaml", "- prompt: [a\n", ["bad.yaml:", "malformed YAML"]),
    ("target.jsonl", '{"prompt": "a"}\n', ["exact_match", "column target", "data.train", "data.fields.target"]),
]


@pytest.mark.parametrize(("name", "content", "words"), FILES, ids=[row[0] for row in FILES])
def test_broken_scenario_file(refuse, name, content, words):
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_told(refuse({"data": {"train": name}}), words)


def test_of_many_bad_rows_twenty_are_listed(refuse):
    Path("many.jsonl").write_text('{"prompt": 5}\n' * 30)
    said = refuse({"data": {"train": "many.jsonl"}}, max_lines=22)
    assert_told(said, ["30 rows", "many.jsonl:20:", "and 10 more"])
    assert "many.jsonl:21:" not in said


def test_an_unreadable_file(refuse, monkeypatch):
    read_bytes = Path.read_bytes

    def denied(path):
        if path.name == "good.jsonl":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", denied)  # root, whom tests may run as, can read any file
    assert_told(refuse(), ["good.jsonl", "Permission denied", "check the path"])


def reward(path, **arguments):
    return {"model": {"reward": [instance(path, **arguments)]}}


# Configs: what is broken, the change to a good config, what the message must contain.
CONFIGS = [
    (
        "unknown key of model",
        {"model": {"rolout": {"num_generations": 2}}},
        ["model.rolout", "did you mean model.rollout"],
    ),
    (
        "unknown key of rollout",
        {"model": {"rollout": {"temprature": 1}}},
        ["temprature", "did you mean model.rollout.temperature"],
    ),
    (
        "unknown key of policy",
        {"model": {"policy": {"modl_name": "tiny"}}},
        ["model.policy", "modl_name", "did you mean model_name"],
    ),
    ("unknown key of data", {"data": {"batchsize": 2}}, ["data.batchsize", "did you mean data.batch_size"]),
    ("unknown key of trainer", {"trainer": {"max_step": 2}}, ["trainer.max_step", "did you mean trainer.max_steps"]),
    ("unknown section", {"modle": {"seed": 2}}, ["modle", "model.seed"]),
    ("text for a number", {"data": {"batch_size": "two"}}, ["data.batch_size=two", "integer"]),
    ("text for a number of the trainer", {"trainer": {"max_steps": "many"}}, ["trainer.max_steps=many", "an integer"]),
    ("a mapping for data.train", {"data": {"train": {"a": 1}}}, ["data.train", "a list of rows, not a mapping"]),
    ("numbers for scenarios", {"data": {"train": [5]}}, ["data.train=[5]", "a mapping"]),
    (
        "no such choice",
        {"data": {"overlong_prompts": "skip"}},
        ["data.overlong_prompts=skip", "error, drop, truncate_left"],
    ),
    ("no such precision", {"trainer": {"precision": "bf17"}}, ["trainer.precision=bf17", "bf16-mixed"]),
    ("fields that are no text", {"data": {"fields": {"prompt": [1]}}}, ["data.fields", "text"]),
    (
        "a field without column",
        {"data": {"fields": {"target": "answer"}}},
        ["good.jsonl", "data.fields.target", "'answer'", "it has:"],
    ),
    (
        "a source with an unknown key",
        {"data": {"train": [{"path": "good.jsonl", "wight": 1}]}},
        ["data.train item 1", "'wight'", "weight"],
    ),
    (
        "a misspelt reward",
        reward("stateset_lightning.rewards.ExactMach"),
        ["model.reward", "ExactMach", "did you mean ExactMatch"],
    ),
    ("a reward of no module", reward("nowhere.Reward"), ["model.reward", "nowhere", "PYTHONPATH"]),
    (
        "a reward that is none",
        reward("bad_rewards.NoReward"),
        ["model.reward", "bad_rewards.NoReward", "RewardFunction"],
    ),
    ("an abstract reward", reward("bad_rewards.Abstract"), ["model.reward", "bad_rewards.Abstract", "abstract"]),
    (
        "an unknown argument of a reward",
        reward(EXACT, ignore_cas=True),
        ["model.reward", "ignore_cas", "did you mean ignore_case"],
    ),
    ("a reward that refuses its arguments", reward("bad_rewards.Refusing"), ["no judge at nowhere"]),
    (
        "a pattern that is none",
        reward("stateset_lightning.rewards.RegexMatch", pattern="("),
        ["pattern='('", "regular expression"],
    ),
    ("no reward", {"model": {"reward": []}}, ["reward=[]", "at least one reward"]),
    ("a number for a reward", {"model": {"reward": 5}}, ["model.reward=5", "a list"]),
    ("a word for a reward", {"model": {"reward": "nonsense"}}, ["model.reward=nonsense", "class_path"]),
    (
        "a function of one argument",
        {"model": {"reward": "bad_rewards.one_argument"}},
        ["one_argument", "(turns, context)"],
    ),
    ("a misspelt algorithm", {"model": {"algorithm": "GRPOO"}}, ["model.algorithm=GRPOO", "did you mean GRPO"]),
    ("a misspelt optimizer", {"model": {"optimizer": "AdamWW"}}, ["model.optimizer=AdamWW", "did you mean AdamW"]),
    (
        "a misspelt callback",
        {"trainer": {"callbacks": [instance(CHECKPOINT + "t")]}},
        ["ModelCheckpointt", "did you mean ModelCheckpoint"],
    ),
    (
        "no such model folder",
        {"model": {"policy": {"model_name": "./nowhere"}}},
        ["model.policy.model_name='./nowhere'", "no such folder"],
    ),
    ("a stop string that is empty", {"model": {"rollout": {"stop": [""]}}}, ["model.rollout.stop", "empty string"]),
    (
        "two precisions",
        {"model": {"policy": {"dtype": "bfloat16"}}, "trainer": {"precision": "16-true"}},
        ["model.policy.dtype='bfloat16'", "trainer.precision='16-true'", "set one of them"],
    ),
    ("no such accelerator", {"trainer": {"accelerator": "tpu"}}, ["trainer: ", "torch_xla"]),
    (
        "accumulation across passes",
        {"data": {"steps_per_episode": 3}, "trainer": {"accumulate_grad_batches": 2}},
        ["trainer.accumulate_grad_batches=2", "data.steps_per_episode=3", "to 4"],
    ),
    (
        "an epoch that ends inside an episode",
        {"data": {"num_iterations": 2}, "trainer": {"limit_train_batches": 1}},
        ["trainer.limit_train_batches=1", "2 micro-steps", "set it to 2"],
    ),
    (
        "a long prompt",
        {"data": {"max_prompt_tokens": 3}},
        ["data.train: 4 of 4 prompts", "data.max_prompt_tokens=3", "truncate_left"],
    ),
    (
        "beyond the model's context",
        {"model": {"rollout": {"max_new_tokens": 2045}}},
        ["max_new_tokens=2045", "2048 positions", "lower max_new_tokens"],
    ),
    (
        "two kinds of validation",
        {"data": {"validation": "good.jsonl", "validation_fraction": 0.5}},
        ["data.validation and data.validation_fraction=0.5", "leave one of them out"],
    ),
    (
        "a metric that is not logged",
        {
            "data": {"validation": "good.jsonl"},
            "trainer": {"callbacks": [instance(CHECKPOINT, monitor="val/nope")], "enable_checkpointing": True},
        },
        ["ModelCheckpoint.monitor=val/nope", "no such metric", "val/reward"],
    ),
    (
        "a validation metric without validation",
        {"trainer": {"callbacks": [instance(STOPPING, monitor="val/reward", mode="max")]}},
        ["EarlyStopping.monitor=val/reward", "nothing to validate on", "data.validation"],
    ),
    (
        "a reward that raises",
        reward("bad_rewards.Raising"),
        ["max_reward_failures=0.5", "'raising'", "KeyError", "bad_rewards.py:6"],
    ),
    ("a reward that returns text", reward("bad_rewards.Text"), ["'text'", "returned the str 'good'", "no number"]),
    (
        "BNPO with rewards beyond 1",
        {
            "model": {
                "reward": [instance("bad_rewards.Length")],
                "algorithm": instance("stateset_lightning.algorithm.BNPO"),
            }
        },
        ["BNPO", "[0, 1]", "rescale"],
    ),
    (
        "a decay without an end",
        {
            "model": {"lr_scheduler": instance(SCHEDULE, decay="cosine")},
            "trainer": {"max_steps": -1, "max_time": "00:00:01:00"},
        },
        ["model.lr_scheduler.decay='cosine'", "trainer.max_steps"],
    ),
]


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in CONFIGS], ids=[row[0] for row in CONFIGS])
def test_broken_config(refuse, change, words):
    if change.get("trainer", {}).get("max_time"):
        change["trainer"]["max_epochs"] = -1
    assert_told(refuse(change), words)


# Config files: content, what the message must contain.
CONFIG_FILES = [
    ("missing", None, ["--config x.yaml", "No such file", "relative to"]),
    ("empty", "", ["--config x.yaml", "empty", "model:"]),
    ("a word", "hello", ["--config x.yaml", "'hello'"]),
    ("a bracket left open", "model: [\n", ["x.yaml:2", "malformed YAML"]),
    ("bad indentation", "model:\n  seed: 1\n   rollout: {}\n", ["x.yaml:3", "malformed YAML", "indentation"]),
    ("not UTF-8", b"model: {seed: caf\xe9}", ["x.yaml", "not valid UTF-8"]),
]


@pytest.mark.parametrize(("content", "words"), [row[1:] for row in CONFIG_FILES], ids=[row[0] for row in CONFIG_FILES])
def test_broken_config_file(refuse, content, words):
    if content is not None:
        Path("x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_told(refuse(None, "--config", "x.yaml"), words)


def test_what_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    for args, words in (
        (["fit"], ["model.policy", "model.reward"]),
        (["fit", "--model.policy.dtype=float32"], ["model.policy.model_name"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(args if len(args) == 1 else [*args, "--model.reward", EXACT])
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert_told(said, [*words, "--config"])
        assert len(said.splitlines()) <= 2


def test_an_unknown_subcommand(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert_told(said, ["train", "fit", "predict"])
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize("flag", ["--trainer.max_step", "--model.rollout.num_generation"])
def test_an_abbreviated_flag_is_not_guessed(refuse, flag):
    assert_told(refuse(None, flag, "4"), [flag[2:], "did you mean", flag[2:] + "s"])


@pytest.mark.parametrize(
    ("command", "key"), [("predict", "data.predict"), ("test", "data.test"), ("validate", "data.validation")]
)
def test_a_command_without_its_data(refuse, command, key):
    assert_told(refuse(command=command), [key, "not given", "set it"])


def test_checkpoints_that_are_none(refuse):
    assert_told(refuse(None, "--ckpt_path", "nowhere.ckpt"), ["ckpt_path=nowhere.ckpt", "no such file"])
    Path("text.ckpt").write_text("hello")
    assert_told(refuse(None, "--ckpt_path", "text.ckpt"), ["ckpt_path=text.ckpt", "damaged or no checkpoint"])
    torch.save({"state_dict": {"a": torch.zeros(1000)}, "stateset": {}}, "whole.ckpt")
    Path("cut.ckpt").write_bytes(Path("whole.ckpt").read_bytes()[:2000])
    assert_told(refuse(None, "--ckpt_path", "cut.ckpt"), ["ckpt_path=cut.ckpt", "damaged"])
    torch.save({"weights": torch.zeros(1)}, "other.ckpt")
    assert_told(refuse(None, "--ckpt_path", "other.ckpt"), ["ckpt_path=other.ckpt", "no checkpoint of ours"])


def test_the_remedy_for_a_long_prompt_works_when_followed(refuse):
    Path("long.jsonl").write_text(json.dumps({"prompt": "1 " * 3000}) + "\n" + Path("good.jsonl").read_text())
    data = ["--data.train", "long.jsonl"]
    remedies = re.findall(r"data\.\w+=\w+", refuse(None, *data))
    assert remedies == ["data.max_prompt_tokens=2046", "data.overlong_prompts=drop"]
    first = refuse(None, *data, f"--{remedies[0]}")  # who does the half of it is told the other half first
    assert "set data.overlong_prompts to drop" in first
    cli = main(["fit", "--config", "base.yaml", *data, *[f"--{remedy}" for remedy in remedies]])
    assert cli.trainer.global_step == 1
