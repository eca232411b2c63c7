"""Checkpoints that also see, and rotary frequencies that depend on the length, against the models' own forward."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from model_sizes import SIZES as TEXT
from module_runs import fit, make_data, make_module, make_trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma3Config,
    Gemma4Config,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    Llama4Config,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from stateset_lightning.algorithm import GRPO
from stateset_lightning.cli import export, generate
from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import Group, LoRAConfig, Policy, PolicyConfig, load_model, text_model
from stateset_lightning.policy.lora import add_adapter
from stateset_lightning.policy.lora_state import base_digest
from stateset_lightning.rollout import InProcessEngine, RolloutConfig
from stateset_lightning.training.checks import check_quantized

GROUPS = [Group(list(range(20, 60)), [list(range(5, 35)), [7, 8, 9]]), Group([30, 31], [[4, 5]])]

WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
SIGHT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
QWEN_SIGHT = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
IMAGES = {"image_token_index": 370, "boi_token_index": 371, "eoi_token_index": 372}
QWEN_IMAGES = {"image_token_id": 370, "video_token_id": 371, "vision_start_token_id": 372, "vision_end_token_id": 373}


def gemma3() -> Any:
    return Gemma3Config(
        text_config={**TEXT, **WINDOW, "query_pre_attn_scalar": 8}, vision_config=SIGHT, mm_tokens_per_image=1, **IMAGES
    )


def gemma4() -> Any:
    text = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384, "num_kv_shared_layers": 0}
    sight = {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "position_embedding_size": 64}
    images = {"image_token_id": 370, "boi_token_id": 371, "eoi_token_id": 372, "audio_token_id": 373}
    return Gemma4Config(
        text_config={**TEXT, **WINDOW, **text, "global_head_dim": 8}, vision_config={**SIGHT, **sight}, **images
    )


def llama4() -> Any:
    text = {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}
    sight = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    return Llama4Config(
        text_config={**TEXT, **text, "interleave_moe_layer_step": 2},
        vision_config={**SIGHT, **sight, "intermediate_size": 64},
        **IMAGES,
    )


def mistral3() -> Any:
    text = {**TEXT, "model_type": "mistral", "sliding_window": None}
    return Mistral3Config(text_config=text, vision_config={**SIGHT, "model_type": "pixtral"}, image_token_index=370)


def qwen2_5_vl() -> Any:
    return Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN_SIGHT, **QWEN_IMAGES)


def qwen3_vl() -> Any:
    sight = {**QWEN_SIGHT, "deepstack_visual_indexes": [0], "num_position_embeddings": 4}
    return Qwen3VLConfig(text_config=QWEN_TEXT, vision_config=sight, **QWEN_IMAGES)


COMPOSITES = {make.__name__: make for make in (gemma3, gemma4, llama4, mistral3, qwen2_5_vl, qwen3_vl)}


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[[str], Path]:
    """`composite(name)` -> the folder of a small checkpoint that also sees; made once."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                AutoModelForMultimodalLM.from_config(COMPOSITES[name]()).save_pretrained(folders[name])
            tiny_tokenizer.save_pretrained(folders[name])
            (folders[name] / "preprocessor_config.json").write_text('{"size": 28}')
        return folders[name]

    return folder


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, groups: Sequence[Group] = GROUPS) -> Tensor:
    """Of each completion by itself."""
    logprobs = []
    for group in groups:
        for completion in group.completions:
            logits = model(input_ids=torch.tensor([[*group.prompt, *completion]])).logits[0]
            predicting = logits[len(group.prompt) - 1 : -1].log_softmax(-1)
            logprobs.append(predicting[range(len(completion)), list(completion)])
    return torch.cat(logprobs)


def length(turns: Any, context: Any) -> float:
    """A reward that differs within most groups."""
    return float(len(turns[-1].content))


def greedy(policy: Policy, tokenizer: Any) -> list[int]:
    """The first group's completion, sampled beside a shorter prompt."""
    engine = InProcessEngine(tokenizer)
    engine.sync(policy)
    sampling = RolloutConfig(num_generations=2, max_new_tokens=12)
    rollout = engine.generate([list(group.prompt) for group in GROUPS], 1, sampling, [1, 2], greedy=True)
    return rollout.completion_tokens_T[: rollout.lengths_N[0]].tolist()


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_text_model_of_a_composite_checkpoint_is_scored_sampled_and_trained_as_its_own_forward(
    composite: Callable[[str], Path], tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    config = PolicyConfig(str(composite(name)))
    own = AutoModelForMultimodalLM.from_pretrained(config.model_name).eval()
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        policy = Policy(load_model(config), config)
    assert f"is a {type(own).__name__}: its text model is trained, the rest (" in caplog.text
    assert policy.context_length == 512
    scores = policy.score(GROUPS)[0]
    torch.testing.assert_close(scores.detach(), own_logprobs(own), atol=1e-5, rtol=0)
    expected = own.generate(torch.tensor([GROUPS[0].prompt]), max_new_tokens=12, do_sample=False, eos_token_id=1)
    assert greedy(policy, tiny_tokenizer) == expected[0, 40:].tolist()
    scores.sum().backward()
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in policy.model.named_parameters() if p.grad is not None}
    sees = ("vision", "visual", "multi_modal_projector", "embed_vision")
    assert trained == {name for name, _ in policy.model.named_parameters() if not any(part in name for part in sees)}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj"]])
@pytest.mark.parametrize("name", ["gemma3", "llama4"])  # the latter has a router that is a linear layer
def test_an_adapter_sits_on_the_text_model_alone(
    composite: Callable[[str], Path], name: str, targets: str | list[str]
) -> None:
    model = load_model(PolicyConfig(str(composite(name)), lora=LoRAConfig(rank=2, target_modules=targets)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) >= 8
    assert all("language_model" in name and "lora_" in name and "router" not in name for name in trained)


def test_routers_of_experts_stay_under_an_adapter() -> None:
    """As linear layers, and as parameters, on which peft puts adapters where it knows the model's experts."""
    granite = GraniteMoeForCausalLM(GraniteMoeConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1))
    mixtral = MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4))
    hunyuan = HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**TEXT, num_experts=4, moe_topk=2))
    for model in (granite, phimoe(), mixtral, hunyuan):
        add_adapter(model, LoRAConfig(rank=2), seed=0)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert not [name for name in trained if re.search(r"router|\.gate\.", name)]
    assert any("experts" in name for name in trained)
    assert mixtral.peft_config["default"].target_parameters == {"gate_up_proj", "down_proj"}  # as it is saved


@pytest.mark.parametrize("kind", ["jamba", "mamba2"])
def test_no_adapter_sits_where_mamba_reads_weights_past_their_layer(kind: str) -> None:
    """There it would change nothing but what is sampled, where it is merged."""
    sizes = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    kinds = {"mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1}}
    config = CONFIG_MAPPING[kind](**sizes, **kinds.get(kind, {"num_experts": 2, "attn_layer_period": 9}))
    model = AutoModelForCausalLM.from_config(config).eval()
    add_adapter(model, LoRAConfig(rank=2), seed=0)
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_B" in name}
    assert "in_proj" in adapted
    assert not adapted & {"dt_proj", "out_proj"}


def test_what_a_composite_checkpoint_is_known_by_holds_its_text_model(composite: Callable[[str], Path]) -> None:
    model = load_model(PolicyConfig(str(composite("gemma3"))))
    before = base_digest(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert base_digest(model) != before


def test_a_trained_composite_checkpoint_is_exported_whole_under_the_names_of_its_source(
    composite: Callable[[str], Path], tmp_path: Path
) -> None:
    source = composite("gemma3")
    old = load_file(source / "model.safetensors")
    trainer = fit(tmp_path, make_module(str(source), reward=length), make_data(batch_size=2), max_steps=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    export.main([str(tmp_path / "run.ckpt"), str(tmp_path / "out")])
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert new.keys() == old.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith("language_model.model.") for name in changed)  # as on the hub, which servers know
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 28}'
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "Gemma3ForConditionalGeneration"
    ]


# Rotary frequencies that depend on the length
# ----------------------------------------------------------------------------------------------------------------------

LONG = {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [1.5, 4.0, 9.0, 20.0]}


def phi3() -> PreTrainedModel:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **LONG}
    return Phi3ForCausalLM(Phi3Config(**TEXT, rope_parameters=rope, original_max_position_embeddings=64))


def phimoe() -> PreTrainedModel:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_mscale": 1.0, "long_mscale": 1.3, **LONG}
    return PhimoeForCausalLM(PhimoeConfig(**TEXT, rope_parameters=rope, num_local_experts=2, num_experts_per_tok=1))


def dynamic() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "max_position_embeddings": 64}, rope_parameters=rope))


@pytest.mark.parametrize("make", [phi3, phimoe, dynamic])
def test_a_completions_log_probs_do_not_depend_on_what_else_is_in_the_batch(
    make: Callable[[], PreTrainedModel], tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    policy = Policy(model, PolicyConfig("random", scoring="padded"))
    short, long = Group([30, 31, 32], [[4, 5, 6]]), Group(list(range(20, 110)), [[7, 8, 9]])

    def scores(groups: list[Group]) -> Tensor:
        return policy.score_without_gradient(groups)[0]

    assert (scores([short, long])[:3] - scores([short])).abs().max() > 1e-3  # as transformers has it
    expected = own_logprobs(model, [long])
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        policy.prepare_for(93)
        policy.prepare_for(93)
    assert caplog.text.count("this run uses those of 93 tokens, its longest prompt and max_new_tokens") == 1
    alone = scores([short])
    torch.testing.assert_close(scores([short, long])[:3], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores([long]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores([short]), alone, atol=0, rtol=0)


def test_a_run_uses_the_frequencies_of_its_longest_sequence(
    tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    phi3().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    module = make_module(str(tmp_path / "model"), algorithm=GRPO(beta=0.1))
    rows = [{"prompt": "1" * length, "target": "1"} for length in (4, 70)]
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        trainer = fit(tmp_path, module, make_data(train=rows, validation=None, batch_size=2), max_steps=1)
    longest = trainer.datamodule.longest_prompt + 5  # type: ignore[attr-defined]
    assert longest > 70
    assert f"this run uses those of {longest} tokens" in caplog.text
    assert module.policy is not None
    assert isinstance(module.reference, Policy)
    assert module.policy.longest == module.reference.longest == longest
    assert module.metrics.last["policy/sampling_difference"] < 1e-4
    rows = [{"prompt": "1" * 80, "target": "1"}]
    fit(tmp_path, module, make_data(train=rows, validation=None, batch_size=1), max_steps=1)
    assert module.policy.longest == module.reference.longest == longest + 10


def test_weights_go_on_with_the_frequencies_that_they_were_trained_with(
    tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Validated on shorter prompts, in the same process and from a checkpoint; resumed for shorter completions."""
    phi3().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")

    def module(**options: Any) -> Any:
        return make_module(str(tmp_path / "model"), algorithm=GRPO(beta=0.1), **options)

    def data(length: int) -> Any:
        rows = [{"prompt": "1" * length, "target": "1"}]
        return make_data(train=rows, validation=rows, batch_size=1)

    trained = module()
    trainer = fit(tmp_path, trained, data(70), max_steps=1)
    trainer.save_checkpoint(checkpoint := tmp_path / "model.ckpt")
    longest = trained.policy.longest
    assert longest > 70
    trainer.validate(trained, data(4))
    assert trained.policy.longest == longest
    for given in (None, checkpoint):  # untrained weights have no frequencies to keep
        validated = module()
        make_trainer(tmp_path, limit_val_batches=1).validate(validated, data(4), ckpt_path=given)
        assert (validated.policy.longest == longest) == (given is not None)
    resumed = module(rollout=RolloutConfig(num_generations=4, max_new_tokens=2))
    fit(tmp_path, resumed, data(70), max_steps=2, ckpt_path=checkpoint)
    assert resumed.policy.longest == resumed.reference.longest == longest
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        generate.main(["--ckpt_path", str(checkpoint), "--prompt", "1", "--max_new_tokens", "2"])
    assert f"this run uses those of {longest} tokens" in caplog.messages[-1]


# Quantised checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_fp8_is_loaded_dequantized(
    tmp_path: Path, model_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    expected, stored = dict(weights), dict(weights)
    for name, weight in weights.items():
        if "_proj" in name:
            scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[name.replace("weight", "weight_scale_inv")] = scale.reshape(1, 1)
            expected[name] = stored[name].float() * scale
    save_file(stored, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        model = load_model(PolicyConfig(str(tmp_path / "model")))
    assert "has weights in fp8: dequantized, since no gradient passes them" in caplog.text
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_quantized_weights_are_trained_by_an_adapter_alone(tiny_model: PreTrainedModel) -> None:
    tiny_model.hf_quantizer = object()  # as transformers marks it
    policy = Policy(tiny_model, PolicyConfig("tiny"))
    with pytest.raises(ConfigError, match=r"its weights are quantized.*train an adapter, model.policy.lora"):
        check_quantized(policy)
    add_adapter(tiny_model, LoRAConfig(), seed=0)
    check_quantized(Policy(tiny_model, PolicyConfig("tiny", lora=LoRAConfig())))


def test_every_reading_of_a_models_configuration_goes_through_its_text_configuration() -> None:
    """Sizes, windows and positions of a composite model stand in the configuration of its text model."""
    package = Path(text_model.__file__).parents[1]
    # What transformers itself keeps at the top: tied embeddings, labels, and which layers a cache has.
    kept = r"\.get_text_config\(\)|\.tie_word|\.id2label|\.model_type|\.to_json_string|\.save_pretrained|\)|,"
    top = rf"model\.config\b(?!{kept})"
    found = [
        f"{path.name}: {line.strip()}"
        for room in ("policy", "rollout", "training", "rewards", "cli")
        for path in (package / room).rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(top, line)
    ]
    assert found == []
