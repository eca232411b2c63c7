"""What SECURITY.md promises: no data, config, model or checkpoint file runs code. Secrets: `test_redaction.py`."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from foreign_code import OWN_CODE
from module_runs import DigitReward, fit, make_module
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from stateset_lightning import GRPOLightningModule
from stateset_lightning.cli.main import main
from stateset_lightning.cli.trained import load_trained
from stateset_lightning.data import read_split
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.policy import LoadingOptions, LoRAConfig, PolicyConfig

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
    with pytest.raises(DataError, match="4 rows cannot be used"):  # the first for its further columns
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


@pytest.fixture(params=["whole", "lora"])
def claiming(request, tmp_path, model_folder, monkeypatch):
    """A checkpoint that asks for the code in its model's folder, which would leave a file `executed`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers adds its modules' folder
    shutil.copytree(model_folder("llama"), "model")
    lora = LoRAConfig(rank=2) if request.param == "lora" else None
    fit(tmp_path, make_module(PolicyConfig("model", lora=lora)), max_steps=1).save_checkpoint("run.ckpt")
    Path("model/own.py").write_text(OWN_CODE.format(executed=str(tmp_path / "executed")))
    config = json.loads(Path("model/config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    Path("model/config.json").write_text(json.dumps(config))
    claim("run.ckpt", trust_remote_code=True)


def claim(file, **options):
    """Writes into a checkpoint what its run's policy is said to have been."""
    content = torch.load(file, weights_only=True)
    content["hyper_parameters"]["policy"].update(options)
    torch.save(content, file)


GENERATE = ["generate", "--ckpt_path", "run.ckpt", "--prompt", "What is 3 + 4?", "--device", "cpu"]
EXPORT = ["export", "run.ckpt", "out"]


@pytest.mark.parametrize("words", [GENERATE, EXPORT], ids=["generate", "export"])
@pytest.mark.usefixtures("claiming")
def test_a_checkpoint_cannot_have_foreign_code_run(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert "the run's model.policy.trust_remote_code=True is not taken from a checkpoint" in said.out
    assert "contains custom code" in said.err
    assert (
        "set model.policy.trust_remote_code=true if you trust its authors (generate and export: --trust_remote_code)"
        in said.err
    )
    assert not Path("executed").exists()
    assert not Path("out").exists()
    main([*words, "--trust_remote_code"])
    assert Path("executed").exists()


@pytest.mark.parametrize("claiming", ["whole"], indirect=True)
def test_nor_where_a_module_is_loaded_from_it(claiming):
    with pytest.raises(ConfigError, match="contains custom code"):
        GRPOLightningModule.load_from_checkpoint("run.ckpt", reward=DigitReward())
    assert not Path("executed").exists()
    trusted = PolicyConfig("model", trust_remote_code=True)
    GRPOLightningModule.load_from_checkpoint("run.ckpt", reward=DigitReward(), policy=trusted)
    assert Path("executed").exists()


def test_nor_choose_how_its_model_is_loaded(tmp_path, model_folder, monkeypatch):
    """An attention can be a repository with code, arguments can be anything, and a revision other weights."""
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, make_module(str(model_folder("llama"))), max_steps=1).save_checkpoint("run.ckpt")
    as_trained = load_trained("run.ckpt").model.state_dict()
    claim(
        "run.ckpt",
        attn_implementation="somebody/kernel",
        model_kwargs={"no_such_argument": 1},
        revision="v2",
        adapter="somebody/adapter",
    )
    trained = load_trained("run.ckpt")
    assert trained.model.config._attn_implementation == "sdpa"
    assert trained.policy.revision is None
    assert all(torch.equal(value, as_trained[name]) for name, value in trained.model.state_dict().items())
    told = load_trained("run.ckpt", loading=LoadingOptions(revision="main", attn_implementation="eager"))
    assert told.model.config._attn_implementation == "eager"
    assert told.policy.revision == "main"
    with pytest.raises(ConfigError, match="unexpected keyword argument 'no_such_argument'"):
        load_trained("run.ckpt", loading=LoadingOptions(model_kwargs={"no_such_argument": 1}))


def test_the_same_flags_serve_a_plain_model(tmp_path, model_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder("llama"), "model")
    weights = load_file("model/model.safetensors")
    weights["model.final.weight"] = weights.pop("model.norm.weight")
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    main(["export", "model", "out", "--model_kwargs", '{"key_mapping": {"^model.final": "model.norm"}}'])
    assert torch.equal(load_file("out/model.safetensors")["model.final.weight"], weights["model.final.weight"])
    for words, said in [
        ([], "it has no weights for model.norm.weight"),
        (["--model_kwargs", "{"], "argument --model_kwargs: { must be a JSON object"),
        (["--model_kwargs", "[1]"], "argument --model_kwargs: [1] must be a JSON object"),
        (["--attn_implementation", "no_such_attention"], "no_such_attention"),
    ]:
        with pytest.raises(SystemExit):
            main(["export", "model", "other", *words])
        assert said in capsys.readouterr().err


def test_no_reward_of_the_package_runs_code():
    """Should one be added, it belongs into a process with limits, and `SECURITY.md` has to say so."""
    for file in (Path(__file__).parents[1] / "stateset_lightning" / "rewards").glob("*.py"):
        text = file.read_text()
        assert not re.search(r"(?<![.\w])(exec|eval)\(|os\.system\(", text), file  # `model.eval()` is something else
