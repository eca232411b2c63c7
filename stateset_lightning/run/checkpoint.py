"""What a checkpoint holds beside Lightning's own state, and how a run goes on from it: a checkpoint is the whole run.

Everything is a tensor or a plain container, so that it loads with `weights_only=True`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy.lora_state import check_same_kind
from stateset_lightning.run.folder import continues, run_folder
from stateset_lightning.run.metrics_file import drop_later_events, metrics_files, skip_known_rows, wandb_rows
from stateset_lightning.run.records import drop_later_steps
from stateset_lightning.training.episode import Episode
from stateset_lightning.training.schedule import accumulation, keep_given_options

if TYPE_CHECKING:
    from stateset_lightning.module import GRPOLightningModule

_log = logging.getLogger("stateset_lightning")


class RunCheckpoint:
    """Saves what Lightning does not, and goes on from there.

    Args:
        module: Whose run it is. Its algorithm, training state, policy and options are read when they are needed.
    """

    def __init__(self, module: GRPOLightningModule) -> None:
        self._module = module
        self._resumed: Mapping[str, Any] | None = None  # state of the checkpoint, until training starts
        self.given_options: list[dict[str, Any]] = []
        """Options of the optimizer, by parameter group, as it was made with them."""

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Adds the run's state.

        Raises:
            ConfigError: Inside an optimizer step, whose gradient so far would be lost.
        """
        module, trainer, state = self._module, self._module.trainer, self._module.state
        if state.started is not None:
            raise ConfigError(
                "trainer.save_checkpoint was called inside an optimizer step, whose gradient so far no checkpoint holds"
                ": call it where `pl_module.inside_optimizer_step` is false, or use a ModelCheckpoint, which waits"
            )
        for logger in trainer.loggers:
            logger.save()  # metrics up to here survive together with the checkpoint
        adapter = None if module.policy is None else module.policy.adapter
        checkpoint["stateset"] = {
            "seed": module.seed,
            "step": trainer.global_step,
            "algorithm": module.algorithm.state_dict(),
            "episode": state.episode_of_ranks,
            "metrics": state.metrics.state_dict(),
            "bad_steps": state.bad_steps,
            "adapter": None if adapter is None else adapter.state_dict(),
            "accumulate": trainer.accumulate_grad_batches,
            "optimizer_options": self.given_options,
            "options": self._options(),
            "run_folder": str(run_folder(trainer).absolute()),
            "wandb_rows": wandb_rows(trainer),
            "metrics_rows": [writer.num_rows for writer in metrics_files(trainer)],
        }

    def load(self, checkpoint: dict[str, Any], *, training: bool) -> None:
        """Restores the run's state and, if it trains on in the same folder, cuts its files back to the checkpoint.

        Raises:
            ConfigError: If the run cannot go on exactly.
        """
        module, saved = self._module, checkpoint["stateset"]
        module.algorithm.load_state_dict(saved["algorithm"])
        module.state.metrics.load_state_dict(saved["metrics"])
        if module.policy is not None:
            adapter, adapter_state = module.policy.adapter, saved.get("adapter")
            check_same_kind(adapter, adapter_state)
            if adapter is not None and adapter_state is not None:
                adapter.load_state_dict(adapter_state)
        if not training:
            return
        trainer = module.trainer
        check_resumable(saved, module.seed, accumulation(trainer, checkpoint["epoch"]), trainer.world_size)
        if not module.is_sharded and "optimizer_states" not in checkpoint:
            raise ConfigError("the checkpoint is a folder of shards: its run goes on with trainer.strategy=fsdp2 alone")
        self._resumed = saved
        module.state.bad_steps = saved["bad_steps"]
        if (episodes := saved["episode"]) is not None:
            module.state.episode = Episode.from_state_dict(episodes[trainer.global_rank])
            module.state.episode_of_ranks = episodes
        if continues(trainer, saved["run_folder"]):
            for writer, rows in zip(metrics_files(trainer), saved["metrics_rows"], strict=False):
                writer.resume(rows)
            drop_later_steps(trainer, saved["step"])
            drop_later_events(trainer, saved["step"])

    def restore_options(self) -> None:
        """Makes options that were given win over the checkpoint's, and logs those that differ.

        Called when training starts: optimizer and scheduler have been restored by then.
        """
        saved, self._resumed = self._resumed, None
        if saved is None:
            return
        module, trainer = self._module, self._module.trainer
        # Lightning asks a GradientAccumulationScheduler at the start of an epoch, which lies before the checkpoint.
        trainer.accumulate_grad_batches = accumulation(trainer, trainer.current_epoch)
        given, before = self.given_options, saved["optimizer_options"]
        keep_given_options(trainer.optimizers[0], module.lr_schedulers(), given, before)
        pairs = [(name, value, saved["options"].get(name, value)) for name, value in self._options().items()]
        for now, then in zip(given, before, strict=True):
            pairs += [(f"model.optimizer {name}", now[name], then[name]) for name in sorted(now.keys() & then.keys())]
        changed = [pair for pair in pairs if pair[1] != pair[2]]
        for pair in changed if trainer.is_global_zero else []:
            _log.info("%s=%s, and %s in the checkpoint: the new value is used", *pair)
        if not changed and continues(trainer, saved["run_folder"]):
            skip_known_rows(trainer, saved["wandb_rows"])

    def _options(self) -> dict[str, Any]:
        """Options that may change between a checkpoint and its resume."""
        module = self._module
        names = ("max_steps", "max_epochs", "gradient_clip_val")
        options = {f"trainer.{name}": getattr(module.trainer, name) for name in names}
        options |= {f"model.rollout.{name}": value for name, value in asdict(module.rollout).items()}
        own = {name: asdict(value) if is_dataclass(value) else value for name, value in vars(module.algorithm).items()}  # type: ignore[arg-type]
        plain = {name: value for name, value in own.items() if isinstance(value, float | int | str | dict | None)}
        adaptive = module.algorithm.state_dict()
        return options | {f"model.algorithm.{name}": value for name, value in plain.items() if name not in adaptive}


def check_resumable(state: Mapping[str, Any], seed: int, accumulate: int, world: int) -> None:
    """A run goes on exactly where its checkpoint left it, or not at all.

    Raises:
        ConfigError: If the seed differs, or, inside an episode, the accumulation or the number of ranks.
    """
    if state["seed"] != seed:
        raise ConfigError(f"seed_everything={seed} differs from the checkpoint's {state['seed']}: resume with that")
    if state["episode"] is None:
        return
    if state["accumulate"] != accumulate:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={accumulate} differs from the checkpoint's {state['accumulate']}, which"
            " was made inside an episode: resume with that, or from a checkpoint at an episode's end"
        )
    if (ranks := len(state["episode"])) != world:
        raise ConfigError(
            f"the checkpoint was made inside an episode of {ranks} ranks and cannot be resumed by {world}"
        )
