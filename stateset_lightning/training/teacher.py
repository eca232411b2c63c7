"""The teacher that a policy is distilled from: a model in this process, or one that vLLM servers have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from stateset_lightning.algorithm import GKD, Algorithm
from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import Policy, PolicyConfig, load_model, load_tokenizer
from stateset_lightning.rollout import RolloutConfig, VLLMTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Options of a policy that only its training reads.
OF_TRAINING = "gradient_checkpointing", "dropout", "lora", "router_aux_loss"


def checked_teacher(
    given: str | Mapping[str, Any] | PolicyConfig | VLLMTeacher | None, algorithm: Algorithm, rollout: RolloutConfig
) -> PolicyConfig | VLLMTeacher | None:
    """`model.teacher`, as a config.

    Raises:
        ConfigError: If the algorithm does not read it, or needs one that it is not.
    """
    teacher = given if given is None or isinstance(given, VLLMTeacher) else PolicyConfig.of(given)
    name = type(algorithm).__name__
    if teacher is None:
        if algorithm.needs_teacher:
            raise ConfigError(f"model.algorithm={name} learns from a teacher: set model.teacher.model_name")
        return None
    shown = f"model.teacher={teacher.model_name if isinstance(teacher, PolicyConfig) else teacher.urls}"
    if not algorithm.needs_teacher:
        remedy = "remove it, or use OnPolicyDistillation or GKD"
        raise ConfigError(f"{shown} has no effect on model.algorithm={name}: {remedy}")
    if isinstance(teacher, VLLMTeacher) and isinstance(algorithm, GKD):
        why = f"vLLM gives log-probs of sampled tokens, and {name} needs those of all"
        raise ConfigError(f"{shown}: {why}; set model.teacher.model_name, or use OnPolicyDistillation")
    if isinstance(teacher, VLLMTeacher) and rollout.temperature != 1:
        why = (
            f"vLLM gives a prompt's log-probs at temperature 1, not at model.rollout.temperature={rollout.temperature}"
        )
        raise ConfigError(f"{shown}: {why}; set that to 1, or model.teacher.model_name")
    if unread := [key for key in OF_TRAINING if getattr(teacher, key, None)]:
        raise ConfigError(f"model.teacher.{unread[0]} has no effect on a teacher, which is not trained: remove it")
    return teacher


def make_teacher(
    config: PolicyConfig | VLLMTeacher,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
) -> Policy | VLLMTeacher:
    """The teacher, frozen and on a device, or with its servers there.

    Args:
        config: As `checked_teacher` returns it.
        tokenizer: The policy's.
        dtype: Of the weights, where `config.dtype` is None.
        device: Of the run.
        longest: See `Policy.longest`.

    Raises:
        ConfigError: If it cannot be loaded, or means something else by the policy's tokens.
        ServerError: If a server does not answer.
    """
    if isinstance(config, VLLMTeacher):
        config.setup()
        return config
    try:
        check_same_tokenizer(config, load_tokenizer(config), tokenizer)
        model = load_model(config, dtype)
    except ConfigError as error:  # names the policy's options, under which it is loaded
        raise ConfigError(str(error).replace("model.policy.", "model.teacher.")) from error
    teacher = Policy(model, config).requires_grad_(False).to(device)
    teacher.prepare_for(longest)
    return teacher


def check_same_tokenizer(
    config: PolicyConfig, teacher: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase
) -> None:
    """Both mean the same by each number.

    Raises:
        ConfigError: If their vocabularies or their special tokens differ. Not for what pads.
    """
    theirs, ours = (
        {"vocabulary": tokenizer.get_vocab(), "end of sequence": tokenizer.eos_token}
        | {"special tokens": set(tokenizer.all_special_tokens) - {tokenizer.pad_token}}
        for tokenizer in (teacher, policy)
    )
    if differing := [name for name, value in theirs.items() if value != ours[name]]:
        what = f"model.teacher.model_name={config.model_name!r}: its tokenizer is not the policy's"
        remedy = "and they are compared token by token: choose models of one family"
        raise ConfigError(f"{what} ({', '.join(differing)} differ), {remedy}")
