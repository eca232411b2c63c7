"""Low-rank adapters (LoRA, arXiv:2106.09685), by peft: made, loaded, switched off, merged, saved.

An adapter is injected into the transformers model and not wrapped around it (`PeftModel`), so that all else goes on to
see a transformers model: its body, its output embedding, its attention. What is trained and saved of such a policy is
the adapter alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stateset_lightning.errors import ConfigError, require
from stateset_lightning.policy.config import LoRAConfig, PolicyConfig
from stateset_lightning.policy.loading_errors import loading_errors
from stateset_lightning.policy.precision import replaced_parameters
from stateset_lightning.seeding import derive_seed

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from stateset_lightning.policy.policy import Policy

log = logging.getLogger(__name__)

NAME = "default"
"""Of the adapter inside the model, as peft calls an only one."""

_OWN_KEYS = {"r": "rank", "lora_alpha": "alpha", "target_modules": "target_modules", "lora_dropout": "dropout"}
_SMALL = (torch.bfloat16, torch.float16)


def is_adapted(model: nn.Module) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def add_adapter(model: PreTrainedModel, policy: PolicyConfig, seed: int) -> None:
    """Adds the adapter that `policy` asks for, new (B is zero: the policy starts as the model) or loaded, and freezes
    the rest.

    Args:
        model: Of transformers; changed in place.
        policy: With `lora` or `adapter`.
        seed: The run's; the noise of a new adapter's A follows from it alone.

    Raises:
        ConfigError: If peft is not installed, refuses the options, or the loaded adapter does not fit the model.
    """
    if policy.adapter is None:
        assert policy.lora is not None
        inject(model, _new_config(policy.lora), "model.policy.lora", seed)
        return
    place = f"model.policy.adapter={policy.adapter!r}"
    config, weights = _read(policy.adapter, place)
    config.lora_dropout = policy.lora.dropout if policy.lora is not None else 0.0
    if policy.lora is not None:
        own = {name: getattr(config, key) for key, name in _OWN_KEYS.items()}
        log.info(
            "%s has its own config, which is used instead of model.policy.lora: rank %s, alpha %s",
            place,
            own["rank"],
            own["alpha"],
        )
    inject(model, config, place, seed)
    load_weights(model, weights, place)


def inject(model: PreTrainedModel, config: LoraConfig, place: str, seed: int = 0) -> None:
    """Puts an adapter of this config into the model, trainable and in float32 also where the model is smaller.

    Raises:
        ConfigError: If the config does not fit the model, or its start is not the model itself.
    """
    if config.init_lora_weights not in (True, "gaussian"):
        raise ConfigError(
            f"{place}: init_lora_weights={config.init_lora_weights!r} changes the model under the adapter or starts"
            " away from it, so that the model without the adapter is no reference, and a checkpoint of the adapter not"
            " the policy: use true or gaussian"
        )
    config.inference_mode = False
    try:
        # The initial A comes from the global generator: a seeded fork leaves it untouched.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "adapter"))
            model.add_adapter(config, NAME)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{place}: {' '.join(str(error).split())[:300]}") from error
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in _SMALL:
            parameter.data = parameter.data.float()  # a step of 1e-4 would round away
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"{place}: nothing is left to train")


def load_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], place: str) -> None:
    """Fills the adapter with weights as peft saves them.

    Raises:
        ConfigError: If one is missing, unknown, or of another shape.
    """
    from peft import set_peft_model_state_dict

    trained = trained_names(model)
    try:
        report = set_peft_model_state_dict(model, dict(weights), NAME)
    except (RuntimeError, KeyError) as error:
        raise ConfigError(f"{place} does not fit the model: {' '.join(str(error).split())[:300]}") from error
    missing = sorted(set(report.missing_keys) & set(trained))
    for what, names in (
        ("no weights for", missing),
        ("weights that the model has no place for:", sorted(report.unexpected_keys)),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"{place} does not fit the model: it has {what} {', '.join(names[:3])}{more}")


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model under the adapter, while the context lasts."""
    # The flag alone: peft's own switch also turns `requires_grad`, of which optimizer and DDP have taken note.
    layers = _peft_layers(model)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def merged_adapter(model: nn.Module) -> Iterator[None]:
    """A model whose adapter is added into copies of the matrices under it: faster token by token; the matrices are not
    touched.

    Only where they are float32 or wider: rounded to bfloat16, the sum of a matrix and a small update is often the
    matrix alone.
    """
    if not is_adapted(model):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and _is_wide(layer.get_base_layer())
    ]
    bases = [layer.get_base_layer() for layer in layers]
    try:
        with replaced_parameters(bases, lambda weight: nn.Parameter(weight.detach().clone(), requires_grad=False)):
            for layer in layers:
                layer.merge()
            yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()


def merge_adapter(model: PreTrainedModel) -> float:
    """Adds the adapter into the model for good, which is a plain transformers model then.

    Returns:
        The share of the update that rounding to the model's dtype changes, by norm; 0 in float32.

    Raises:
        ConfigError: If embeddings are tied and one of them is adapted: they are two matrices afterwards, and saved as
            one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and any(
        isinstance(e, BaseTunerLayer | AuxiliaryTrainingWrapper) for e in embeddings
    ):
        raise ConfigError(
            "the adapter sits on an embedding that is tied to another, and cannot be merged: export it without --merge"
        )
    change, error = 0.0, 0.0
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.modules_to_save[NAME])
        elif isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            if not (isinstance(getattr(base, "weight", None), Tensor) and base.weight.is_floating_point()):
                raise ConfigError(
                    f"the adapter of {name} cannot be merged, its weights are quantized: export it without --merge"
                )
            before = base.weight.detach()
            base.weight = nn.Parameter(before.float(), requires_grad=False)  # summed before it is rounded
            module.merge()
            exact = base.weight.detach()
            base.weight = nn.Parameter(exact.to(before.dtype), requires_grad=False)
            change += float((exact - before).square().sum())
            error += float((base.weight - exact).square().sum())
            model.set_submodule(name, base)
    model._hf_peft_config_loaded = False
    del model.peft_config
    return (error / change) ** 0.5 if change else 0.0


def save_adapter(policy: Policy, folder: str | Path) -> None:
    """Writes the policy's adapter as `PeftModel.from_pretrained` reads it: adapter_config.json and
    adapter_model.safetensors.

    Args:
        policy: With an adapter.
        folder: Made if it is not there. The base is named in it as in `model.policy.model_name`, a folder by its last
            part.
    """
    write_adapter(policy.model, policy.config.public_name, Path(folder))


def write_adapter(model: PreTrainedModel, base: str, folder: Path) -> None:
    """As `save_adapter`, of a model."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    # `auto` would ask the hub whether the vocabulary has grown.
    weights = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {**plain_config(model), "base_model_name_or_path": base, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """The adapter's config in plain containers, with the layers that it found."""
    content: dict[str, Any] = json.loads(json.dumps(model.peft_config[NAME].to_dict(), default=sorted))
    return content


def config_from_plain(content: Mapping[str, Any]) -> LoraConfig:
    """The inverse of `plain_config`."""
    require("peft", "lora", "the checkpoint's adapter")
    import peft

    return peft.PeftConfig.from_peft_type(**content)


def _new_config(lora: LoRAConfig) -> LoraConfig:
    require("peft", "lora", "model.policy.lora")
    import peft

    if taken := sorted(_OWN_KEYS.keys() & lora.peft_kwargs.keys()):
        raise ConfigError(
            f"model.policy.lora.peft_kwargs.{taken[0]}: set model.policy.lora.{_OWN_KEYS[taken[0]]} instead"
        )
    own = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": lora.target_modules,
        "lora_dropout": lora.dropout,
    }
    try:
        return peft.LoraConfig(task_type="CAUSAL_LM", **own, **lora.peft_kwargs)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"model.policy.lora.peft_kwargs={lora.peft_kwargs}: {' '.join(str(error).split())[:300]}"
        ) from error


def _read(source: str, place: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    require("peft", "lora", "model.policy.adapter")
    import peft

    source = str(Path(source).expanduser()) if source.startswith("~") else source
    with loading_errors(place):
        config = peft.PeftConfig.from_pretrained(source)
        weights = peft.load_peft_weights(source, device="cpu")
    if not isinstance(config, peft.LoraConfig):
        raise ConfigError(f"{place} is an adapter of the kind {config.peft_type}, and not LoRA")
    return config, weights


def _peft_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _is_wide(base: nn.Module) -> bool:
    weight = getattr(base, "weight", None)
    return isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.float64)
