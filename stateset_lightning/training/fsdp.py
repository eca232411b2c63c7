"""FSDP2: weights, gradients and optimizer state divided among the ranks, and an unsharded copy for sampling.

Training forwards unshard a block's weights at a time, so all ranks run the same number of them: one per micro-step.
Sampling and scoring without gradient run as many as a rank's prompts need. In this process they use a copy of the
policy that has all weights, filled once per episode or evaluation and emptied afterwards: exact, as fast as on one
device, and as large as the model.

Where servers sample, there is no copy. Weights go to the servers a block at a time (`rollout.handover`), and what is
scored without gradient is scored by the shards: `Policy.score_without_gradient` asks the other ranks how many forwards
they need and makes as many. It is called at places that all ranks come to: after their samples are drawn. A reference
with weights of its own scores like this in both cases.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import AdapterReference, Policy, make_reference
from stateset_lightning.ranks import Ranks, unsharded
from stateset_lightning.rollout import InProcessEngine, RolloutEngine, VLLMEngine
from stateset_lightning.rollout.vllm_weights import fingerprint_of


class UnshardedCopy:
    """Shards a policy, and keeps a copy of it that has all weights between `fill` and `empty`, and none otherwise.

    Args:
        policy: What is to be sharded, on any device. Its blocks, and what is left with the embeddings, become a shard
            each.
        mesh: The ranks that share it.
        device: This rank's.

    Raises:
        ConfigError: If the model does not say what its blocks are.
    """

    def __init__(self, policy: Policy, mesh: DeviceMesh, device: torch.device) -> None:
        whole = list(policy.parameters())
        hollow = {id(p): nn.Parameter(torch.empty_like(p, device=device), requires_grad=False) for p in whole}
        self.policy: Policy = copy.deepcopy(policy, hollow).to(device)  # tied weights stay tied; buffers are copied
        self._places = [hollow[id(p)] for p in whole]
        self._bytes = [place.untyped_storage().nbytes() for place in self._places]
        self.empty()
        self.mesh = mesh
        _shard(policy, mesh)
        self._shards = list(policy.parameters())

    @torch.no_grad()
    def fill(self) -> None:
        """Fills in the weights as they are now. All ranks call it together."""
        for place, size, shard in zip(self._places, self._bytes, self._shards, strict=True):
            place.untyped_storage().resize_(size)
            place.copy_(unsharded(shard))

    def empty(self) -> None:
        """Gives the memory back."""
        for place in self._places:
            place.untyped_storage().resize_(0)


class ServedShards:
    """Shards a policy of which servers sample: they have the only copies of all weights.

    Args:
        policy: As of `UnshardedCopy`.
        mesh: The ranks that share it.
    """

    def __init__(self, policy: Policy, mesh: DeviceMesh) -> None:
        self.policy, self.mesh = policy, mesh
        _shard(policy, mesh)

    def fill(self) -> None:
        """Notes which weights the servers should have, from now on. All ranks call it together."""
        of_ranks = Ranks.current().gather(fingerprint_of(self.policy))
        self.policy.fingerprint_of_shards = [sum(sums) for sums in zip(*of_ranks, strict=True)]

    def empty(self) -> None:
        """Nothing is to be given back."""


Shards = UnshardedCopy | ServedShards


@contextmanager
def filled(shards: Shards) -> Iterator[None]:
    """What is sharded can be sampled from; all ranks enter together."""
    shards.fill()
    try:
        yield
    finally:
        shards.empty()


def reference_of(policy: Policy, dtype: torch.dtype, shards: Shards | None) -> Policy | AdapterReference:
    """The reference (`make_reference`) of what samples; a second model is sharded where the policy is."""
    reference = make_reference(policy, dtype)
    if isinstance(reference, Policy) and shards is not None:
        _shard(reference, shards.mesh)
    return reference


def sharded(policy: Policy, mesh: DeviceMesh, device: torch.device, engine: RolloutEngine | None) -> Shards:
    """Shards a policy; what `engine` samples from.

    Raises:
        ConfigError: If weights are quantized, the model does not say what its blocks are, or `engine` is neither ours
            nor one that samples elsewhere.
    """
    if getattr(policy.model, "hf_quantizer", None) is not None:
        raise ConfigError("trainer.strategy=fsdp2 does not shard quantized weights: use ddp")
    if isinstance(engine, InProcessEngine | None):
        return UnshardedCopy(policy, mesh, device)
    if isinstance(engine, VLLMEngine):
        return ServedShards(policy, mesh)
    raise ConfigError(f"trainer.strategy=fsdp2 does not sample by {type(engine).__name__}: use ddp or VLLMEngine")


def _shard(policy: Policy, mesh: DeviceMesh) -> None:
    names = set(policy.model._no_split_modules or [])
    blocks = [module for module in policy.model.modules() if type(module).__name__ in names]
    if not blocks:
        why = "does not say what its blocks are (`_no_split_modules`), by which it would be sharded"
        raise ConfigError(f"trainer.strategy=fsdp2: {policy.config.model_name} {why}: use trainer.strategy=ddp")
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # Embeddings and head are whole during `score`, whose chunked head uses the head's weight by itself.
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(policy, "score")
