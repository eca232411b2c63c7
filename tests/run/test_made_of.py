"""What a run is made of is remembered: what may change is named, what may not is refused, and ranks compare it."""

import inspect
import logging
import os
import socket
import subprocess
import sys
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import RUN_CONFIG
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from module_runs import SCENARIOS, DigitReward, fit, make_data, make_module
from tokenizers import normalizers

from stateset_lightning import GRPOLightningModule, ScenarioDataModule, rewards
from stateset_lightning.algorithm import GSPO, Clipped
from stateset_lightning.cli.main import main
from stateset_lightning.environments import EnvironmentConfig, ScriptedUser
from stateset_lightning.errors import ConfigError
from stateset_lightning.evaluation import EvaluationConfig
from stateset_lightning.policy import LoRAConfig, PolicyConfig, load_model
from stateset_lightning.ranks import Ranks
from stateset_lightning.rollout import RolloutConfig
from stateset_lightning.run.made_of import KINDS, check_ranks_agree, flat, kind_of, options_of, text
from stateset_lightning.training.schedule import Schedule

DATED = "{{ strftime_now('%d %B %Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"


def parameters(made):
    return [name for name, p in inspect.signature(made).parameters.items() if p.kind not in (p.VAR_KEYWORD,)]


# What may change ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a run of one step with all of whose parts the tests change one."""
    folder = tmp_path_factory.mktemp("run")
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1)
    fit(folder, make_module(lr_scheduler=decayed), callbacks=[keep], enable_checkpointing=True, max_steps=1)
    return folder / "step=1.ckpt"


def decayed(optimizer):
    """Zero after the first step."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)


def test_each_option_that_has_changed_is_named(checkpoint, tmp_path, caplog):
    state = torch.load(checkpoint, weights_only=True)
    made = state["stateset"]["made_of"]
    named = [key for key in made if kind_of(key) is None]
    expected = {
        "model": parameters(GRPOLightningModule),
        "data": parameters(ScenarioDataModule),
        "trainer": parameters(Trainer),
        "model.rollout": [field.name for field in fields(RolloutConfig)],
        "model.evaluation": [field.name for field in fields(EvaluationConfig)],
        "model.policy": [field.name for field in fields(PolicyConfig)],
        "model.algorithm": [field.name for field in fields(Clipped) if field.init],
        "model.lr_scheduler": ["step_size", "gamma"],
        "trainer.callbacks.ModelCheckpoint": ["monitor", "save_top_k", "every_n_train_steps"],
    }
    by_their_kind = {"model.reward", "model.optimizer", "model.lr_scheduler", "model.algorithm", "trainer.callbacks"}
    by_their_kind |= {
        "model.environment",
        "trainer.default_root_dir",
        "data.tokenizer",
    }  # where files go; what has a digest of its own
    assert {f"{part}.{name}" for part, names in expected.items() for name in names} - by_their_kind <= set(named)
    assert {f"model.optimizer {name}" for name in torch.optim.AdamW([torch.zeros(1)]).defaults} <= set(named)
    for key in named:
        made[key] = "something else"
    torch.save(state, tmp_path / "other.ckpt")
    with caplog.at_level(logging.INFO, "stateset_lightning"):
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=1)
        options = {"callbacks": [keep], "enable_checkpointing": True, "ckpt_path": tmp_path / "other.ckpt"}
        fit(tmp_path, make_module(lr_scheduler=decayed), max_steps=2, **options)
    said = [record.getMessage() for record in caplog.records]
    for key in named:
        assert sum(line.startswith(f"{key}=") and "and something else in" in line for line in said) == 1, key


@pytest.mark.parametrize("value", [PolicyConfig("tiny", lora=LoRAConfig()), GSPO(), Schedule(), EvaluationConfig()])
def test_each_field_counts(value):
    """Also of the classes within: an adapter's, and those of an algorithm."""
    names = {f"x.{field.name}" for field in fields(value) if field.init}
    assert names <= dict(flat("x", value)).keys()
    if isinstance(value, PolicyConfig):
        assert {f"x.lora.{field.name}" for field in fields(LoRAConfig)} <= dict(flat("x", value)).keys()


@pytest.mark.parametrize(
    "reward",
    [
        rewards.NumericAnswer(marker="=", relative_tolerance=0.1, weight=2.0),
        rewards.RegexMatch("a+", match="fullmatch"),
        rewards.FormatReward(tags=["think"]),
        rewards.LengthPenalty(max_length=3),
        rewards.EmbeddingSimilarity("tiny"),
        rewards.MathEquivalence(),
        rewards.OverlongPenalty(8, 4),
        DigitReward(),
    ],
)
def test_each_option_of_a_reward_counts(reward):
    """Its constructor's and its base's."""
    own = {name for kind in type(reward).__mro__[:-2] if "__init__" in vars(kind) for name in parameters(kind)}
    assert own <= options_of(reward).keys()


def test_the_same_command_has_changed_nothing(checkpoint, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "stateset_lightning"):
        options = {"ckpt_path": checkpoint, "max_steps": 1, "default_root_dir": checkpoint.parent}
        fit(tmp_path, make_module(lr_scheduler=decayed), **options)
    assert not [record.getMessage() for record in caplog.records if "in the checkpoint" in record.getMessage()]


def test_a_changed_option_of_a_torch_scheduler_is_used(checkpoint, tmp_path):
    trainer = fit(
        tmp_path,
        make_module(lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=5, gamma=0.5)),
        ckpt_path=checkpoint,
        max_steps=2,
    )
    assert (trainer.lr_scheduler_configs[0].scheduler.step_size, trainer.lr_scheduler_configs[0].scheduler.gamma) == (
        5,
        0.5,
    )


def test_texts_are_equal_in_every_process():
    assert text({"a": {"y", "x"}, "b": (1, 2.0, None), "c": DigitReward(), "d": torch.float32}) == (
        '{"a": ["\\"x\\"", "\\"y\\""], "b": [1, 2.0, null], "c": "DigitReward", "d": "torch.float32"}'
    )


# What may not ---------------------------------------------------------------------------------------------------------


def other_base(folder):
    model = load_model(PolicyConfig("tiny"))
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    model.save_pretrained(folder)
    make_module().tokenizer.save_pretrained(folder)
    return make_module(str(folder), lr_scheduler=decayed), make_data()


def with_tokenizer(change):
    def make(folder):
        module = make_module(lr_scheduler=decayed)
        change(module.tokenizer)
        return module, make_data()

    return make


def with_module(**options):
    return lambda folder: (make_module(**{"lr_scheduler": decayed, **options}), make_data())


def with_data(**options):
    return lambda folder: (make_module(lr_scheduler=decayed), make_data(**options))


def set_template(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}\n"


def set_normalizer(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


class Weighed(DigitReward):
    def __init__(self, bonus=0.0):
        super().__init__(name="digit")
        self.bonus = bonus


CHANGES = {
    "base": (other_base, r"base weights; model.policy.model_name=.*, and tiny in the checkpoint"),
    "rows: a target": (with_data(train=[{**SCENARIOS[0], "target": "x"}, *SCENARIOS[1:]]), r"\(rows of data.train\)"),
    "rows: fewer": (with_data(train=SCENARIOS[:3]), r"\(rows of data.train\)"),
    "rows: system prompt": (with_data(system_prompt="Hm."), r"rows of data.train; .*data.system_prompt=Hm., and None"),
    "rows: validation": (with_data(validation=SCENARIOS[:3]), r"\(rows of data.validation\)"),
    "tokenizer": (with_tokenizer(set_normalizer), r"\(tokenizer\)"),
    "template": (with_tokenizer(set_template), r"\(chat template\)"),
    "rewards: weight": (with_module(reward=DigitReward(weight=2.0)), "model.reward.digit.weight=2.0, and 1.0"),
    "rewards: class": (with_module(reward=Weighed()), "model.reward.digit=Weighed, and DigitReward"),
    "rewards: number": (with_module(reward=[DigitReward(), rewards.ExactMatch()]), "model.reward=digit, exact_match"),
    "optimizer": (
        with_module(optimizer=lambda p: torch.optim.SGD(p, lr=0.5)),
        "model.optimizer=SGD, and AdamW in the checkpoint",
    ),
    "scheduler": (with_module(lr_scheduler=None), "model.lr_scheduler=None, and StepLR in the checkpoint"),
    "environment": (
        with_module(environment=EnvironmentConfig(ScriptedUser, options={"responses": ["Sure?"]}, max_turns=1)),
        "model.environment=EnvironmentConfig, and None in the checkpoint",
    ),
    "algorithm": (with_module(algorithm=GSPO()), "model.algorithm=GSPO, and Clipped in the checkpoint"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_run_is_made_of_is_refused_by_name_and_the_remedy_works(change, checkpoint, tmp_path):
    make, said = CHANGES[change]
    kind = change.split(":")[0]
    options = {"ckpt_path": checkpoint, "max_steps": 3, "limit_val_batches": 1}
    module, data = make(tmp_path / "model")
    with pytest.raises(ConfigError, match=said) as refused:
        fit(tmp_path, module, data, **options)
    assert "\n" not in str(refused.value)
    assert f"--accept_changes {kind} " in str(refused.value)
    module, data = make(tmp_path / "model")
    module.accept_changes = kind
    trainer = fit(tmp_path, module, data, **options)
    assert trainer.global_step == 3
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == (1e-3 if kind == "scheduler" else 0)  # the schedule goes on, and one that has ended leaves nothing


def test_every_kind_is_tried():
    assert {change.split(":")[0] for change in CHANGES} == set(KINDS)


def test_on_the_command_line_a_change_is_accepted_once(folder, capsys):
    main(["fit", "--config", "config.yaml", "--trainer.max_steps=1"])
    rows = Path("rows.jsonl")
    rows.write_text(rows.read_text().replace('"target": "2"', '"target": "3"'))
    again = ["fit", "--config", "config.yaml", "--ckpt_path=last", "--trainer.max_steps=2"]
    with pytest.raises(SystemExit) as ended:
        main(again)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "rows of data.train; rows of data.validation" in said
    with pytest.raises(SystemExit) as ended:
        main([*again, "--accept_changes=rows,reward"])
    assert ended.value.code == 2
    assert f"accept_changes=reward is unknown: its names are {', '.join(KINDS)}" in capsys.readouterr().err
    assert main([*again, "--accept_changes=rows"]).trainer.global_step == 2
    assert "rows of data.train: the new value is used" in capsys.readouterr().out
    assert yaml.safe_load(Path("runs/r/version_0/config.yaml").read_text())["accept_changes"] is None
    main(["fit", "--config", "config.yaml", "--ckpt_path=last", "--trainer.max_steps=3"])


# The date -------------------------------------------------------------------------------------------------------------


def test_the_date_that_a_template_writes_is_the_runs_own(tmp_path, caplog):
    def run(now, **options):
        module, data = make_module(), make_data()
        module.tokenizer.chat_template = DATED
        data._now = now
        fit(tmp_path, module, data, **options)
        return data, module.tokenizer.decode(data.served("train")[1][0])

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    with caplog.at_level(logging.INFO, "stateset_lightning"):
        _, prompt = run(datetime(2026, 1, 2, 3, 4), callbacks=[keep], enable_checkpointing=True, max_steps=1)
    assert prompt.startswith("02 January 2026 What is")
    assert "the chat template writes the date: in this run it is always 2026-01-02 03:04:00" in caplog.text
    data, again = run(datetime(2026, 1, 3), ckpt_path=tmp_path / "step=1.ckpt", max_steps=2)
    assert (again, data.state_dict()["now"]) == (prompt, "2026-01-02 03:04:00")
    assert abs((run(None, max_steps=1)[0]._now - datetime.now()).total_seconds()) < 600


# Ranks ----------------------------------------------------------------------------------------------------------------


def test_ranks_may_differ_in_places_alone(monkeypatch):
    made = {"data.train": "/a/rows.jsonl", "model.policy.model_name": "/a/m", "rows of data.train": "1", "torch": "2"}

    def gather(self, value):
        return [made, made, value]

    monkeypatch.setattr(Ranks, "gather", gather)
    check_ranks_agree({**made, "data.train": "/b/rows.jsonl", "model.policy.model_name": "/b/m"}, Ranks())
    with pytest.raises(ConfigError, match=r"^rank 2 differs \(rows of data.train; torch=3, and 2 on rank 0\): start"):
        check_ranks_agree({**made, "rows of data.train": "2", "torch": "3"}, Ranks())


@pytest.mark.slow  # two processes that import torch and lightning
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.train=rows1.jsonl", "--model.rollout.temperature=0.5"], "rows of data.train; model.rollout.temp"),
        (["--model.optimizer.init_args.lr=0.5"], "model.optimizer lr=0.5, and 0.001 on rank 0"),
    ],
)
def test_machines_that_disagree_all_end_in_one_line(folder, options, said):
    lines = Path("rows.jsonl").read_text().splitlines(keepends=True)
    Path("rows1.jsonl").write_text("".join(lines[:2]))
    Path("config.yaml").write_text(yaml.safe_dump({**RUN_CONFIG, "data": {**RUN_CONFIG["data"], "batch_size": 1}}))
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    command = [sys.executable, "-m", "stateset_lightning", "fit", "--config", "config.yaml", "--trainer.num_nodes=2"]
    command += ["--trainer.devices=1", "--trainer.strategy=ddp", "--trainer.logger=false"]
    programs = []
    for rank in range(2):
        node = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **node}
        words = [*command, *(options if rank else [])]
        programs.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment))
    for program in programs:
        errors = program.communicate(timeout=120)[1]
        (line,) = [line for line in errors.splitlines() if line.startswith("stateset-lightning: error")]
        assert program.returncode == 2
        assert "rank 1 differs (" in line
        assert said in line
