"""`data.steps_per_episode: auto`: a pass over an episode in as many micro-steps as memory asks for.

All of them make one optimizer step, as `steps_per_episode: 1` does, and its gradient is the same for every number of
them. What Lightning counts in micro-steps is multiplied alike.
"""

import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from stateset_lightning.errors import ConfigError, log
from stateset_lightning.policy import Group, Policy
from stateset_lightning.ranks import Ranks
from stateset_lightning.training.loss import seeded_dropout
from stateset_lightning.training.schedule import accumulations

if TYPE_CHECKING:
    from stateset_lightning.datamodule import ScenarioDataModule

# Of what is free beside weights, gradients and moments; the rest is for what a backward pass holds for a while.
SHARE = 0.7
PROBE = 128  # tokens at most of the probe's prompt, and of each of its completions


def choose_micro_steps(trainer: Trainer, policy: Policy, data: "ScenarioDataModule | None", module: Any) -> None:
    """Sets the number of micro-steps where it is `auto`; all ranks call it together, and take the same.

    Args:
        trainer: Gets `accumulate_grad_batches`.
        policy: On the run's device.
        data: Set up; gets `steps_per_episode`.
        sampling: Says how long completions are at most.
        environment: Makes them conversations.

    Raises:
        ConfigError: If the user has set what is chosen here, or the weights are sharded.
    """
    if data is None or not is_auto(data):
        return
    given = set(accumulations(trainer).values())
    if data.steps_per_episode > 1 and given == {data.steps_per_episode}:
        return  # a second fit of this Trainer
    if given != {1}:
        raise ConfigError("data.steps_per_episode=auto chooses trainer.accumulate_grad_batches, too: leave it out")
    if isinstance(policy, FSDPModule):
        raise ConfigError("data.steps_per_episode=auto knows no sharded weights: set it to a number with fsdp2")
    data.steps_per_episode = 1
    longest, size = longest_completion(policy, data, module), module.rollout.num_generations
    constant, per_token = kept_bytes(policy, trainer, data.longest_prompt, longest)
    free = free_bytes(policy.device) - 3 * sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    for count in range(1, data.batch_size * size + 1):
        tokens = most_tokens(count, data, size, longest, policy.uses_packed_scoring)
        needed = constant + tokens * per_token
        if needed <= SHARE * free:
            break
    set_micro_steps(trainer, data, max(Ranks.current().gather(count)))
    told = "data.steps_per_episode=auto: %d micro-steps to an optimizer step, of at most %s tokens, %s MB of %s free"
    level = logging.INFO if needed <= SHARE * free else logging.WARNING
    log.log(level, told, data.steps_per_episode, f"{tokens:,}", f"{needed / 2**20:,.0f}", f"{free / 2**20:,.0f}")


def is_auto(data: "ScenarioDataModule | None") -> bool:
    return data is not None and vars(data)["given_arguments"].get("steps_per_episode") == "auto"


def set_micro_steps(trainer: Trainer, data: "ScenarioDataModule", count: int) -> None:
    """Has a pass take `count` micro-steps and one optimizer step."""
    for name in ("val_check_interval", "limit_train_batches"):
        value = getattr(trainer, name)
        if isinstance(value, int):  # a float is a share of an epoch
            setattr(trainer, name, value * count // data.steps_per_episode)
    trainer.accumulate_grad_batches = data.steps_per_episode = count


def longest_completion(policy: Policy, data: "ScenarioDataModule", module: Any) -> int:
    """Tokens behind a prompt at most; of a conversation, those of its environment, too."""
    most = module.rollout.max_new_tokens
    if module.environment is None:
        return int(most)
    fit = math.inf if policy.context_length is None else policy.context_length - data.longest_prompt
    return int(max(most, min(module.environment.most_tokens(most), fit)))


def most_tokens(count: int, data: "ScenarioDataModule", num_generations: int, longest: int, packed: bool) -> int:
    """Tokens that one of `count` micro-steps forwards at most: whole groups, or parts of one where there are more."""
    groups = math.ceil(data.batch_size / count)
    completions = math.ceil(data.batch_size * num_generations / max(count, data.batch_size))
    prompts = 1 if packed else completions
    return groups * (prompts * data.longest_prompt + completions * longest)


def kept_bytes(policy: Policy, trainer: Trainer, longest_prompt: int, longest: int) -> tuple[int, float]:
    """What a forward keeps for its backward, beside the weights: whatever its length, and for each token."""
    prompt, completion = min(max(longest_prompt, 1), PROBE), min(longest, PROBE)
    sizes, policy = [], policy.train()
    for count in (1, 3):
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        groups = [Group([3] * prompt, [[3] * completion] * 2)] * count
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            trainer.precision_plugin.forward_context(),
            seeded_dropout(policy.device, 0),
            torch.enable_grad(),
        ):
            outputs = policy.score(groups)  # alive until all is counted, so that no place is used twice
        sizes.append(sum(size for place, size in kept.items() if place not in weights))
        del outputs
    tokens = prompt + 2 * completion if policy.uses_packed_scoring else 2 * (prompt + completion)
    per_token = (sizes[1] - sizes[0]) / (2 * tokens)
    return max(0, int(sizes[0] - per_token * tokens)), per_token


def free_bytes(device: torch.device) -> int:
    """Memory that this process can have on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if (info := Path("/proc/meminfo")).exists():  # Linux
        return int(info.read_text().partition("MemAvailable:")[2].split()[0]) * 2**10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
