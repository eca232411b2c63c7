"""FSDP2: weights, gradients and optimizer state divided among the ranks, and the whole policy where a rank works alone.

Training forwards gather a block's weights at a time, so all ranks run the same number of them: one per micro-step.
Sampling and scoring without gradient run as many as a rank's prompts need. They use a whole copy of the policy, filled
once per episode or evaluation and emptied afterwards: exact, as fast as on one device, and as large as the model.
"""

# No `from __future__ import annotations`: the command line reads the strategy's signature.
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from stateset_lightning.errors import ConfigError
from stateset_lightning.files import atomic_folder
from stateset_lightning.policy import Policy
from stateset_lightning.rollout import InProcessEngine, RolloutEngine
from stateset_lightning.run.checkpoint_io import is_sharded, plain_shards, read_checkpoint


class FSDP2Strategy(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`: Lightning's `ModelParallelStrategy` over all devices of all machines.

    By itself "auto" would mean tensor parallelism inside a machine. A checkpoint takes its name when it is whole.

    Args:
        save_distributed_checkpoint: Every rank writes its shards to a folder; otherwise rank 0 gathers all and writes
            one file.
        process_group_backend: By default NCCL on GPUs, gloo on CPUs.
        timeout: That a rank waits for another.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        # Lightning writes into the folder itself, over the shards of an earlier checkpoint of that name. It takes rank
        # 0's path.
        path = Path(filepath)
        if self.is_global_zero and path.is_file():
            path.unlink()
        with atomic_folder(path, overwrite=True) if self.is_global_zero else nullcontext(path) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)
            self.barrier()
        self.barrier()

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if path.is_file():
            read_checkpoint(path, check_sums=True, map_location="cpu", mmap=True)
        with plain_shards(path) if is_sharded(path) else nullcontext():
            return super().load_checkpoint(path, weights_only=True)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallel over all devices")


class WholePolicy:
    """A sharded policy's copy that has all weights on this device between `gather` and `release`, and none otherwise.

    Args:
        policy: What is to be sharded, on any device. Its blocks, and what is left with the embeddings, become a shard
            each.
        mesh: The ranks that share it.
        device: This rank's.

    Raises:
        ConfigError: If the model does not say what its blocks are.
    """

    def __init__(self, policy: Policy, mesh: DeviceMesh, device: torch.device) -> None:
        hollow = {
            id(p): nn.Parameter(torch.empty_like(p, device=device), requires_grad=False) for p in policy.parameters()
        }
        self.policy: Policy = copy.deepcopy(policy, hollow).to(device)  # tied weights stay tied; buffers are copied
        self._shards = list(policy.parameters())
        self._places = [hollow[id(p)] for p in self._shards]
        self._bytes = [place.untyped_storage().nbytes() for place in self._places]
        self.release()
        _shard(policy, mesh)
        self._shards = list(policy.parameters())

    @torch.no_grad()
    def gather(self) -> None:
        """Fills in the weights as they are now. All ranks call it together."""
        for place, size, shard in zip(self._places, self._bytes, self._shards, strict=True):
            place.untyped_storage().resize_(size)
            place.copy_(whole(shard))

    def release(self) -> None:
        """Gives the memory back."""
        for place in self._places:
            place.untyped_storage().resize_(0)


class ShardableModule(LightningModule):
    """The part of the module that knows whether its policy is sharded."""

    policy: Policy | None
    engine: RolloutEngine | None
    _whole: WholePolicy | None = None

    def _shard_policy(self) -> None:
        """Once, where the strategy wants it."""
        assert self.policy is not None
        if self._whole is None and self._trainer is not None and isinstance(self.trainer.strategy, FSDP2Strategy):
            if self.policy.adapter is not None:
                raise ConfigError(
                    "trainer.strategy=fsdp2 does not shard adapters: use ddp with model.policy.lora, or train all"
                    " weights"
                )
            if not isinstance(self.engine, InProcessEngine | None):
                raise ConfigError(
                    f"trainer.strategy=fsdp2 samples in this process, not by {type(self.engine).__name__}: use ddp"
                    " with it"
                )
            mesh = self.trainer.strategy.device_mesh["data_parallel"]
            self._whole = WholePolicy(self.policy, mesh, self.trainer.strategy.root_device)

    @property
    def _sampled_policy(self) -> Policy:
        """What samples and scores without gradient; of a sharded policy, inside `_gathered` and evaluations only."""
        assert self.policy is not None, "configure_model() loads the policy"
        return self.policy if self._whole is None else self._whole.policy

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        self._gather()
        try:
            yield
        finally:
            self._release()

    def _gather(self) -> None:
        if self._whole is not None:
            self._whole.gather()

    def _release(self) -> None:
        if self._whole is not None:
            self._whole.release()

    # Here and not batch by batch: ranks may have different numbers of batches.
    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _gather
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _release


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank has a part; all ranks call it together. Any other tensor is returned as it
    is.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: Sequence[Tensor], norm_type: float = 2.0) -> float:
    """Norm of all tensors together, over all ranks where they are sharded; 0 of none."""
    return float(whole(torch.nn.utils.get_total_norm(tensors, norm_type)))


def _shard(policy: Policy, mesh: DeviceMesh) -> None:
    names = set(policy.model._no_split_modules or [])
    blocks = [module for module in policy.model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"trainer.strategy=fsdp2: {policy.config.model_name} does not say what its blocks are"
            " (`_no_split_modules`), by which it would be sharded: use trainer.strategy=ddp"
        )
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # Embeddings and head are whole during `score`, whose chunked head uses the head's weight by itself.
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(policy, "score")
