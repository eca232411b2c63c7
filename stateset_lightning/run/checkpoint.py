"""What a checkpoint holds beside Lightning's own state, and how a run goes on from it: a checkpoint is the whole run.

Everything is a tensor or a plain container, so that it loads with `weights_only=True`.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stateset_lightning.data.loader import ROWS
from stateset_lightning.errors import ConfigError, log
from stateset_lightning.policy import Policy
from stateset_lightning.policy.lora_state import check_same_kind
from stateset_lightning.ranks import Ranks
from stateset_lightning.run import made_of
from stateset_lightning.run.checkpoint_io import FORMAT, check_weights
from stateset_lightning.run.folder import continues, run_folder
from stateset_lightning.run.lightning_internals import loader_states
from stateset_lightning.run.metrics_file import drop_later_events, metrics_files, skip_known_rows, wandb_rows
from stateset_lightning.run.records import drop_later_steps
from stateset_lightning.training.episode import Episode
from stateset_lightning.training.micro_steps import is_auto, set_micro_steps
from stateset_lightning.training.schedule import Schedule, accumulation, given_options, keep_given_options, start_at

if TYPE_CHECKING:
    from stateset_lightning.module import GRPOLightningModule


class RunCheckpoint:
    """Saves what Lightning does not, and goes on from there.

    Args:
        module: Whose run it is. Its algorithm, training state, policy and options are read when they are needed.
    """

    def __init__(self, module: "GRPOLightningModule") -> None:
        self._module = module
        self._resumed: dict[str, Any] | None = None  # the checkpoint, until training starts
        self._saved_at = 0.0  # of the run's newest checkpoint
        self._accept: set[str] = set()  # what may have changed since, by `accept_changes`
        self._accepted: set[str] = set()  # what has
        self._trained_for = 0  # tokens of the longest sequence of training
        self._made_of: dict[str, Any] = {}
        self._scheduler_options: dict[str, Any] = {}  # as it was made with them
        self.given_options: list[dict[str, Any]] = []  # of the optimizer, by group, as it was made with them

    def start(self) -> None:
        """Notes what the run is made of, when the weights are loaded; called by all ranks, before anything is restored.

        Raises:
            ConfigError: If ranks differ, or `accept_changes` has an unknown name.
        """
        self._resumed, self._accepted, self._module.loaded_step = None, set(), None
        self._accept = made_of.accepted(self._module.accept_changes)
        self._made_of = made_of.made_of(self._module.trainer, self._module)
        made_of.check_ranks_agree(self._made_of, Ranks.current())

    def prepare_for(self, longest: int) -> None:
        """Prepares all policies for this many tokens, or for those that the weights were trained for, if more.

        A table of rotary frequencies may depend on it: weights keep theirs, also where shorter prompts validate them.
        """
        module = self._module
        for policy in (module.policy, module._sampled_policy, module.reference):
            if isinstance(policy, Policy):
                policy.prepare_for(max(longest, self._trained_for))

    def check_optimizer(self) -> None:
        """The same for optimizer and scheduler, when they are made, and before their states are restored.

        Raises:
            ConfigError: If ranks differ, or the run cannot go on from the checkpoint.
        """
        given = self._module.lr_scheduler
        scheduler = given if isinstance(given, Schedule) else self._module.lr_schedulers()
        self._scheduler_options = made_of.options_of(scheduler)
        self.given_options = self.given_options or given_options(self._module.trainer.optimizers[0])  # of a subclass
        self._made_of |= made_of.made_by(self.given_options, self._module.trainer.optimizers[0], scheduler)
        made_of.check_ranks_agree(self._made_of, Ranks.current())
        self._check_same()

    def _check_same(self) -> None:
        """Compares what is known by now with the checkpoint, if there is one; drops states of replaced classes."""
        if (checkpoint := self._resumed) is None:
            return
        self._accepted = made_of.check_same(self._made_of, checkpoint["stateset"].get("made_of", {}), self._accept)
        if self._accepted & {"optimizer", "scheduler"}:
            checkpoint["lr_schedulers"] = []
        if "optimizer" in self._accepted:
            checkpoint["optimizer_states"] = []
        if self._accept & {"rows", "tokenizer", "template"}:
            for state in loader_states(checkpoint, self._module.trainer):
                for name in ROWS:
                    state.pop(name, None)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Adds the run's state.

        Raises:
            ConfigError: Inside an optimizer step, whose gradient so far would be lost.
        """
        module, trainer, state = self._module, self._module.trainer, self._module.state
        if state.started is not None:
            loss = "trainer.save_checkpoint inside an optimizer step, whose gradient so far no checkpoint holds"
            raise ConfigError(f"{loss}: call it if `pl_module.inside_optimizer_step` is false, or use ModelCheckpoint")
        for logger in trainer.loggers:
            logger.save()  # metrics up to here survive together with the checkpoint
        adapter = None if module.policy is None else module.policy.adapter
        # Seconds since 1970, and never back: another machine, on which the run goes on, may have another clock.
        self._saved_at = max(time.time(), self._saved_at + 1e-5)
        checkpoint["stateset"] = {
            "format": FORMAT,
            "saved_at": self._saved_at,
            "seed": module.seed,
            "step": trainer.global_step,
            "algorithm": module.algorithm.state_dict(),
            "episode": state.episode_of_ranks,
            "metrics": state.metrics.state_dict(),
            "bad_steps": state.bad_steps,
            "longest": self._trained_for,
            "adapter": None if adapter is None else adapter.state_dict(),
            "accumulate": trainer.accumulate_grad_batches,
            "optimizer_options": self.given_options,
            "made_of": self._made_of,
            "run_folder": str(run_folder(trainer).absolute()),
            "wandb_rows": wandb_rows(trainer),
            "metrics_rows": [writer.num_rows for writer in metrics_files(trainer)],
        }

    def load(self, checkpoint: dict[str, Any], *, training: bool) -> None:
        """Restores the run's state and, if it trains on in the same folder, cuts its files back to the checkpoint.

        Raises:
            ConfigError: If the run cannot go on exactly, or another model was trained.
        """
        module, saved = self._module, checkpoint["stateset"]
        module.loaded_step = None if training else saved["step"]
        if module.policy is not None:
            adapter_state = saved.get("adapter")
            check_same_kind(module.policy.adapter, adapter_state)
            self._trained_for = saved.get("longest", 0)
            self.prepare_for(module.policy.longest)
            for adapter in {module.policy.adapter, module._sampled_policy.adapter}:  # of shards, and of their copy
                if adapter is not None:
                    adapter.load_state_dict(adapter_state | ({"base": adapter.base} if "base" in self._accept else {}))
            if module.strict_loading and not module.is_sharded:
                name = f"model.policy.model_name={module.policy_config.model_name}"
                check_weights(module.state_dict(), checkpoint["state_dict"], name)
        if training:
            trainer, data = module.trainer, module._data
            if data is not None and is_auto(data):
                set_micro_steps(trainer, data, saved["accumulate"])
            check_resumable(saved, module.seed, accumulation(trainer, checkpoint["epoch"]), trainer.world_size)
            self._resumed, self._saved_at = checkpoint, saved.get("saved_at", 0.0)
            self._check_same()
        if "algorithm" not in self._accepted:
            module.algorithm.load_state_dict(saved["algorithm"])
        module.state.metrics.load_state_dict(saved["metrics"])
        if not training:
            return
        if not module.is_sharded and "optimizer_states" not in checkpoint:
            raise ConfigError("the checkpoint is a folder of shards: its run goes on with trainer.strategy=fsdp2 alone")
        if "made_of" not in saved and trainer.is_global_zero:
            log.info("the checkpoint does not say what its run was made of (version 0.1): whether it differs is open")
        module.state.bad_steps = saved["bad_steps"]
        if (episodes := saved["episode"]) is not None:
            if "algorithm" in self._accepted:
                raise ConfigError("accept_changes=algorithm inside an episode: take its end's checkpoint, or export it")
            module.state.episode = Episode(**episodes[trainer.global_rank])
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
        checkpoint, self._resumed = self._resumed, None
        self._trained_for = self._module._loaded_policy.longest
        if checkpoint is None:
            return
        module, trainer, saved = self._module, self._module.trainer, checkpoint["stateset"]
        # Lightning asks a GradientAccumulationScheduler at the start of an epoch, which lies before the checkpoint.
        trainer.accumulate_grad_batches = accumulation(trainer, trainer.current_epoch)
        before, scheduler = saved["optimizer_options"], module.lr_schedulers()
        changed = made_of.differences(self._made_of, saved.get("made_of") or made_of.made_by(before))
        if self._accepted & {"optimizer", "scheduler"}:
            start_at(trainer.global_step, trainer.optimizers[0], scheduler, self.given_options)
        else:
            keep_given_options(trainer.optimizers[0], scheduler, self.given_options, before)
            for name, value in self._scheduler_options.items():
                if f"model.lr_scheduler.{name}" in changed and hasattr(scheduler, name):
                    setattr(scheduler, name, value)
        for line in made_of.told(changed, "in the checkpoint") if trainer.is_global_zero else []:
            log.info("%s: the new value is used", line)
        if not changed and continues(trainer, saved["run_folder"]):
            skip_known_rows(trainer, saved["wandb_rows"])


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
        inside = f"the checkpoint's {state['accumulate']}, inside an episode: resume with that, or from its end"
        raise ConfigError(f"trainer.accumulate_grad_batches={accumulate} differs from {inside}")
    if (ranks := len(state["episode"])) != world:
        raise ConfigError(f"the checkpoint lies inside an episode of {ranks} ranks and cannot be resumed by {world}")
