"""Models and tokenizers from folders, and what is refused on the way."""

import importlib.util
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from policy.test_lora import move
from policy.test_policy import GROUPS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import (
    AdapterReference,
    Group,
    LoRAConfig,
    Policy,
    PolicyConfig,
    end_of_sequence_ids,
    load_model,
    load_tokenizer,
    make_reference,
)
from stateset_lightning.policy.loading import resolve_model_name
from stateset_lightning.tiny import TINY_FOLDER

IDS = torch.tensor([[20, 31, 42, 53, 64]])


@pytest.fixture
def folder_of(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A model folder of one's own, to be changed."""

    def copy(name: str, **changes: Any) -> Path:
        shutil.copytree(model_folder(name, **changes), tmp_path / name)
        return tmp_path / name

    return copy


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# Models
# ----------------------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_on_the_cpu_and_goes_to_the_device_that_lightning_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plain install has no accelerate; and an adapter has the same numbers on every device."""
    drawn_on: set[str] = set()
    draw = torch.nn.init.kaiming_uniform_

    def note(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if 2 in tensor.shape:  # the adapter's; the rest is filled from the file
            drawn_on.add(tensor.device.type)
        return draw(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", note)
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    with torch.device("meta"):
        model = load_model(PolicyConfig("tiny", lora=LoRAConfig(rank=2)))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert drawn_on == {"cpu"}


def test_a_folder_of_each_architecture_loads_as_it_was_saved(
    model_folder: Callable[..., Path], make_model: Callable[..., Any], architecture: str
) -> None:
    config = PolicyConfig(
        str(model_folder(architecture)), attn_implementation="eager" if architecture == "gemma2" else None
    )
    model, original = load_model(config), make_model(architecture)
    assert type(model) is type(original)
    assert not model.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    for (name, parameter), (original_name, expected) in zip(
        model.named_parameters(), original.named_parameters(), strict=True
    ):
        assert name == original_name
        assert torch.equal(parameter, expected)
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, atol=1e-6, rtol=0)
    assert end_of_sequence_ids(model, load_tokenizer(config)) == {1}
    assert Policy(model, config).context_length == 128


def test_tiny_is_the_bundled_folder(tiny_model: Any, tiny_tokenizer: Any) -> None:
    assert resolve_model_name("tiny") == str(TINY_FOLDER)
    assert type(tiny_model).__name__ == "Qwen2ForCausalLM"
    weights = load_file(TINY_FOLDER / "model.safetensors")
    assert torch.equal(tiny_model.model.norm.weight, weights["model.norm.weight"])
    assert (tiny_tokenizer.eos_token, tiny_tokenizer.eos_token_id) == ("<|end|>", 1)
    assert tiny_tokenizer.decode(tiny_tokenizer.encode("What is 12 * 3?")) == "What is 12 * 3?"


def test_the_default_dtype_gives_way_to_the_configs(model_folder: Callable[..., Path]) -> None:
    name = str(model_folder("llama"))
    assert load_model(PolicyConfig(name), torch.bfloat16).dtype == torch.bfloat16
    assert load_model(PolicyConfig(name, dtype="float16"), torch.bfloat16).dtype == torch.float16


def test_a_checkpoint_in_bfloat16_is_trained_in_float32_unless_told_otherwise(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    load_model(PolicyConfig(str(folder), dtype="bfloat16")).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(PolicyConfig(str(folder))).dtype == torch.float32


def test_the_attention_is_the_one_asked_for(model_folder: Callable[..., Path]) -> None:
    name = str(model_folder("llama"))
    eager = load_model(PolicyConfig(name, attn_implementation="eager"))
    assert eager.config._attn_implementation == "eager"
    assert load_model(PolicyConfig(name)).config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(IDS).logits, load_model(PolicyConfig(name))(IDS).logits, atol=1e-5, rtol=0)


def test_further_arguments_reach_transformers(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    renamed = {
        name.replace("model.norm", "model.final"): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    model = load_model(PolicyConfig(str(folder), model_kwargs={"key_mapping": {"^model.final": "model.norm"}}))
    assert torch.equal(model.model.norm.weight, renamed["model.final.weight"])


def test_an_argument_that_transformers_does_not_know_is_refused(model_folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be loaded.*'no_such_argument'"):
        load_model(PolicyConfig(str(model_folder("llama")), model_kwargs={"no_such_argument": 1}))


# Dropout
# ----------------------------------------------------------------------------------------------------------------------

LLAMA_DROPOUT = {"attention_dropout": 0.3}
GPT2_DROPOUT = {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}


def two_training_passes(folder: Path, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
    policy = Policy(load_model(PolicyConfig(str(folder), dropout=dropout)), PolicyConfig("random"))
    policy.train()
    groups = [Group(IDS[0].tolist(), [[7, 8, 9, 10], [11, 12]])]
    return policy.score(groups)[0].detach(), policy.score(groups)[0].detach()


@pytest.mark.parametrize(("name", "own"), [("llama", LLAMA_DROPOUT), ("gpt2", GPT2_DROPOUT)])
def test_a_models_own_dropout_is_replaced_by_ours(
    model_folder: Callable[..., Path], name: str, own: dict[str, float]
) -> None:
    folder = model_folder(name, **own)
    assert all(json.loads((folder / "config.json").read_text())[key] == value for key, value in own.items())
    first, second = two_training_passes(folder, 0.0)
    assert torch.equal(first, second)
    torch.manual_seed(0)
    first, second = two_training_passes(folder, 0.5)
    assert (first - second).abs().max() > 0.01
    config = load_model(PolicyConfig(str(folder), dropout=0.25)).config
    assert {getattr(config, key) for key in own} == {0.25}


# Gradient checkpointing
# ----------------------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_is_switched_on_in_the_form_that_works_with_frozen_inputs(
    model_folder: Callable[..., Path],
) -> None:
    model = load_model(PolicyConfig(str(model_folder("llama")), gradient_checkpointing=True))
    assert model.is_gradient_checkpointing
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    forwards: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    model(IDS, use_cache=False).logits.sum().backward()
    assert len(forwards) == 2
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert not load_model(PolicyConfig(str(model_folder("llama")))).is_gradient_checkpointing


# Refusals
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a/b/c", "../x"])
def test_a_missing_folder_is_refused_without_asking_a_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_model(PolicyConfig(name))
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_tokenizer(PolicyConfig(name))


def test_a_hugging_face_id_is_left_as_it_is() -> None:
    assert resolve_model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert resolve_model_name("gpt2") == "gpt2"


def test_a_folder_in_the_home_directory_is_found(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model_name(f"~/{folder.name}") == str(folder)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder without config.json: give one that `save_pretrained` wrote"):
        load_model(PolicyConfig(str(tmp_path)))


def test_a_folder_without_weights_is_refused(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(PolicyConfig(str(folder)))


def test_a_damaged_weight_file_is_refused(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(PolicyConfig(str(folder)))


def test_a_damaged_config_is_refused(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(PolicyConfig(str(folder)))


def test_weights_of_another_size_are_refused(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    edit(folder / "config.json", intermediate_size=52)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(PolicyConfig(str(folder)))


def test_a_checkpoint_that_lacks_weights_is_refused_rather_than_completed_at_random(
    folder_of: Callable[..., Path],
) -> None:
    folder = folder_of("llama")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ConfigError, match=r"has no weights for lm_head.weight, which would be random"):
        load_model(PolicyConfig(str(folder)))


def test_an_attention_that_does_not_exist_is_refused(model_folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be loaded.*no_such_attention"):
        load_model(PolicyConfig(str(model_folder("llama")), attn_implementation="no_such_attention"))


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickled_checkpoint_runs_no_code(folder_of: Callable[..., Path], tmp_path: Path, form: str) -> None:
    folder = folder_of("llama")
    (folder / "model.safetensors").unlink()
    objects = {"model.norm.weight": torch.zeros(32), "payload": Payload(tmp_path / "executed")}
    if form == "torch":
        torch.save(objects, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(objects, protocol=2))
    with pytest.raises(ConfigError, match=r"its weights are a pickle file.*could run code"):
        load_model(PolicyConfig(str(folder)))
    assert not (tmp_path / "executed").exists()


def test_a_folders_own_code_does_not_run_unless_trusted(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of("llama")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass OwnConfig: pass\n")
    edit(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    with pytest.raises(ConfigError, match=r"contains custom code.*trust_remote_code=true if you trust"):
        load_model(PolicyConfig(str(folder)))
    assert not (tmp_path / "executed").exists()


# Tokenizers
# ----------------------------------------------------------------------------------------------------------------------


def folder_with_tokenizer(folder: Path, **special_tokens: str) -> PolicyConfig:
    """The bundled tokenizer's vocabulary with no special tokens but these."""
    for file in folder.glob("*token*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_file=str(TINY_FOLDER / "tokenizer.json"), **special_tokens).save_pretrained(
        folder
    )
    return PolicyConfig(str(folder))


def test_a_tokenizer_without_an_end_token_is_refused(folder_of: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="its tokenizer has no end-of-sequence token; set `eos_token` in it"):
        load_tokenizer(folder_with_tokenizer(folder_of("llama")))


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token_and_says_so(
    folder_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        tokenizer = load_tokenizer(folder_with_tokenizer(folder_of("llama"), eos_token="<|end|>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert "has no pad token: '<|end|>' pads instead" in caplog.text


def test_a_tokenizers_own_pad_token_stays(folder_of: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        tokenizer = load_tokenizer(folder_with_tokenizer(folder_of("llama"), eos_token="<|end|>", pad_token="<|pad|>"))
    assert tokenizer.pad_token_id == 0
    assert caplog.records == []


def test_a_folder_without_a_tokenizer_is_refused(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(PolicyConfig(str(folder)))


# GGUF files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A file with a small llama, and a tokenizer beside it."""
    tiny_tokenizer.save_pretrained(tmp_path / "gguf")
    write_gguf(tmp_path / "gguf" / "small.gguf", make_model("llama", intermediate_size=64))
    return tmp_path / "gguf" / "small.gguf"


def test_a_gguf_file_is_a_model_as_any_other(
    gguf_file: Path, make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    config, original = PolicyConfig(str(gguf_file)), make_model("llama", intermediate_size=64)
    tokenizer = load_tokenizer(config)
    model = load_model(config, tokenizer=tokenizer)
    assert tokenizer.encode("What is 12 * 3?") == tiny_tokenizer.encode("What is 12 * 3?")
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    for name, expected in original.state_dict().items():
        rounding = 0.0 if expected.dim() == 1 else expected.abs().max() / 127  # of Q8_0, at most half of this
        assert (model.state_dict()[name] - expected).abs().max() <= rounding
    assert load_model(PolicyConfig(str(gguf_file), dtype="bfloat16")).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")  # which transformers refuses to do with quantized weights
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(load_model(PolicyConfig(str(tmp_path / "saved")))(IDS).logits, model(IDS).logits)


def without_tokenizer(file: Path) -> None:
    for each in file.parent.glob("tokenizer*"):
        each.unlink()


def cut(size: int) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (without_tokenizer, r"no tokenizer beside it; save the model's own: AutoTokenizer\.from_pretrained"),
        (cut(0), "cannot be loaded: damaged, or no GGUF file"),
        (cut(100), "cannot be loaded: damaged, or no GGUF file"),
        (cut(-1), "cannot be loaded: cannot reshape"),
        (lambda file: file.write_bytes(b"no GGUF" * 100), "cannot be loaded: damaged, or no GGUF file.*magic bytes"),
        (Path.unlink, r"small\.gguf': there is no such folder or file"),
    ],
    ids=["no tokenizer", "empty", "cut header", "cut weights", "other bytes", "gone"],
)
def test_a_gguf_file_that_cannot_be_used_is_one_line(gguf_file: Path, harm: Callable[[Path], Any], said: str) -> None:
    harm(gguf_file)
    with pytest.raises(ConfigError, match=said) as caught:
        load_model(config := PolicyConfig(str(gguf_file)), tokenizer=load_tokenizer(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", ["gguf", "accelerate"])
def test_a_library_that_gguf_needs_is_named(gguf_file: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None if name == library else find(name, *args))
    needs = rf'small\.gguf\' needs the library {library}: pip install "stateset-lightning\[gguf\]"'
    with pytest.raises(ConfigError, match=needs):
        load_model(PolicyConfig(str(gguf_file)))


def test_a_folder_of_gguf_files_alone_asks_for_the_file(gguf_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"weights in GGUF alone: give the file, model\.policy\.model_name=.*small\.gguf"
    ):
        load_tokenizer(PolicyConfig(str(gguf_file.parent)))


def test_scaled_rotary_frequencies_come_from_a_config_beside_the_gguf_file(
    gguf_file: Path, make_model: Callable[..., Any]
) -> None:
    scaling = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    original = make_model("llama", intermediate_size=64, rope_parameters=scaling)
    write_gguf(gguf_file, original, "rope_freqs.weight")
    with pytest.raises(
        ConfigError, match=r"scales its rotary frequencies.*put the original model's config\.json beside"
    ):
        load_model(PolicyConfig(str(gguf_file)))
    original.config.save_pretrained(gguf_file.parent)
    assert load_model(PolicyConfig(str(gguf_file))).config.rope_parameters == scaling


# Reference
# ----------------------------------------------------------------------------------------------------------------------


def test_an_adapter_s_reference_is_the_model_under_it(model_folder: Callable[..., Path]) -> None:
    name = str(model_folder("llama"))
    config = PolicyConfig(name, lora=LoRAConfig(rank=4, dropout=0.5))
    policy, plain = Policy(load_model(config), config), Policy(load_model(PolicyConfig(name)), PolicyConfig(name))
    reference = make_reference(policy, torch.float32)
    assert isinstance(reference, AdapterReference)
    expected = plain.score_without_gradient(GROUPS, 0.7)
    # B is zero
    assert all(torch.equal(x, y) for x, y in zip(policy.score_without_gradient(GROUPS, 0.7), expected, strict=True))
    policy.train()
    move(policy.model)
    moved = policy.score_without_gradient(GROUPS, 0.7)[0]
    assert all(torch.equal(x, y) for x, y in zip(reference.score_without_gradient(GROUPS, 0.7), expected, strict=True))
    assert torch.equal(policy.score_without_gradient(GROUPS, 0.7)[0], moved)
    assert not torch.allclose(moved, expected[0], atol=0.1)


def test_without_an_adapter_it_is_a_second_model_from_the_source(
    model_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="stateset_lightning")
    config = PolicyConfig(str(model_folder("llama")))
    policy = Policy(load_model(config), config)
    expected = policy.score_without_gradient(GROUPS)[0]
    move(policy.model)
    reference = make_reference(policy, torch.float32)
    assert isinstance(reference, Policy)
    assert torch.equal(reference.score_without_gradient(GROUPS)[0], expected)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert [line.partition(":")[0] for line in caplog.messages] == ["policy", "reference"]


def test_a_hostile_tokenizer_config_is_one_line(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(model_folder("llama"), folder := tmp_path / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": 5}))
    with pytest.raises(ConfigError, match="no tokenizer can be loaded: AttributeError: 'int'"):
        load_tokenizer(PolicyConfig(str(folder)))


# Quantized weights


class Packed(torch.Tensor):
    """As torchao's: a tensor that says it has the layer's dtype and shape."""


def of_another_class(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Packed))


def rounding(model: Any) -> None:
    model.is_loaded_in_8bit = True  # as transformers says it


@pytest.mark.parametrize(("change", "kind"), [(of_another_class, "Packed"), (rounding, "8-bit layers, which round")])
def test_weights_that_sampling_would_not_multiply_as_training_does_are_refused(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], kind: str
) -> None:
    loaded_as(change, monkeypatch)
    with pytest.raises(ConfigError, match=f"quantized as {kind}.*: use load_in_4bit of bitsandbytes"):
        load_model(PolicyConfig(str(folder_of("llama")), lora=LoRAConfig()))


def test_bitsandbytes_does_not_repack_weights_in_evaluation(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its product with repacked weights has no gradient, in training either."""

    def mark(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu = True

    loaded_as(mark, monkeypatch)
    model = load_model(PolicyConfig(str(folder_of("llama"))))
    assert model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu is False


def loaded_as(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has transformers load models with a change."""
    load = AutoModelForCausalLM.from_pretrained

    def changed(*args: Any, **options: Any) -> Any:
        model, report = load(*args, **options)
        change(model)
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", changed)
