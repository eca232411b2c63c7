"""Adapters: nothing at first, the same gradients on every path, loaded strictly, merged without touching the model
under them.
"""

import copy
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from policy.test_policy import GROUPS, PACKED, assert_same_gradients, assert_same_scores, naive_scores
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import LoRAConfig, Policy, PolicyConfig, load_model, save_adapter
from stateset_lightning.policy.lora import (
    adapter_off,
    adapter_weights,
    add_adapter,
    merge_adapter,
    merged_adapter,
    trained_names,
    write_adapter,
)

IDS = torch.arange(20, 60)[None]


def adapted(model: Any, seed: int = 1, **options: Any) -> Any:
    """The model with an adapter of rank 4."""
    add_adapter(model, LoRAConfig(**{"rank": 4, "alpha": 8, **options}), seed)
    return model


def move(model: nn.Module, size: float = 0.1) -> None:
    """An adapter as if it had been trained: both factors far from zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(input_ids=IDS).logits
    return values


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def gradients(model: nn.Module, scores: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(scores[0]))
    (scores[0] * weights + scores[1] * weights.flip(0) * 0.3).sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# New
# ----------------------------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_is_all_that_trains(
    architecture: str, make_model: Callable[..., Any]
) -> None:
    plain, model = make_model(architecture), adapted(make_model(architecture))
    assert torch.equal(logits(model), logits(plain))
    names = trained_names(model)
    assert names
    assert all("lora_" in name for name in names)
    assert not any("lm_head" in name for name in names)
    parameters = dict(model.named_parameters())
    assert all(bool(parameters[name].any()) == ("lora_A" in name) for name in names)  # B is zero


def test_its_noise_follows_from_the_seed_alone(make_model: Callable[..., Any]) -> None:
    def first(seed: int) -> Tensor:
        model = adapted(make_model("llama"), seed)
        return dict(model.named_parameters())[trained_names(model)[0]]

    state = torch.get_rng_state()
    once = first(1)
    torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(once, first(1))
    assert not torch.equal(once, first(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", PACKED)
def test_packed_and_padded_gradients_agree(name: str, make_model: Callable[..., Any]) -> None:
    model = adapted(make_model(name))
    oracle = copy.deepcopy(model)
    packed, padded = (
        Policy(model, PolicyConfig("random", scoring="packed")),
        Policy(oracle, PolicyConfig("random", scoring="padded")),
    )
    assert packed.uses_packed_scoring
    assert packed.uses_chunked_head
    move(model)
    move(oracle)
    assert_same_scores(packed.score(GROUPS), naive_scores(oracle, GROUPS))
    expected = gradients(oracle, padded.score(GROUPS))
    assert set(expected) == set(trained_names(model))
    assert_same_gradients(gradients(model, packed.score(GROUPS)), expected)


def test_gradient_checkpointing_keeps_the_gradients(model_folder: Callable[..., Path]) -> None:
    """Nothing that enters the first layer requires a gradient: reentrant checkpointing would give none."""

    def of(checkpointing: bool) -> dict[str, Tensor]:
        config = PolicyConfig(str(model_folder("llama")), lora=LoRAConfig(rank=4), gradient_checkpointing=checkpointing)
        policy = Policy(load_model(config), config).train()
        move(policy.model)
        assert policy.model.is_gradient_checkpointing == checkpointing
        return gradients(policy.model, policy.score(GROUPS))

    kept, recomputed = of(False), of(True)
    assert any(gradient.any() for gradient in kept.values())
    assert_same_gradients(recomputed, kept)


def test_an_adapted_output_embedding_is_scored_with_all_logits(
    make_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(make_model("llama"), target_modules=["q_proj", "lm_head"])
    with caplog.at_level(logging.WARNING):
        policy = Policy(model, PolicyConfig("random"))
    assert "its output embedding is adapted" in caplog.text
    assert not policy.uses_chunked_head
    move(model)
    assert_same_scores(policy.score(GROUPS), naive_scores(model, GROUPS))


def test_dropout_only_where_asked_and_only_in_training(make_model: Callable[..., Any]) -> None:
    for dropout in (0.0, 0.5):
        policy = Policy(adapted(make_model("llama"), dropout=dropout), PolicyConfig("random"))
        move(policy.model)
        expected = policy.score_without_gradient(GROUPS)[0]
        policy.train()
        with torch.random.fork_rng(devices=[]):
            assert torch.equal(policy.score_without_gradient(GROUPS)[0], expected)
            differs = not torch.allclose(policy.score(GROUPS)[0], expected, atol=1e-3)
        assert differs == (dropout > 0)
    assert PolicyConfig("x", lora=LoRAConfig(dropout=0.1)).has_dropout
    assert PolicyConfig("x", dropout=0.1).has_dropout
    assert not PolicyConfig("x", lora=LoRAConfig()).has_dropout


def test_the_adapter_is_float32_on_a_smaller_model(model_folder: Callable[..., Path]) -> None:
    model = load_model(PolicyConfig(str(model_folder("llama")), dtype="bfloat16", lora=LoRAConfig(rank=4)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    move(model)
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("others", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_copies_and_biases_keep_the_models_dtype_in_which_they_compute(
    others: dict[str, Any], model_folder: Callable[..., Path]
) -> None:
    lora = LoRAConfig(rank=4, peft_kwargs=others)
    model = load_model(PolicyConfig(str(model_folder("qwen2")), dtype="bfloat16", lora=lora))
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert {dtype for name, dtype in trained.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in trained.items() if "lora_" not in name} == {torch.bfloat16}
    move(model)
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["no_such_layer"]}, "model.policy.lora: Target modules .*no_such_layer.* not found"),
        ({"peft_kwargs": {"no_such_key": 1}}, "model.policy.lora.peft_kwargs=.*no_such_key"),
        ({"peft_kwargs": {"lora_alpha": 1}}, r"peft_kwargs\.lora_alpha: set model\.policy\.lora\.alpha instead"),
        (
            {"peft_kwargs": {"init_lora_weights": "pissa"}},
            "init_lora_weights='pissa': use true or gaussian",
        ),
        ({"peft_kwargs": {"init_lora_weights": False}}, "init_lora_weights=False: use true or gaussian"),
        ({"peft_kwargs": {"layer_replication": [[0, 2], [1, 2]]}}, "layer_replication changes the model under"),
        ({"peft_kwargs": {"alora_invocation_tokens": [1]}}, "alora_invocation_tokens changes the model under"),
    ],
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], message: str, make_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(make_model("llama"), **options)


def test_peft_says_of_a_bias_that_no_layer_takes_that_it_cannot_be_merged(make_model: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match="`lora_bias=True` was passed but the targeted layer .* has no bias"):
        model = adapted(make_model("llama"), peft_kwargs={"lora_bias": True})
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"), merged_adapter(model):
        pass


def test_further_arguments_reach_peft(make_model: Callable[..., Any]) -> None:
    model = adapted(make_model("llama"), peft_kwargs={"rank_pattern": {"q_proj": 2}, "use_rslora": True})
    parameters = dict(model.named_parameters())
    assert {len(parameters[name]) for name in trained_names(model) if "q_proj.lora_A" in name} == {2}
    assert {len(parameters[name]) for name in trained_names(model) if "k_proj.lora_A" in name} == {4}
    assert model.peft_config["default"].use_rslora


def test_without_peft_the_error_says_what_to_install(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'needs the library peft: pip install "stateset-lightning\[lora\]"'):
        adapted(make_model("llama"))


def test_quantization_settings_reach_transformers(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    given: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        given.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    options = {"quantization_config": settings, "device_map": {"": 0}}
    with pytest.raises(ConfigError, match="seen"):
        load_model(PolicyConfig(str(model_folder("llama")), dtype="bfloat16", lora=LoRAConfig(), model_kwargs=options))
    assert given["quantization_config"] == settings
    assert given["device_map"] == {"": 0}
    assert given["dtype"] == torch.bfloat16


# Off and merged
# ----------------------------------------------------------------------------------------------------------------------

MANY = (
    {},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"peft_kwargs": {"use_dora": True}},
    {"peft_kwargs": {"modules_to_save": ["norm"]}},
)


@pytest.mark.parametrize("options", MANY, ids=str)
def test_off_is_the_model_under_it(options: dict[str, Any], make_model: Callable[..., Any]) -> None:
    model = adapted(make_model("llama"), **options)
    move(model)
    moved, trained = logits(model), trained_names(model)
    with adapter_off(model):
        assert torch.equal(logits(model), logits(make_model("llama")))
        assert trained_names(model) == trained
    assert torch.equal(logits(model), moved)
    assert not torch.allclose(moved, logits(make_model("llama")), atol=0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"peft_kwargs": {"use_dora": True}}], ids=str)
def test_merging_for_a_while_leaves_every_bit_in_place(
    name: str, options: dict[str, Any], make_model: Callable[..., Any]
) -> None:
    model = adapted(make_model(name), **options)
    move(model)
    policy = Policy(model, PolicyConfig("random"))
    before, places, moved = copy.deepcopy(model.state_dict()), dict(model.named_parameters()), logits(model)

    def fail_inside() -> None:
        with policy.merged_adapter():
            assert any(layer.merged for layer in model.modules() if hasattr(layer, "merged_adapters"))
            torch.testing.assert_close(logits(model), moved, atol=2e-4, rtol=1e-4)
            raise KeyError  # an exception while sampling

    with pytest.raises(KeyError):
        fail_inside()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter is places[key] for key, parameter in model.named_parameters())
    assert torch.equal(logits(model), moved)


def test_a_small_update_would_be_lost_in_bfloat16_and_is_not_merged(model_folder: Callable[..., Path]) -> None:
    model = load_model(PolicyConfig(str(model_folder("llama")), dtype="bfloat16", lora=LoRAConfig(rank=4)))
    move(model, 1e-4)
    moved = logits(model)
    with merged_adapter(model):
        assert torch.equal(logits(model), moved)
    lost = merge_adapter(model)
    assert lost > 0.5  # most of the update


@pytest.mark.parametrize(("name", "options"), [("gpt2", {}), *(("llama", options) for options in MANY)], ids=str)
def test_merged_for_good_it_is_a_plain_model(
    name: str, options: dict[str, Any], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = adapted(make_model(name), **options)
    move(model)
    moved = logits(model)
    assert merge_adapter(model) == 0
    torch.testing.assert_close(logits(model), moved, atol=2e-4, rtol=1e-4)
    assert set(model.state_dict()) == set(make_model(name).state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(PolicyConfig(str(tmp_path)))), logits(model))


def test_a_tied_embedding_cannot_take_an_adapter(make_model: Callable[..., Any]) -> None:
    model = adapted(make_model("qwen2"), target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ConfigError, match="tied to another"):
        merge_adapter(model)


EXPERTS = {"qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 4}, "gpt_oss": {"num_local_experts": 4}}
BY_PARAMETER = {"peft_kwargs": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}}


@pytest.mark.parametrize(("name", "options"), [("qwen3_moe", {}), ("gpt_oss", BY_PARAMETER)])
def test_fused_experts_are_merged_for_a_while_and_for_good(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Which peft finds by itself, and which it is told; one transposed, one not."""
    sizes = {"num_experts_per_tok": 2, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CONFIG_MAPPING[name](vocab_size=384, hidden_size=32, intermediate_size=16, **sizes, **EXPERTS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    names = set(model.state_dict())
    adapted(model, **options)
    assert sum("experts" in name for name in trained_names(model)) == 4
    move(model)
    moved = logits(model)
    with merged_adapter(model):
        experts = [layer for layer in model.modules() if hasattr(layer, "parameter_name")]
        assert all(layer.merged for layer in experts)
        torch.testing.assert_close(logits(model), moved, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(model), moved)
    assert merge_adapter(model) == 0
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_model(PolicyConfig(str(tmp_path)))), moved, atol=1e-5, rtol=1e-4)


def test_a_tied_copy_that_is_trained_is_saved_for_peft(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel

    tied = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    config = PolicyConfig(str(model_folder("qwen2")), lora=LoRAConfig(rank=4, peft_kwargs=tied))
    policy = Policy(load_model(config), config)
    move(policy.model)
    save_adapter(policy, tmp_path)
    loaded = PeftModel.from_pretrained(load_model(PolicyConfig(config.model_name)), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(policy.model))


# Saved and loaded
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, model_folder: Callable[..., Path]) -> tuple[str, Path, Tensor]:
    """A base, the folder of a trained adapter with dropout in its config, and their logits."""
    config = PolicyConfig(str(model_folder("llama")), lora=LoRAConfig(rank=4, alpha=12, dropout=0.3))
    policy = Policy(load_model(config), config)
    move(policy.model)
    save_adapter(policy, tmp_path / "adapter")
    return config.model_name, tmp_path / "adapter", logits(policy.model)


def test_peft_loads_what_is_saved(saved: tuple[str, Path, Tensor]) -> None:
    from peft import PeftModel

    base, folder, expected = saved
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert base not in (folder / "adapter_config.json").read_text()  # nothing of the machine
    loaded = PeftModel.from_pretrained(load_model(PolicyConfig(base)), str(folder)).eval()
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("others", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}])
def test_an_adapter_with_more_than_factors_is_loaded_and_merged(
    others: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = PolicyConfig(str(model_folder("llama")), lora=LoRAConfig(rank=4, peft_kwargs=others))
    policy = Policy(load_model(config), config)
    move(policy.model)
    save_adapter(policy, tmp_path)
    loaded = load_model(PolicyConfig(config.model_name, adapter=str(tmp_path)))
    assert torch.equal(logits(loaded), logits(policy.model))
    merge_adapter(loaded)
    torch.testing.assert_close(logits(loaded), logits(policy.model), atol=1e-4, rtol=1e-4)


def test_training_goes_on_from_a_saved_adapter(
    saved: tuple[str, Path, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    base, folder, expected = saved
    model = load_model(PolicyConfig(base, adapter=str(folder)))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.train()), expected)  # its own dropout was not asked for
    assert len(trained_names(model)) == 28
    with caplog.at_level(logging.INFO):
        again = load_model(PolicyConfig(base, adapter=str(folder), lora=LoRAConfig(rank=64, dropout=0.25)))
    assert "has its own rank 4 and alpha 12, not model.policy.lora's" in caplog.text
    assert torch.equal(logits(again), expected)
    assert again.peft_config["default"].lora_dropout == 0.25


def test_loading_is_strict(saved: tuple[str, Path, Tensor]) -> None:
    base, folder, _ = saved
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    without = {key: value for key, value in weights.items() if key != name}
    for changed, message in (
        (without, "it has no weights for model"),
        ({**weights, "base_model.model.model.layers.9.lora_A.weight": torch.zeros(2, 2)}, "no place for: .*layers.9"),
        ({**weights, name: torch.zeros(3, 3)}, "does not fit the model: .*size mismatch"),
    ):
        save_file(changed, file)
        with pytest.raises(ConfigError, match=message):
            load_model(PolicyConfig(base, adapter=str(folder)))
    file.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(PolicyConfig(base, adapter=str(folder)))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]})
    )
    save_file(weights, file)
    with pytest.raises(ConfigError, match="IA3, and not LoRA"):
        load_model(PolicyConfig(base, adapter=str(folder)))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(ConfigError, match="init_lora_weights='pissa'"):
        load_model(PolicyConfig(base, adapter=str(folder)))


def test_a_pickle_and_a_missing_folder_are_refused(saved: tuple[str, Path, Tensor], tmp_path: Path) -> None:
    base, folder, _ = saved
    with pytest.raises(ConfigError, match=r"model\.policy\.adapter='.*none' cannot be loaded"):
        load_model(PolicyConfig(base, adapter=str(tmp_path / "none")))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weights": Path("x")}, folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match="a pickle file with more in it than tensors"):
        load_model(PolicyConfig(base, adapter=str(folder)))


def test_an_adapter_is_no_model(saved: tuple[str, Path, Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"is an adapter: give its base, and the adapter as model\.policy\.adapter"):
        load_model(PolicyConfig(str(saved[1])))


def test_a_hub_name_stays_in_the_saved_config(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = adapted(make_model("llama"))
    write_adapter(model, "Org/Model-1B", tmp_path, adapter_weights(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "Org/Model-1B"
