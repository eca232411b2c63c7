"""Model and tokenizer from a name: the bundled `tiny`, a folder, or a Hugging Face id, through the same code."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy.config import PolicyConfig
from stateset_lightning.policy.loading_errors import check_complete, first_line, loading_errors
from stateset_lightning.policy.lora import add_adapter, is_adapted
from stateset_lightning.tiny import TINY_FOLDER

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def resolve_model_name(model_name: str, key: str = "model.policy.model_name") -> str:
    """`tiny` -> its folder; a folder must hold a model; anything else is taken for a Hugging Face id.

    Raises:
        ConfigError: Naming `key`, if there is no such folder or no model in it.
    """
    if model_name == "tiny":
        return str(TINY_FOLDER)
    folder = os.path.expanduser(model_name)
    if Path(folder).is_dir():
        if (Path(folder) / "adapter_config.json").is_file():
            raise _is_an_adapter(model_name, key)
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(
                f"{key}={model_name!r} is a folder without config.json: give one that `save_pretrained` wrote"
            )
        return folder
    looks_like_path = (
        model_name.startswith((".", "/", "~")) or model_name.count("/") > 1 or (os.sep != "/" and os.sep in model_name)
    )
    if looks_like_path:
        raise ConfigError(f"{key}={model_name!r}: there is no such folder")
    return model_name


def load_tokenizer(policy: PolicyConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. One without a pad token pads with its end-of-sequence token (announced)."""
    from transformers import AutoTokenizer

    name = resolve_model_name(policy.model_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=policy.revision or "main", trust_remote_code=policy.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.policy.model_name={policy.model_name!r}: no tokenizer can be loaded: {first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.policy.model_name={policy.model_name!r}: its tokenizer has no end-of-sequence token; set"
            " `eos_token` in it"
        )
    if tokenizer.pad_token_id is None:
        log.info("The tokenizer of %s has no pad token: %r pads instead.", policy.model_name, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(policy: PolicyConfig, default_dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The policy's model, in evaluation mode; every parameter is trainable, or its adapter alone, which `seed`
    initialises.

    Raises:
        ConfigError: If the model cannot be found or loaded, lacks weights, or a checkpoint file holds pickled objects.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = resolve_model_name(policy.model_name)
    common: dict[str, Any] = {"revision": policy.revision or "main", "trust_remote_code": policy.trust_remote_code}
    option = f"model.policy.model_name={policy.model_name!r}"
    with loading_errors(option):
        config = AutoConfig.from_pretrained(name, **common)
        set_dropout(config, policy.dropout)
        model: PreTrainedModel
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, policy.dtype) if policy.dtype else default_dtype,
            attn_implementation=policy.attn_implementation,
            weights_only=True,
            output_loading_info=True,
            **common,
            **policy.model_kwargs,
        )
    check_complete(option, report["missing_keys"], "causal language model")
    if is_adapted(model):
        raise _is_an_adapter(policy.model_name)
    if policy.gradient_checkpointing:
        # Non-reentrant: the reentrant form neither passes keyword arguments on nor works when no input requires a
        # gradient.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if policy.lora is not None or policy.adapter is not None:
        add_adapter(model, policy, seed)
    return model.eval()


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Sets every dropout of a model's configuration; attention dropout is functional and sits in no module."""
    for key, value in config.to_dict().items():
        if (
            ("dropout" in key or key.endswith("pdrop"))
            and isinstance(value, (int, float))
            and not isinstance(value, bool)
        ):
            setattr(config, key, probability)


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All tokens that end a completion: the tokenizer's and those of the model's generation config."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids.update([configured] if isinstance(configured, int) else configured or [])
    return frozenset(ids)


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens, prompt and completion together, that the model has positions for; None if it does not say."""
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(value := getattr(model.config, key, None), int):
            return value
    return None


def _is_an_adapter(name: str, key: str = "model.policy.model_name") -> ConfigError:
    return ConfigError(f"{key}={name!r} is an adapter: give its base, and the adapter as model.policy.adapter")
