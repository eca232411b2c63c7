"""A checkpoint of an adapter: what it holds, and which base, config and start it accepts."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from policy.test_lora import IDS, adapted, logits, move

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import LoRAConfig, Policy, PolicyConfig, load_model, save_adapter
from stateset_lightning.policy.lora_state import base_digest, check_same_kind


def make(config: PolicyConfig) -> Policy:
    return Policy(load_model(config), replace(config, scoring="padded"))


@pytest.fixture
def config(model_folder: Callable[..., Path]) -> PolicyConfig:
    return PolicyConfig(str(model_folder("llama")), lora=LoRAConfig(rank=4))


def test_the_state_is_the_adapter_alone_and_strict_about_it(config: PolicyConfig) -> None:
    policy, other = make(config), make(config)
    move(policy.model)
    state = policy.state_dict()
    assert state
    assert all("lora_" in name for name in state)
    # as in a LightningModule
    holder, second = torch.nn.ModuleDict({"policy": policy}), torch.nn.ModuleDict({"policy": other})
    state = holder.state_dict()
    assert {name.removeprefix("policy.model.") for name in state} == set(policy.adapter.names)  # type: ignore[union-attr]
    second.load_state_dict(state)
    assert torch.equal(logits(other.model), logits(policy.model))
    name = next(iter(state))
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        second.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.9"):
        second.load_state_dict({**state, next(iter(state)).replace("layers.0", "layers.9"): torch.ones(32)})


def test_trained_copies_of_modules_are_part_of_it(config: PolicyConfig) -> None:
    policy = make(replace(config, lora=LoRAConfig(rank=4, peft_kwargs={"modules_to_save": ["norm"], "bias": "all"})))
    assert "model.model.norm.modules_to_save.default.weight" in policy.state_dict()
    assert "model.model.norm.original_module.weight" not in policy.state_dict()


def test_the_digest_knows_a_base_by_its_weights(make_model: Callable[..., Any]) -> None:
    model = adapted(make_model("llama"))
    digest = base_digest(model)
    assert digest == base_digest(adapted(make_model("llama"), seed=5, rank=2, target_modules=["q_proj"]))
    move(model)
    assert base_digest(model) == digest
    assert base_digest(copy.deepcopy(model).bfloat16()) == digest
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.base_layer.weight.mul_(1.01)
    assert base_digest(model) != digest


def test_another_base_config_or_start_is_refused(
    config: PolicyConfig, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    saved = make(config).adapter.state_dict()  # type: ignore[union-attr]
    torch.save(saved, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["base"]["model_name"] == config.model_name

    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    other = Policy(adapted(model, rank=4, alpha=32), PolicyConfig("Org/Other", revision="v2"))
    with pytest.raises(ConfigError, match=r"model_name=Org/Other at v2 is not the model .* trained on \(.*llama"):
        other.adapter.load_state_dict(saved)  # type: ignore[union-attr]
    for changed, message in (
        ({"rank": 8}, "r=8 differs from 4"),
        ({"rank": 4, "alpha": 8}, "lora_alpha=8 differs from 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(replace(config, lora=LoRAConfig(**changed))).adapter.load_state_dict(saved)  # type: ignore[union-attr]
    make(replace(config, lora=LoRAConfig(rank=4, dropout=0.2))).adapter.load_state_dict(saved)  # type: ignore[union-attr]

    save_adapter(make(config), tmp_path / "start")
    started = make(PolicyConfig(config.model_name, adapter=str(tmp_path / "start")))
    with pytest.raises(ConfigError, match=r"model\.policy\.adapter is given, but was not when the run started"):
        started.adapter.load_state_dict(saved)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"model\.policy\.adapter is not given, but was when the run started"):
        make(config).adapter.load_state_dict(started.adapter.state_dict())  # type: ignore[union-attr]


def test_a_whole_model_is_no_adapter_and_the_reverse(config: PolicyConfig) -> None:
    adapter = make(config).adapter
    assert adapter is not None
    check_same_kind(adapter, adapter.state_dict())
    check_same_kind(None, None)
    with pytest.raises(ConfigError, match=r"holds an adapter of rank 4 on .*: set model\.policy\.lora as in its run"):
        check_same_kind(None, adapter.state_dict())
    with pytest.raises(ConfigError, match=r"holds a whole model.*set model\.policy\.lora to null"):
        check_same_kind(adapter, None)


def test_an_adapter_that_was_loaded_is_its_own_start(config: PolicyConfig, tmp_path: Path) -> None:
    first = make(config)
    move(first.model)
    save_adapter(first, tmp_path / "start")
    policy = make(PolicyConfig(config.model_name, adapter=str(tmp_path / "start")))
    started = logits(policy.model)
    move(policy.model)
    moved, weights = logits(policy.model), {name: value.clone() for name, value in policy.state_dict().items()}

    def fail_inside() -> None:
        assert policy.adapter is not None
        with policy.adapter.at_start():
            assert torch.equal(logits(policy.model), started)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    assert torch.equal(logits(policy.model), moved)
    assert not torch.allclose(started, moved, atol=0.1)


def test_an_adapter_with_biases_starts_where_they_were(model_folder: Callable[..., Path]) -> None:
    """Switched off, an adapter leaves the model with the biases that were trained."""
    policy = make(PolicyConfig(str(model_folder("qwen2")), lora=LoRAConfig(rank=4, peft_kwargs={"bias": "all"})))
    started = logits(policy.model)
    move(policy.model)
    assert policy.adapter is not None
    with policy.adapter.at_start():
        assert torch.equal(logits(policy.model), started)
    assert not torch.allclose(logits(policy.model), started, atol=0.1)


def test_under_autocast_the_start_is_the_start_and_the_policy_itself_again(
    config: PolicyConfig, tmp_path: Path
) -> None:
    """Autocast keeps casts of the weights; of weights that are swapped under it they would be the others'."""
    first = make(config)
    move(first.model)
    save_adapter(first, tmp_path / "start")
    policy = make(PolicyConfig(config.model_name, adapter=str(tmp_path / "start")))
    assert policy.adapter is not None
    with torch.autocast("cpu", torch.bfloat16):
        started = logits(policy.model)
    move(policy.model)
    with torch.autocast("cpu", torch.bfloat16):
        moved = policy.model(input_ids=IDS).logits.detach()  # with gradient: autocast keeps casts of what requires one
        with policy.adapter.at_start():
            assert torch.equal(logits(policy.model), started)
        assert torch.equal(logits(policy.model), moved)
    assert not torch.allclose(started, moved, atol=0.1)
