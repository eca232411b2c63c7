"""The teacher that a policy is distilled from: a model in this process, or one that vLLM servers have."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from stateset_lightning.algorithm import GKD, Algorithm
from stateset_lightning.errors import ConfigError, NonFiniteError
from stateset_lightning.policy import Group, Policy, PolicyConfig, compared_with, load_model, load_tokenizer
from stateset_lightning.rollout import RolloutConfig, VLLMTeacher
from stateset_lightning.rollout.vllm_client import UNKNOWN_SHARE
from stateset_lightning.training.episode import MicroBatch

GivenTeacher = PolicyConfig | VLLMTeacher | None
Teacher = Policy | VLLMTeacher  # ready

# Options that only a policy's training reads, or that are set for all models of the process.
OF_POLICY = "gradient_checkpointing", "dropout", "lora", "router_aux_loss", "float32_matmul"


def checked_teacher(given: str | GivenTeacher, algorithm: Algorithm, rollout: RolloutConfig) -> GivenTeacher:
    """`model.teacher`, as a config.

    Raises:
        ConfigError: If the algorithm does not read it, or needs one that it is not.
    """
    teacher = given if given is None or isinstance(given, VLLMTeacher) else PolicyConfig.of(given)
    name = f"model.algorithm={type(algorithm).__name__}"
    if teacher is None:
        if algorithm.needs_teacher:
            raise ConfigError(f"{name} learns from a teacher: set model.teacher.model_name")
        return None
    shown = f"model.teacher={teacher.model_name if isinstance(teacher, PolicyConfig) else teacher.urls}"
    if not algorithm.needs_teacher:
        raise ConfigError(f"{shown} has no effect on {name}: remove it, or use OnPolicyDistillation or GKD")
    if rollout.keep_sampling_mask and isinstance(algorithm, GKD):
        raise ConfigError(f"model.rollout.keep_sampling_mask=true: {name} compares whole distributions; remove it")
    if isinstance(teacher, VLLMTeacher) and isinstance(algorithm, GKD):
        raise ConfigError(f"{shown} with {name}: vLLM gives no whole distributions; set model.teacher.model_name")
    if isinstance(teacher, VLLMTeacher) and (rollout.temperature != 1 or rollout.keep_sampling_mask):
        given = f"model.rollout.temperature={rollout.temperature}, keep_sampling_mask={rollout.keep_sampling_mask}"
        raise ConfigError(f"{shown} with {given}: vLLM's log-probs are at 1, of all tokens: set these to 1 and false")
    if unread := [key for key in OF_POLICY if getattr(teacher, key, None)]:
        raise ConfigError(f"model.teacher.{unread[0]} is an option of model.policy, and of no teacher: remove it")
    return teacher


def check_teacher(teacher: GivenTeacher, tokenizer: PreTrainedTokenizerBase, longest: int, max_new_tokens: int) -> None:
    """The teacher is there and can say something of the policy's samples; its weights are loaded later.

    Args:
        teacher: As `checked_teacher` returns it.
        tokenizer: The policy's.
        longest: Tokens of the longest prompt.
        max_new_tokens: Of a completion.

    Raises:
        ConfigError: If it cannot be found, means something else by the policy's tokens, or takes no sequence so long.
        ServerError: If a server does not answer.
    """
    if isinstance(teacher, VLLMTeacher):
        teacher.setup(longest, max_new_tokens)
    elif teacher is not None:
        with _named_as_teachers():
            check_same_tokenizer(teacher, load_tokenizer(teacher), tokenizer)


def make_teacher(config: GivenTeacher, policy: Policy, dtype: torch.dtype) -> tuple[Teacher, ...]:
    """The teacher, frozen and on the policy's device, or its servers; empty without one.

    Args:
        config: As `checked_teacher` returns it, and `check_teacher` has found it.
        policy: That is distilled into.
        dtype: Of the weights, where `config.dtype` is None.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    if not isinstance(config, PolicyConfig):
        return (config,) if config else ()
    with _named_as_teachers():
        model = load_model(config, dtype)
    teacher = Policy(model, config, "teacher").requires_grad_(False).to(policy.device)
    teacher.prepare_for(policy.longest)
    return (teacher,)


@contextmanager
def _named_as_teachers() -> Iterator[None]:
    """What is loaded as a policy is, names the policy's options in its errors."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.policy.", "model.teacher.")) from error


def teacher_logprobs(teacher: Teacher, groups: Sequence[Group], temperature: float) -> torch.Tensor:
    """Of the sampled tokens, [T]; NaN for those that a server does not know.

    Raises:
        NonFiniteError: If more than `UNKNOWN_SHARE`, and not a single one, are unknown; or any, by a model in the
            process.
    """
    logprobs_T = teacher.score_without_gradient(groups, temperature)[0]
    most = 0 if isinstance(teacher, Policy) else max(1, UNKNOWN_SHARE * len(logprobs_T))
    if (unknown := int(logprobs_T.isnan().sum())) > most:
        what = f"model.teacher knows no log-prob for {unknown} of {len(logprobs_T)} tokens, NaN, null or -inf"
        raise NonFiniteError(f"{what}: see whether it is the right model, or give it a wider dtype")
    return logprobs_T


def with_comparison(batch: MicroBatch, algorithm: Algorithm, teacher: Teacher | None, temperature: float) -> MicroBatch:
    """A micro-batch whose distributions are compared with the teacher's, for an algorithm that does."""
    if not isinstance(algorithm, GKD) or not batch.groups:
        return batch
    assert isinstance(teacher, Policy), "checked before the run"
    return replace(batch, comparison=compared_with(teacher, batch.groups, temperature, algorithm.divergence))


def check_same_tokenizer(config: PolicyConfig, *tokenizers: PreTrainedTokenizerBase) -> None:
    """The teacher's and the policy's mean the same by each number.

    Raises:
        ConfigError: If their vocabularies or their special tokens differ. Not for what pads.
    """
    pads = {tokenizer.pad_token for tokenizer in tokenizers}
    theirs, ours = (
        {"vocabulary": tokenizer.get_vocab(), "end of sequence": tokenizer.eos_token}
        | {"special tokens": {*tokenizer.all_special_tokens} - pads}
        for tokenizer in tokenizers
    )
    if differing := [name for name, value in theirs.items() if value != ours[name]]:
        what = f"model.teacher.model_name={config.model_name!r}: its tokenizer is not the policy's"
        raise ConfigError(f"{what} ({', '.join(differing)} differ): choose models of one family")
