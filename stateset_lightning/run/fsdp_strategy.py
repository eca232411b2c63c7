"""`trainer.strategy: fsdp2`: Lightning's strategy over all devices, with checkpoints that are complete or absent."""

# No `from __future__ import annotations`: the command line reads the strategy's signature.
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout

# Private in lightning 2.6.6: the readers of a folder of shards, and of a file's weights, into sharded weights.
from lightning.fabric.strategies.model_parallel import _load_checkpoint, _load_raw_module_state
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from torch.distributed import HashStore, ProcessGroupGloo, Store, distributed_c10d
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.optim import Optimizer

from stateset_lightning.files import atomic_folder, writing
from stateset_lightning.run.checkpoint_io import check_weights, is_sharded, of_first_rank, read_checkpoint, safe_shards


class _OneThread(ProcessGroupGloo):
    """Gloo with one thread that runs the collectives of a group, not two.

    Two crash the process (torch 2.13), seldom and on a busy machine: each writes the name of the collective that it has
    ended into one string of the group, without a lock (`ProcessGroupGloo::runLoop`). A name of more than 15 letters has
    memory of its own, which both then free. `ALLGATHER_COALESCED` has, the collective that makes a DTensor whole; those
    of DDP are shorter.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options: Any = ProcessGroupGloo(HashStore(), 0, 1, timeout).options  # with the devices that torch would choose
        options._threads = 1
        super().__init__(store, rank, size, options)


class FSDP2Strategy(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`: Lightning's `ModelParallelStrategy` over all devices of all machines.

    By itself "auto" would mean tensor parallelism inside a machine. Ranks talk by NCCL on GPUs, by gloo on CPUs. A
    checkpoint takes its name when it is complete.

    Args:
        save_distributed_checkpoint: Every rank writes its shards to a folder; otherwise rank 0 unshards the weights and
            writes one file.
        timeout: How long a rank waits for another.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, timeout: timedelta = default_pg_timeout) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, timeout=timeout)

    def setup_environment(self) -> None:
        # Private in lightning 2.6.6: with "auto", its base would count the devices of one machine alone.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _setup_distributed(self) -> None:
        # Private in lightning 2.6.6: makes the group of all ranks, over which weights are sharded; also called by
        # itself, before ranks look for a checkpoint. Private in torch 2.13: the class of a group. A backend of another
        # name would not do, as Lightning asks for "gloo".
        distributed_c10d.ProcessGroupGloo = _OneThread  # type: ignore[misc]
        try:
            super()._setup_distributed()
        finally:
            distributed_c10d.ProcessGroupGloo = ProcessGroupGloo  # type: ignore[misc]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        # Lightning writes into the folder itself, over the shards of an earlier checkpoint of that name, and every rank
        # to the path of rank 0.
        path = Path(filepath)
        if self.is_global_zero and path.is_file():
            with writing(path):
                path.unlink()
        with atomic_folder(path, overwrite=True) if self.is_global_zero else nullcontext(path) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)
            self.barrier()
        self.barrier()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = super().optimizer_state(optimizer)
        if self._save_distributed_checkpoint or not self.is_global_zero:
            return state
        # Lightning numbers all parameters, or leaves the names where none has a state (SGD). An optimizer's own state,
        # as ddp has it, numbers those that it trains.
        assert self.model is not None
        trained = [(number, name) for number, (name, p) in enumerate(self.model.named_parameters()) if p.requires_grad]
        return _renamed(state, {key: place for place, keys in enumerate(trained) for key in keys})

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None
        # As Lightning's, which would take rank 0's path on every rank.
        with of_first_rank(Path(self.broadcast(checkpoint_path))) as path:
            if is_sharded(path):
                state = {f"optimizer_{i}": optimizer for i, optimizer in enumerate(self.optimizers)}
                with safe_shards(path):
                    return _load_checkpoint(path, {"state_dict": self.model, **state}, True, True, True)
            content = read_checkpoint(path, check_sums=True, mmap=True)
            weights = content.pop("state_dict")
            check_weights(self.model.state_dict(), weights, "model.policy.model_name")
            _load_raw_module_state(weights, self.model, strict=False)  # the model under an adapter is in no checkpoint
            names = dict(enumerate(name for name, p in self.model.named_parameters() if p.requires_grad))
            options = StateDictOptions(broadcast_from_rank0=True, full_state_dict=True)
            for optimizer, saved in zip(self.optimizers, content["optimizer_states"], strict=False):
                if saved["state"]:
                    set_optimizer_state_dict(self.model, optimizer, _renamed(saved, names), options=options)
                else:  # that of SGD, which torch 2.13 does not take there
                    optimizer.load_state_dict(saved)
            return content


def _renamed(state: dict[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other names of its parameters."""
    groups = [group | {"params": [names[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[name]: value for name, value in state["state"].items()}, "param_groups": groups}


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallel over all devices")

# Those under which sampling and reductions are right.
SUPPORTED_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, FSDP2Strategy)
