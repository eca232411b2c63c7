"""Low-rank adapters (LoRA, arXiv:2106.09685) of a transformers model, by peft: make, load, switch off, merge, save.

An adapter is injected into the model and not wrapped around it (`PeftModel`), so that all other code still sees a
transformers model: its body, its output embedding, its attention. Only the adapter is trained and saved.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stateset_lightning.errors import ConfigError, imported, log, one_line
from stateset_lightning.files import keep_inputs
from stateset_lightning.policy.config import LoRAConfig
from stateset_lightning.policy.precision import replaced_parameters
from stateset_lightning.policy.text_model import never_adapted
from stateset_lightning.ranks import Ranks, unsharded
from stateset_lightning.seeding import derive_seed

if TYPE_CHECKING:
    from peft import LoraConfig

    from stateset_lightning.policy.policy import Policy

NAME = "default"  # of the adapter inside the model, as peft calls a single one

# How peft's config names our options.
_OWN_KEYS = {"r": "rank", "lora_alpha": "alpha", "target_modules": "target_modules", "lora_dropout": "dropout"}


def is_adapted(model: nn.Module) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def add_adapter(model: PreTrainedModel, lora: LoRAConfig, seed: int) -> None:
    """Adds a new adapter and freezes the rest. Its B is zero, so the policy starts as the model.

    Args:
        model: Of transformers; changed in place.
        lora: The adapter's options.
        seed: The run's; the random numbers of the adapter's A depend on nothing else.

    Raises:
        ConfigError: If peft is not installed or refuses the options.
    """
    place = "model.policy.lora"
    peft = imported("peft", "lora", place)
    own = {key: getattr(lora, name) for key, name in _OWN_KEYS.items()}
    if taken := sorted(own.keys() & lora.peft_kwargs.keys()):
        raise ConfigError(f"{place}.peft_kwargs.{taken[0]}: set {place}.{_OWN_KEYS[taken[0]]} instead")
    try:
        options = {"exclude_modules": never_adapted(model), **own, **lora.peft_kwargs}
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{place}.peft_kwargs={lora.peft_kwargs}: {one_line(error)}") from error
    inject(model, config, place, seed)


def load_adapter(model: PreTrainedModel, adapter: str, lora: LoRAConfig | None) -> None:
    """Adds an adapter that peft has saved and freezes the rest.

    Args:
        model: Of transformers; changed in place.
        adapter: A folder or a Hugging Face id.
        lora: Of these options only `dropout` is used; without them there is no dropout.

    Raises:
        ConfigError: If peft is not installed, or the adapter does not fit the model.
        Exception: Whatever peft raises where it cannot read the adapter.
    """
    peft = imported("peft", "lora", "model.policy.adapter")
    source = str(Path(adapter).expanduser()) if adapter.startswith("~") else adapter
    place = f"model.policy.adapter={adapter!r}"
    config, weights = peft.PeftConfig.from_pretrained(source), peft.load_peft_weights(source, device="cpu")
    keep_inputs(*Path(source).glob("*"))
    config.lora_dropout = 0.0 if lora is None else lora.dropout
    inject(model, config, place)
    if lora is not None:
        log.info("%s has its own rank %s and alpha %s, not model.policy.lora's", place, config.r, config.lora_alpha)
    load_weights(model, weights, place)


def inject(model: PreTrainedModel, config: "LoraConfig", place: str, seed: int = 0) -> None:
    """Puts an adapter of this config into the model: trainable, and float32 even where the model is smaller.

    Args:
        model: Of transformers; changed in place.
        config: Of peft.
        place: What errors call the adapter: an option, or a checkpoint.
        seed: Of the random numbers of its A.

    Raises:
        ConfigError: If the config does not fit the model, or its start is not the model itself.
    """
    import peft

    if not isinstance(config, peft.LoraConfig):
        raise ConfigError(f"{place} is an adapter of the kind {config.peft_type}, and not LoRA")
    if config.megatron_config:  # anybody may have written an adapter's config, and this one names a module
        raise ConfigError(f"{place}: megatron_config would have {config.megatron_core!a} imported: leave it out")
    if config.init_lora_weights not in (True, "gaussian"):
        # The model without the adapter would be no reference, and a checkpoint of the adapter not the policy.
        raise ConfigError(f"{place}: init_lora_weights={config.init_lora_weights!r}: use true or gaussian")
    for name in ("layer_replication", "kasa_config", "alora_invocation_tokens"):
        if getattr(config, name, None) is not None:
            raise ConfigError(f"{place}: {name} changes the model under the adapter as well: leave it out")
    config.inference_mode = False
    try:
        # peft draws A from the global generator: a seeded fork leaves that as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "adapter"))
            model.add_adapter(config, NAME)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{place}: {one_line(error)}") from error
    # peft puts adapters on fused experts, and on their routers, by parameter, and does not exclude any of those.
    excluded = config.exclude_modules if isinstance(config.exclude_modules, str) else ""
    for name, layer in reversed(list(model.named_modules())):  # the adapters of a module's parameters are nested
        if hasattr(layer, "parameter_name") and re.fullmatch(excluded, name):
            model.set_submodule(name, layer.base_layer)
            config.target_parameters.discard(f"{name.rpartition('.')[2]}.{layer.parameter_name}")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        # A step of 1e-4 would round away. Copied modules and biases compute in the dtype that they have.
        if parameter.dtype in (torch.bfloat16, torch.float16) and ("lora_" in name or "trainable_tokens" in name):
            parameter.data = parameter.data.float()
    if not trained:
        raise ConfigError(f"{place}: nothing is left to train")


def load_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], place: str) -> None:
    """Fills the adapter with weights as peft saves them.

    Raises:
        ConfigError: If one is missing, unknown, or of another shape.
    """
    from peft import set_peft_model_state_dict

    try:
        plain = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
        report = set_peft_model_state_dict(model, plain, NAME)
    except (RuntimeError, KeyError) as error:
        raise ConfigError(f"{place} does not fit the model: {one_line(error)}") from error
    missing = set(report.missing_keys).intersection(trained_names(model))
    problems = {"no weights for": missing, "weights that the model has no place for:": report.unexpected_keys}
    for what, names in problems.items():
        if names:
            shown = f"{', '.join(sorted(names)[:3])} ({len(names)} in all)"
            raise ConfigError(f"{place} does not fit the model: it has {what} {shown}")


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# Switched off and merged


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapter, while the context lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    # Only the flag: peft's own switch also changes `requires_grad`, which optimizer and DDP have already read.
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def merged_adapter(model: nn.Module) -> Iterator[None]:
    """The model with its adapter added into copies of its weights, which is faster token by token; the weights stay.

    Only weights of float32 or wider are merged: rounded to bfloat16, the sum of a weight and a small update is often
    the weight itself.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers = [layer for layer in adapted if _base(layer)[2] in (torch.float32, torch.float64)]
    bases = {layer.get_base_layer() for layer in layers}  # fused experts have several adapters
    try:
        with replaced_parameters(bases, lambda weight: nn.Parameter(weight.detach().clone(), requires_grad=False)):
            for layer in layers:
                layer.merge()
            yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()


def merge_adapter(model: PreTrainedModel) -> float:
    """Adds the adapter into the model for good, which is a plain transformers model afterwards.

    Returns:
        How much of the update rounding to the model's dtype changes: norm of the error over norm of the update; 0 in
        float32.

    Raises:
        ConfigError: If weights are quantized, or embeddings are tied and one of them is adapted: they are two
            matrices afterwards, and saved as one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    adapted = [isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper) for layer in embeddings]
    if model.config.tie_word_embeddings and any(adapted):
        raise ConfigError("the adapter sits on an embedding that is tied to another: export it without --merge")
    change, error = 0.0, 0.0
    for name, module in reversed(list(model.named_modules())):  # adapters of fused experts are nested
        if isinstance(module, AuxiliaryTrainingWrapper):
            copies = getattr(module, "modules_to_save", None)
            model.set_submodule(name, module.token_adapter if copies is None else copies[NAME])
        elif isinstance(module, BaseTunerLayer):
            base, key, dtype = _base(module)
            if dtype is None or not dtype.is_floating_point:
                raise ConfigError(f"the adapter of {name} sits on quantized weights: export it without --merge")
            before = getattr(base, key).detach()
            setattr(base, key, nn.Parameter(before.float(), requires_grad=False))  # summed before it is rounded
            module.merge()
            exact = getattr(base, key).detach()
            rounded = nn.Parameter(exact.to(dtype), requires_grad=False)
            setattr(base, key, rounded)
            change += float((exact - before).square().sum())
            error += float((rounded - exact).square().sum())
            model.set_submodule(name, base)
    model._hf_peft_config_loaded = False
    del model.peft_config
    return (error / change) ** 0.5 if change else 0.0


def _base(layer: Any) -> tuple[nn.Module, str, torch.dtype | None]:
    """What an adapter is added to: a layer, which of its parameters (fused experts have other names), and its dtype."""
    base, key = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
    weight = getattr(base, key, None)
    return base, key, weight.dtype if isinstance(weight, Tensor) else None


# Saved


def save_adapter(policy: "Policy", folder: str | Path) -> None:
    """Writes the policy's adapter as `PeftModel.from_pretrained` reads it.

    Two files: adapter_config.json and adapter_model.safetensors. Where weights are sharded, all ranks call it together.

    Args:
        policy: With an adapter.
        folder: Made if it is not there. The config names the model under the adapter as `model.policy.model_name` does,
            a folder by its last part.
    """
    weights = adapter_weights(policy.model)
    if Ranks.current().rank == 0:
        write_adapter(policy.model, policy.config.public_name, Path(folder), weights)


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter as peft names it, whole and on the CPU; all ranks call it together where it is sharded."""
    from peft import get_peft_model_state_dict

    # `auto` would ask the hub whether the vocabulary has grown.
    weights = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    # Copies: tied modules, which `modules_to_save` and `ensure_weight_tying` make, would share memory.
    return {f"base_model.model.{name}": unsharded(w.detach()).cpu().contiguous().clone() for name, w in weights.items()}


def write_adapter(model: PreTrainedModel, base: str, folder: Path, weights: dict[str, Tensor]) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, as `PeftModel.from_pretrained` reads them.

    Args:
        model: With an adapter.
        base: What the config calls the model under it.
        folder: Made if it is not there.
        weights: The model's `adapter_weights`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {**plain_config(model), "base_model_name_or_path": base, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """The adapter's config in plain containers, with the layers that it found."""
    return json.loads(json.dumps(model.peft_config[NAME].to_dict(), default=sorted))


def config_from_plain(content: Mapping[str, Any]) -> "LoraConfig":
    """The inverse of `plain_config`."""
    return imported("peft", "lora", "the checkpoint's adapter").PeftConfig.from_peft_type(**content)
