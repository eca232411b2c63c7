"""The text model of a checkpoint that also sees or hears, and the one table of rotary frequencies of a run."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from stateset_lightning.errors import log

# What a composite folder has beside model and tokenizer, under the names of transformers.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def is_composite(config: PretrainedConfig) -> bool:
    """Whether a model's configuration has that of its text model inside, beside those of what sees or hears."""
    return config.get_text_config() is not config


def auto_class(config: PretrainedConfig) -> Any:
    """Of transformers, the one that loads all of a checkpoint: of some composite ones, another loads the text model."""
    from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    if is_composite(config) and not config.is_encoder_decoder and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def freeze_all_but_text(model: PreTrainedModel, name: str) -> None:
    """Leaves only the text model of a composite one trainable (announced); of any other nothing changes."""
    if not is_composite(model.config):
        return
    trained = {p for module in _text_modules(model) for p in module.parameters()}
    for parameter in set(model.parameters()) - trained:
        parameter.requires_grad_(False)
    count, kind = model.num_parameters() - model.num_parameters(only_trainable=True), type(model).__name__
    log.info("%s is a %s: its text model is trained, the rest (%s parameters) frozen", name, kind, f"{count:,}")


def never_adapted(model: PreTrainedModel) -> str | None:
    """A regular expression for the whole names of what no adapter sits on; None if there is nothing of the kind.

    That is all of a composite model but its text model; the routers of experts: a router that moves sends tokens to
    experts that were trained on others; and layers of Mamba's mixers whose weights are used without calling the layer:
    an adapter on them would have no effect.
    """
    # Modules and not linear layers: the weights of many routers are a parameter of their own.
    is_router = re.compile(r"Router|Gating$|MoE\w*Gate$").search
    routers = [re.escape(name) for name, module in model.named_modules() if is_router(type(module).__name__)]
    patterns = [rf"({'|'.join(routers)})(\..*)?"] if routers else []
    mixers = [name for name, module in model.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")]
    patterns += [rf"{re.escape(name)}\.(dt_proj|out_proj)" for name in mixers]
    if is_composite(model.config):
        parts = [re.escape(name) for name, module in model.named_modules() if module in _text_modules(model)]
        patterns.append(rf"(?!({'|'.join(parts)})(\.|$)).*")
    return "|".join(patterns) or None


def _text_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]


def copy_processor(source: str, folder: Path, **hub_options: Any) -> None:
    """Copies what makes inputs of images or sounds, as it is, from a model's folder or Hugging Face id."""
    from transformers.utils import cached_file

    for name in PROCESSOR_FILES:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_options)
        if found is not None:
            shutil.copyfile(found, folder / name)


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens, prompt and completion together, that the model has positions for; None if it does not say."""
    config = model.config.get_text_config()
    values = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions"))
    return next((value for value in values if isinstance(value, int)), None)


# One table of rotary frequencies. Some models (longrope, arXiv:2402.13753; dynamic NTK) choose theirs by the longest
# sequence of a forward: the log-probs of a completion would depend on what else is in its batch, and change while it is
# sampled.


def use_one_rope_table(model: nn.Module, longest: int) -> bool:
    """Has every forward use the rotary frequencies of one with `longest` tokens, until the next call.

    Returns:
        Whether the model's frequencies depend on the length; another model stays as it is.
    """
    rotary: list[Any] = [module for module in model.modules() if _depends_on_length(module)]
    for module in rotary:
        if not hasattr(module, "longest"):
            module.register_forward_pre_hook(_add_position, with_kwargs=True)
            module.register_forward_hook(_drop_position)
        module.longest = longest
    return bool(rotary)


def _depends_on_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)  # of some models, one by the kind of layer
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("longrope" in kind or "dynamic" in kind) for kind in kinds)


def _add_position(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Puts a last position behind those of a forward, by which the module takes the sequence to be that long."""
    states, *others = args
    positions: Tensor = kwargs.pop("position_ids") if "position_ids" in kwargs else others.pop(0)
    longer = torch.cat([positions, torch.full_like(positions[..., :1], module.longest - 1)], dim=-1)
    return (states, longer, *others), kwargs


def _drop_position(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Takes the table's row of that position away."""
    return tuple(x[..., :-1, :] for x in output) if isinstance(output, tuple) else output[..., :-1, :]
