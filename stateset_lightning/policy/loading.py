"""Model, tokenizer and reference policy from a name: the bundled `tiny`, a folder or GGUF file, a Hugging Face id."""

import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from stateset_lightning.errors import ConfigError, log, require
from stateset_lightning.files import keep_inputs
from stateset_lightning.policy.config import PolicyConfig
from stateset_lightning.policy.ends import end_of_turn_ids
from stateset_lightning.policy.lora import add_adapter, is_adapted, load_adapter
from stateset_lightning.policy.policy import Group, Policy
from stateset_lightning.policy.text_model import auto_class, freeze_all_but_text
from stateset_lightning.tiny import TINY_FOLDER


def resolve_model_name(model_name: str, key: str = "model.policy.model_name") -> str:
    """A model's place: the folder of `tiny`, a folder that holds a model, a GGUF file, or a Hugging Face id as it is.

    Raises:
        ConfigError: Naming `key`, if there is no such folder or file, or no model in it.
    """
    if model_name == "tiny":
        return str(TINY_FOLDER)
    folder, given = Path(os.path.expanduser(model_name)), f"{key}={model_name!r}"
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise _is_an_adapter(model_name, key)
        if (files := sorted(folder.glob("*.gguf"))) and not {*folder.glob("*.safetensors*"), *folder.glob("*.bin*")}:
            raise ConfigError(f"{given} is a folder with weights in GGUF alone: give the file, {key}={files[0]}")
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{given} is a folder without config.json: give one that `save_pretrained` wrote")
        keep_inputs(*folder.iterdir())
        return str(folder)
    if (is_gguf := folder.suffix == ".gguf") and folder.is_file():
        keep_inputs(folder, *folder.parent.glob("tokenizer*"))
        return str(folder)
    is_path = model_name.startswith((".", "/", "~")) or (os.sep != "/" and os.sep in model_name)
    if is_gguf or is_path or model_name.count("/") > 1:
        raise ConfigError(f"{given}: there is no such folder or file; paths are relative to {Path.cwd()}")
    return model_name


def load_tokenizer(policy: PolicyConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. One without a pad token pads with its end-of-sequence token (announced).

    An end of turn that is not the end of a sequence is announced, too.

    Raises:
        ConfigError: If it cannot be loaded, is not beside a GGUF file, or has no end-of-sequence token.
    """
    name, option = resolve_model_name(policy.model_name), f"model.policy.model_name={policy.model_name!r}"
    if name.endswith(".gguf"):
        # transformers 5.23 builds a tokenizer from the file, too, which may be another than the model's: of SmolLM2's
        # it loses that each digit is a token.
        name = str(Path(name).parent)
        if not any(Path(name).glob("tokenizer*")):
            remedy = "AutoTokenizer.from_pretrained(<the original model>).save_pretrained"
            raise ConfigError(f"{option} has no tokenizer beside it; save the model's own: {remedy}({name!r})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **_hub_options(policy))
    except Exception as error:  # a foreign tokenizer_config.json can have any error raised
        raise ConfigError(f"{option}: no tokenizer can be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{option}: its tokenizer has no end-of-sequence token; set `eos_token` in it")
    if tokenizer.pad_token_id is None:
        log.info("The tokenizer of %s has no pad token: %r pads instead.", policy.model_name, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    if others := set(end_of_turn_ids(tokenizer)) - {tokenizer.eos_token_id}:
        told = "The chat template of %s ends turns with %r, and its tokenizer sequences with %r: both end a completion."
        log.info(told, policy.model_name, tokenizer.convert_ids_to_tokens(others.pop()), tokenizer.eos_token)
    return tokenizer


def load_model(
    policy: PolicyConfig,
    default_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """The policy's model in evaluation mode, with its adapter if it has one.

    All parameters of its text model are trainable, or those of the adapter only.

    Args:
        policy: Which model, and how it is loaded.
        default_dtype: Of the weights, where `policy.dtype` is None.
        seed: The run's; a new adapter is initialised from it.
        tokenizer: That the model must have weights for.

    Returns:
        On torch's default device, which is the run's where Lightning calls.

    Raises:
        ConfigError: If the model cannot be found or loaded, lacks weights, or a checkpoint file holds pickled objects.
    """
    if policy.float32_matmul is not None:
        torch.set_float32_matmul_precision(policy.float32_matmul)
    name, option = resolve_model_name(policy.model_name), f"model.policy.model_name={policy.model_name!r}"
    device = torch.get_default_device()
    # In the context of another device transformers asks for accelerate, and an adapter would have other numbers there.
    with torch.device("cpu"):
        with loading_errors(option):
            name, of_config, of_weights = _gguf_options(name, option)
            config = AutoConfig.from_pretrained(name, **of_config, **_hub_options(policy))
            _set_dropout(config.get_text_config(), policy.dropout)
            if "quantization_config" not in policy.model_kwargs:
                _dequantize(config, policy.model_name)
            dtype = getattr(torch, policy.dtype) if policy.dtype else default_dtype
            own = {"dtype": dtype, "attn_implementation": policy.attn_implementation, **_hub_options(policy)}
            # Nor is attention taken from a config.json.
            others = {"experts_implementation": None, **of_weights, **policy.model_kwargs}
            model, report = auto_class(config).from_pretrained(
                name, config=config, weights_only=True, output_loading_info=True, **own, **others
            )
        check_complete(option, report["missing_keys"], "causal language model")
        _prepare_quantized(model, option)
        if tokenizer is not None:
            check_vocabulary(option, model, tokenizer)
        if is_adapted(model):
            raise _is_an_adapter(policy.model_name)
        freeze_all_but_text(model, policy.model_name)
        if policy.gradient_checkpointing:
            # Non-reentrant: the reentrant form does not pass keyword arguments on, and does not work when no input
            # requires a gradient.
            with loading_errors("model.policy.gradient_checkpointing=True"):
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()  # a hook for the reentrant form; fast decoding knows no model with any
        if policy.adapter is not None:
            with loading_errors(f"model.policy.adapter={policy.adapter!r}"):
                load_adapter(model, policy.adapter, policy.lora)
        elif policy.lora is not None:
            add_adapter(model, policy.lora, seed)
    model.eval()
    return model if model.device == device else model.to(device)


def _hub_options(policy: PolicyConfig) -> dict[str, Any]:
    return {"revision": policy.revision or "main", "trust_remote_code": policy.trust_remote_code}


def _set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Sets every dropout of a model's configuration; attention dropout is a function call and not a module."""
    for key, value in config.to_dict().items():
        if type(value) in (int, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, probability)


def _dequantize(config: PretrainedConfig, name: str) -> None:
    """Has a checkpoint that was quantised by MXFP4, FP8 or the like loaded in the policy's dtype, to be trained."""
    from transformers.quantizers import AutoQuantizationConfig

    saved = getattr(config, "quantization_config", None)
    if saved is not None and hasattr(AutoQuantizationConfig.from_dict(saved), "dequantize"):
        config.quantization_config = {**saved, "dequantize": True}
        log.info("%s has weights in %s: dequantized, since no gradient passes them", name, saved["quant_method"])


def _prepare_quantized(model: PreTrainedModel, option: str) -> None:
    """Has quantized weights, if there are any, multiply alike in sampling and in training.

    Raises:
        ConfigError: If they cannot.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 would repack 4-bit weights in evaluation, for a product that has no gradient.
            module.support_avx512bf16_for_cpu = False
    # torchao's say that they have the dtype and the shape of the layer, and are taken for plain ones.
    foreign = [type(p).__name__ for p in model.parameters() if torch.nn.Parameter not in type(p).__mro__]
    if getattr(model, "is_loaded_in_8bit", False):
        foreign.append("8-bit layers, which round what they multiply as well")
    if foreign:
        raise ConfigError(f"{option}: its weights are quantized as {foreign[0]}: use load_in_4bit of bitsandbytes")


# GGUF files, whose weights transformers has in float32 once they are loaded


def _gguf_options(name: str, option: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Of a GGUF file its folder, and what loads its configuration and its weights; any other name as it is.

    A config.json beside the file is the model's: transformers 5.23 reads no scaling of rotary frequencies from GGUF.

    Raises:
        ConfigError: If a library is missing, the file is damaged, or it has such a scaling and there is no config.json.
    """
    if not name.endswith(".gguf"):
        return name, {}, {}
    for library in ("gguf", "accelerate"):
        require(library, "gguf", option)
    from transformers import GgufConfig
    from transformers.integrations.gguf import read_gguf_metadata  # in milliseconds, where gguf's own takes seconds

    folder, of_file = Path(name).parent, {"gguf_file": Path(name).name}
    of_config = {} if (folder / "config.json").is_file() else of_file
    try:
        metadata, tensors = read_gguf_metadata(name)
    except Exception as error:  # whatever the bytes make it stumble over
        raise ConfigError(f"{option} cannot be loaded: damaged, or no GGUF file ({_first_line(error)})") from error
    if of_config and any(part in key for key in [*metadata, *tensors] for part in _ROPE_SCALING):
        raise ConfigError(f"{option} scales its rotary frequencies: put the original model's config.json beside it")
    return str(folder), of_config, {**of_file, "quantization_config": GgufConfig(dequantize=True)}


_ROPE_SCALING = ("rope_freqs", "rope_factors", ".rope.scaling.factor")  # Llama 3's tensor, Phi-3's, and YaRN or linear


# The reference policy: the policy as it was when the run started


@dataclass(frozen=True)
class AdapterReference:
    """The reference of a policy with an adapter: the same model, with its adapter as at the start.

    No second model is in memory.

    Args:
        policy: With an adapter.
    """

    policy: Policy

    def score_without_gradient(self, groups: Sequence[Group], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """See `Policy.score_without_gradient`."""
        assert self.policy.adapter is not None
        with self.policy.adapter.at_start():
            return self.policy.score_without_gradient(groups, temperature)


def make_reference(policy: Policy, dtype: torch.dtype) -> Policy | AdapterReference:
    """The reference of a policy: itself with its adapter as it started, or a second model, loaded from the source.

    Not a copy of the policy, which may have been trained or restored since it was loaded.
    """
    if policy.adapter is not None:
        return AdapterReference(policy)
    reference = Policy(load_model(policy.config, dtype), policy.config, "reference").requires_grad_(False)
    reference.prepare_for(policy.longest)
    return reference


# Errors of loading, which name the option


@contextmanager
def loading_errors(option: str) -> Iterator[None]:
    """Turns what goes wrong while something is loaded for `option` (`key=value`) into an error that names it.

    Raises:
        ConfigError: In place of whatever transformers, peft or the file raises.
    """
    try:
        yield
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        what = "its weights are a pickle file with more in it than tensors, which could run code"
        raise ConfigError(f"{option} cannot be loaded: {what}; convert it to safetensors if you trust it") from error
    except Exception as error:  # a foreign config.json can have a model's code raise anything
        raise ConfigError(f"{option} cannot be loaded: {_first_line(error)}") from error


def check_complete(option: str, missing: Iterable[str], kind: str) -> None:
    """Checks that every weight of a loaded model came from the file, since the others would be random.

    Args:
        option: `key=value`.
        missing: Names of the weights that the file did not have.
        kind: What should have been given.

    Raises:
        ConfigError: If there are any.
    """
    if names := sorted(missing):
        what = f"{option} cannot be loaded: it has no weights for {', '.join(names[:3])}, which would be random"
        raise ConfigError(f"{what} ({len(names)} in all); give a complete {kind}")


def check_vocabulary(option: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a loaded model knows every token of its tokenizer.

    Except the place of an image, a sound or a video: Gemma 3's smallest model has no row for it, and sees none.

    Args:
        option: `key=value`.
        model: As loaded.
        tokenizer: Beside it.

    Raises:
        ConfigError: If a token's number is beyond the embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    places = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
    if beyond := [text for text, i in tokenizer.get_vocab().items() if i >= rows and text not in places]:
        what = f"{option}: its tokenizer has {len(beyond)} tokens ({', '.join(map(repr, sorted(beyond)[:3]))})"
        remedy = f"call resize_token_embeddings({len(tokenizer)}) on the model and save it, or give its own tokenizer"
        raise ConfigError(f"{what} beyond the {rows} that its embedding holds; {remedy}")


def _first_line(error: BaseException) -> str:
    """What an error says, without the page of advice that often follows."""
    kind = "" if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: "
    text = kind + str(error).strip()
    flags = "model.policy.trust_remote_code=true if you trust its authors (generate and export: --trust_remote_code)"
    return text.split("\n")[0][:300] + (f"; set {flags}" if "trust_remote_code" in text else "")


def _is_an_adapter(name: str, key: str = "model.policy.model_name") -> ConfigError:
    remedy = "give its base, and the adapter as model.policy.adapter (generate and export: the checkpoint of its run)"
    return ConfigError(f"{key}={name!r} is an adapter: {remedy}")
