"""A file's word is never the user's: what checkpoints, model folders, adapters and configs beside them say is data."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import RUN, run_model_folder
from foreign_code import OWN_CODE
from module_runs import DigitReward
from transformers import dynamic_module_utils

from stateset_lightning import GRPOLightningModule
from stateset_lightning.cli.main import main
from stateset_lightning.cli.trained import load_trained

CHECKPOINT = RUN / "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    """The folder of two runs of a small model in the folder `model`: `runs` of the whole model, `lora/runs`."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        run_model_folder(folder, patch, model_folder("llama"))
        lora = ["--model.policy.lora.rank=2", "--trainer.logger.save_dir=lora/runs"]
        main(["fit", "--config", "config.yaml", *lora])
    return folder


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """A copy of the runs, in which importing `foreign` leaves a file `executed`."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "foreign", raising=False)
    for place in ("", "model"):
        Path(place, "foreign.py").write_text(OWN_CODE.format(executed=str(tmp_path / "executed")))


def edit(file, **said):
    content = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps(content | said))


def edit_checkpoint(change, file=CHECKPOINT):
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def edit_config(**data):
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    config["data"].update(data)
    config["model"]["reward"] = [{"class_path": "foreign.Engine"}]
    config["trainer"]["callbacks"] = [{"class_path": "foreign.Engine"}]
    (RUN / "config.yaml").write_text(yaml.safe_dump(config))


def has_environment(**said):
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    config["model"]["environment"] = said
    (RUN / "config.yaml").write_text(yaml.safe_dump(config))


def policy_says(**said):
    edit_checkpoint(lambda content: content["hyper_parameters"]["policy"].update(said))


def model_class():
    auto = {"AutoConfig": "foreign.OwnConfig", "AutoModelForCausalLM": "foreign.OwnModel"}
    edit("model/config.json", model_type="own", auto_map=auto)


def model_class_and_claim():
    model_class()
    policy_says(trust_remote_code=True)


def tokenizer_class():
    auto = {"AutoTokenizer": ["foreign.OwnTokenizer", "foreign.OwnTokenizer"]}
    edit("model/tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto)


MEGATRON = {"megatron_config": {"a": 1}, "megatron_core": "foreign"}


def adapter_module():
    edit("adapter/adapter_config.json", **MEGATRON)


def module_in_checkpoint():
    def change(content):
        content["stateset"]["adapter"]["config"].update(MEGATRON)

    edit_checkpoint(change, Path("lora") / CHECKPOINT)


GENERATE = ["generate", "--prompt", "What is 3 + 4?", "--device", "cpu", "--ckpt_path"]
OF_CONFIG = ["--config", "config.yaml", "--data.test", "rows.jsonl"]
ADAPTER = ["--model.policy.adapter", "adapter"]


@pytest.mark.parametrize(
    ("said_by", "words", "said"),
    [
        *((model_class, [command, *OF_CONFIG], "contains custom code") for command in ("test", "doctor")),
        (model_class, [*GENERATE, "model"], "contains custom code"),
        (model_class, ["export", "model", "out"], "contains custom code"),
        (model_class_and_claim, [*GENERATE, str(CHECKPOINT)], "contains custom code"),
        (model_class_and_claim, ["fit", *OF_CONFIG, "--ckpt_path", "last"], "contains custom code"),
        (tokenizer_class, ["fit", *OF_CONFIG], "contains custom code"),
        (tokenizer_class, [*GENERATE, str(CHECKPOINT)], "contains custom code"),
        (adapter_module, ["fit", *OF_CONFIG, *ADAPTER], "megatron_config would have 'foreign' imported"),
        (module_in_checkpoint, [*GENERATE, str("lora" / CHECKPOINT)], "megatron_config would have 'foreign' imported"),
        (lambda: policy_says(dtype="load"), [*GENERATE, str(CHECKPOINT)], "model.policy.dtype='load' cannot be used"),
        (lambda: policy_says(lora={"rnk": 1}), [*GENERATE, str(CHECKPOINT)], "model.policy.lora.rnk is unknown here"),
        (
            lambda: edit_checkpoint(lambda content: content["hyper_parameters"]["rollout"].update(max_new_tokens="1)")),
            ["export", str(CHECKPOINT), "out"],
            "model.rollout.max_new_tokens='1)' cannot be used",
        ),
        (lambda: edit_config(system_prompt=["a"]), ["export", str(CHECKPOINT), "out"], "data.system_prompt=['a']"),
        (lambda: edit_config(chat_template_kwargs=3), ["export", str(CHECKPOINT), "out"], "chat_template_kwargs=3"),
        (lambda: has_environment(max_turns="x"), [*GENERATE, str(CHECKPOINT)], "environment.max_turns='x' cannot be"),
        (lambda: has_environment(turns=2), [*GENERATE, str(CHECKPOINT)], "model.environment.turns is unknown here"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_a_file_asks_for_is_refused_in_a_line(said_by, words, said, capsys):
    said_by()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    told = capsys.readouterr()
    assert stopped.value.code == (1 if words[0] == "doctor" else 2)
    assert said in told.err + told.out
    assert not Path("executed").exists()
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
def test_a_config_beside_a_checkpoint_has_nothing_imported_and_writes_no_code_into_the_card():
    code = "open('executed', 'w')"
    edit_config(system_prompt=f"```\n{code}", chat_template_kwargs={f"a={code}, b": 1}, train=f"x\n```python\n{code}")
    main([*GENERATE, str(CHECKPOINT)])
    main(["export", str(CHECKPOINT), "out"])
    assert not Path("executed").exists()
    card = Path("out/README.md").read_text()
    assert card.count("```python\n") == 1
    compile(python := card.split("```python\n")[1].split("\n```")[0], "card", "exec")
    assert not any(line.lstrip().startswith(code) for line in python.splitlines())
    assert f"options |= {{{f'a={code}, b'!r}: 1}}" in python


@pytest.mark.usefixtures("here")
def test_an_environment_runs_only_where_its_config_is_named(capsys):
    has_environment(factory="foreign.Engine", max_turns=3)
    main([*GENERATE, str(CHECKPOINT)])
    assert f"runs where you name the config: --config {RUN.absolute() / 'config.yaml'}" in capsys.readouterr().out
    assert not Path("executed").exists()
    with pytest.raises(SystemExit):  # an Engine is no environment
        main([*GENERATE, str(CHECKPOINT), "--config", str(RUN / "config.yaml")])
    assert Path("executed").exists()
    has_environment(max_turns=2, options={"responses": ["Are you sure?"]})  # a scripted user is data
    main([*GENERATE, str(CHECKPOINT)])
    assert "[end] ended_by=" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_attention_and_experts_are_not_a_model_folders_to_choose():
    edit("model/config.json", attn_implementation="eager", _attn_implementation="a/b", experts_implementation="a/b")
    config = load_trained("model").model.config
    assert config._attn_implementation == "sdpa"
    assert config._experts_implementation != "a/b"


@pytest.mark.usefixtures("here")
def test_load_from_checkpoint_makes_no_class_that_the_file_names():
    said = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "engine": {"class_path": "foreign.Engine"}}
    edit_checkpoint(lambda content: content["hyper_parameters"].update(said))
    GRPOLightningModule.load_from_checkpoint(CHECKPOINT, reward=DigitReward())
    assert not Path("executed").exists()
