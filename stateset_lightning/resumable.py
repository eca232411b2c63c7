"""A checkpoint is the whole run: the part of the module that says what goes into one, and what comes out of it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.bad_steps import drop_later_steps
from stateset_lightning.callbacks.last_checkpoint import LastCheckpoint, keeping_last
from stateset_lightning.callbacks.metrics_file import (
    drop_later_events,
    install_metrics_files,
    metrics_files,
    skip_known_rows,
    wandb_rows,
)
from stateset_lightning.callbacks.run_folder import continues, run_folder
from stateset_lightning.callbacks.step_end import StepEnd
from stateset_lightning.checkpoint_io import AtomicCheckpointIO
from stateset_lightning.episode import Episode
from stateset_lightning.errors import ConfigError
from stateset_lightning.metrics import RunMetrics
from stateset_lightning.policy import Policy
from stateset_lightning.policy.adapter_state import check_same_kind
from stateset_lightning.policy.schedule import keep_given_options
from stateset_lightning.ranks import Ranks
from stateset_lightning.rollout import RolloutConfig
from stateset_lightning.run_checks import check_resumable
from stateset_lightning.seeding import run_seed
from stateset_lightning.sharding import ShardableModule

_log = logging.getLogger("stateset_lightning")


class ResumableModule(ShardableModule):
    """Saves what Lightning does not, as tensors and plain containers, and goes on from there."""

    algorithm: Algorithm
    rollout: RolloutConfig
    metrics: RunMetrics
    policy: Policy | None

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self._given_seed = seed
        self._episode: Episode | None = None
        self._episode_states: list[dict[str, Any]] | None = None  # of all ranks, while a checkpoint would need them
        self._step_started: float | None = None
        self._bad_steps = 0
        self._given_options: list[dict[str, Any]] = []  # of the optimizer
        self._resumed: Mapping[str, Any] | None = None  # state of the checkpoint, until training starts

    @property
    def inside_optimizer_step(self) -> bool:
        """Whether a gradient is being accumulated or applied: a checkpoint made now could not be resumed exactly."""
        return self._step_started is not None

    @property
    def episode(self) -> Episode | None:
        """What is being trained on, of this rank; for callbacks."""
        return self._episode

    @property
    def seed(self) -> int:
        """The seed of all sampling: the one given, or that of `seed_everything`, also if it was called after this was made."""
        return run_seed() if self._given_seed is None else self._given_seed

    @property
    def _ranks(self) -> Ranks:
        return Ranks(self.trainer.global_rank, self.trainer.world_size) if self._trainer is not None else Ranks()

    @property
    def _accumulate(self) -> int:
        return int(self.trainer.accumulate_grad_batches)

    def configure_callbacks(self) -> list[Callback]:
        """Installs our writers of checkpoints and metrics where the user has chosen none, and adds the callbacks that a run needs."""
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        install_metrics_files(self.trainer)
        needed: list[type[Callback]] = [StepEnd, LastCheckpoint] if keeping_last(self.trainer) else [StepEnd]
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [kind() for kind in needed if kind not in present]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the run's state.

        Raises:
            ConfigError: Inside an optimizer step: the gradient so far would be lost, and the run could not go on exactly.
        """
        trainer = self.trainer
        if self.inside_optimizer_step:
            raise ConfigError(
                "trainer.save_checkpoint was called inside an optimizer step, whose gradient so far no checkpoint holds: call it where "
                "`pl_module.inside_optimizer_step` is false, or use a ModelCheckpoint, which waits"
            )
        for logger in trainer.loggers:
            logger.save()  # metrics up to here survive together with the checkpoint
        checkpoint["stateset"] = {
            "seed": self.seed,
            "step": trainer.global_step,
            "algorithm": self.algorithm.state_dict(),
            "episode": self._episode_states,
            "metrics": self.metrics.state_dict(),
            "bad_steps": self._bad_steps,
            "adapter": None if self.policy is None or self.policy.adapter is None else self.policy.adapter.state_dict(),
            "accumulate": self._accumulate,
            "optimizer_options": self._given_options,
            "options": self._options(),
            "run_folder": str(run_folder(trainer).absolute()),
            "wandb_rows": wandb_rows(trainer),
            "metrics_rows": [writer.num_rows for writer in metrics_files(trainer)],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the run's state, and its files if it goes on in the same folder.

        Raises:
            ConfigError: If the run cannot go on exactly.
        """
        state = checkpoint["stateset"]
        self.algorithm.load_state_dict(state["algorithm"])
        self.metrics.load_state_dict(state["metrics"])
        self._load_adapter_state(state.get("adapter"))
        if self._trainer is None or not self.trainer.training:
            return
        check_resumable(state, self.seed, self._accumulate, self._ranks.world)
        if self._whole is None and "optimizer_states" not in checkpoint:
            raise ConfigError("the checkpoint is a folder of shards: its run goes on with trainer.strategy=fsdp2 alone")
        self._resumed = state
        self._bad_steps = state["bad_steps"]
        if (episodes := state["episode"]) is not None:
            self._episode, self._episode_states = Episode.from_state_dict(episodes[self._ranks.rank]), episodes
        if continues(self.trainer, state["run_folder"]):
            for writer, rows in zip(metrics_files(self.trainer), state["metrics_rows"], strict=False):
                writer.resume(rows)
            drop_later_steps(self.trainer, state["step"])
            drop_later_events(self.trainer, state["step"])

    def _load_adapter_state(self, saved: Mapping[str, Any] | None) -> None:
        if self.policy is not None:
            check_same_kind(self.policy.adapter, saved)
            if self.policy.adapter is not None and saved is not None:
                self.policy.adapter.load_state_dict(saved)

    def on_train_start(self) -> None:
        """Optimizer and scheduler are restored by now: options given win over the checkpoint's, and the log says which differ."""
        state, self._resumed = self._resumed, None
        if state is None:
            return
        given, saved = self._given_options, state["optimizer_options"]
        keep_given_options(self.trainer.optimizers[0], self.lr_schedulers(), given, saved)
        pairs = [(name, value, state["options"].get(name, value)) for name, value in self._options().items()]
        for now, before in zip(given, saved, strict=True):
            pairs += [(f"model.optimizer {name}", now[name], before[name]) for name in sorted(now.keys() & before.keys())]
        changed = [pair for pair in pairs if pair[1] != pair[2]]
        if self.trainer.is_global_zero:
            for pair in changed:
                _log.info("%s=%s, and %s in the checkpoint: the new value is used", *pair)
        if not changed and continues(self.trainer, state["run_folder"]):
            skip_known_rows(self.trainer, state["wandb_rows"])

    def _options(self) -> dict[str, Any]:
        """Options that may change between a checkpoint and its resume."""
        options = {f"trainer.{name}": getattr(self.trainer, name) for name in ("max_steps", "max_epochs", "gradient_clip_val")}
        options |= {f"model.rollout.{name}": value for name, value in asdict(self.rollout).items()}
        own = {name: asdict(value) if is_dataclass(value) else value for name, value in vars(self.algorithm).items()}  # type: ignore[arg-type]
        plain = {name: value for name, value in own.items() if isinstance(value, float | int | str | dict | None)}
        adaptive = self.algorithm.state_dict()
        return options | {f"model.algorithm.{name}": value for name, value in plain.items() if name not in adaptive}
