"""Lightning's own parts beside a run: what cannot work is refused before anything is loaded, in one line each.

docs/lightning.md lists what works and what is refused. Trainer options are checked in training/checks.py, optimizers in
training/schedule.py.
"""

from collections.abc import Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks

from stateset_lightning.errors import ConfigError
from stateset_lightning.run.find_checkpoint import found_by_trainer
from stateset_lightning.run.install import install
from stateset_lightning.run.lightning_internals import is_compiled, is_watched_by_wandb, search_with

_ON_EXCEPTION = "saves in the middle of whatever failed: leave it out; signals save by themselves, and errors never"
# Callbacks that cannot work, with their subclasses: why, and what to use.
REFUSED: dict[type[Callback], str] = {
    callbacks.StochasticWeightAveraging: "averages nothing here: use WeightAveraging or EMAWeightAveraging",
    callbacks.BatchSizeFinder: "starts anew inside an episode: set data.batch_size, for which `doctor` measures memory",
    callbacks.LearningRateFinder: "judges by one loss: compare train/reward of short runs with several learning rates",
    callbacks.BaseFinetuning: "finds no weights yet: use model.policy.lora, or freeze them in your configure_model()",
    callbacks.ModelPruning: "finds no weights yet: prune the model first, and give its folder as model.policy",
    callbacks.OnExceptionCheckpoint: _ON_EXCEPTION,
}

_FABRIC = "Fabric runs no data module, callbacks or checkpoints, of which an episode is made: use Trainer.fit()"
_SPAWN = "trainer.strategy=ddp_spawn copies the module, which does not survive it: use ddp (in a notebook ddp_notebook)"
_COMPILED = "torch.compile(module) compiles training_step, which samples completions: give the module as it is"
_WATCHED = "the logger's watch(module) found no weights yet: call it in a callback's on_fit_start, with log_graph=False"


def check_parts(trainer: Trainer, module: Any) -> None:
    """The Trainer has no part that cannot work; called first of all in a run.

    Raises:
        ConfigError: If it has.
    """
    reasons = [_COMPILED] if is_compiled(module) else []
    reasons += [_WATCHED] if module.policy is None and is_watched_by_wandb(module) else []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        reasons += [f"{name} {why}" for kind, why in REFUSED.items() if isinstance(callback, kind)]
        reasons += [f"{name} {_ON_EXCEPTION}"] if getattr(callback, "save_on_exception", False) else []
    for reason in reasons:
        raise ConfigError(reason)


def _attach(module: LightningModule, trainer: Trainer | None) -> None:
    LightningModule.trainer.fset(module, trainer)  # type: ignore[attr-defined]
    if trainer is not None:
        search_with(trainer, found_by_trainer)


class RunsInTrainer(LightningModule):
    """A module that the Trainer alone runs, in whatever processes its launcher makes.

    Its Trainer finds `ckpt_path` as the command line does, in fit, validate, test and predict.
    """

    policy: Any
    # What loggers call the run's folder. `evaluation` where the Trainer will not train, too: it keeps its folder.
    folder_kind = "version"
    loaded_step: int | None = None  # of the checkpoint that the weights are of, until they are trained
    trainer = LightningModule.trainer.setter(_attach)  # type: ignore[attr-defined]  # set before Lightning searches

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **given: Any) -> Any:
        """As Lightning's; arguments that no checkpoint holds are given again, the reward at least."""
        given["_instantiator"] = None  # a file could name one, and classes for it to import
        return super().load_from_checkpoint(checkpoint_path, *args, **given)

    @property
    def weights_step(self) -> int:
        """Optimizer steps behind the weights: those of a checkpoint that was loaded to be evaluated, or the run's."""
        return self.trainer.global_step if self.loaded_step is None else self.loaded_step

    def configure_callbacks(self) -> list[Callback]:
        check_parts(self.trainer, self)
        return install(self.trainer, self.folder_kind)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.policy is None and state_dict:  # trained by processes that were forked before they loaded weights
            self.configure_model()
        return super().load_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None:
            raise ConfigError(_SPAWN)
        return {**super().__getstate__(), "scorer": None}  # its threads cannot be copied: `setup` makes another

    def on_after_setup(self, **kwargs: Any) -> None:  # called by Fabric.setup() alone
        raise ConfigError(_FABRIC)
