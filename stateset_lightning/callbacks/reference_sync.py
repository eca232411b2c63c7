"""A reference policy that follows the trained one, a step at a time."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stateset_lightning.bounds import check_bounds
from stateset_lightning.errors import ConfigError


class ReferenceSync(Callback):
    """Mixes the policy into the reference every few optimizer steps (TR-DPO's soft update, arXiv:2404.09656, equation
    5).

    reference <- mixup * policy + (1 - mixup) * reference. `mixup` 1 is the hard update: the reference becomes the
    policy. An episode keeps the reference log-probs that it was made with; the next one sees the moved reference. The
    moved weights are in every checkpoint.

    Args:
        every_n_steps: Optimizer steps between updates.
        mixup: Share of the policy in the new reference.
    """

    def __init__(self, every_n_steps: Annotated[int, Ge(1)] = 64, mixup: Annotated[float, Gt(0), Le(1)] = 0.6) -> None:
        check_bounds("ReferenceSync", ReferenceSync.__init__, {"every_n_steps": every_n_steps, "mixup": mixup})
        self.every_n_steps = every_n_steps
        self.mixup = mixup
        self._reference: nn.Module | None = None
        self._last_step = 0  # the newest update; 0: none yet
        self._restored: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the reference; runs after a checkpoint was read.

        Raises:
            ConfigError: If there is no reference, or none with weights of its own.
        """
        policy, reference = getattr(pl_module, "policy", None), getattr(pl_module, "reference", None)
        if reference is None or policy is None:
            raise ConfigError(
                "ReferenceSync: the run has no reference policy to move; set model.algorithm.beta above 0, or remove"
                " the callback"
            )
        if any(isinstance(p, DTensor) for p in policy.parameters()):
            raise ConfigError(
                "ReferenceSync cannot mix sharded weights: remove the callback, or set trainer.strategy to ddp"
            )
        if not isinstance(reference, nn.Module):
            raise ConfigError(
                "ReferenceSync: the policy trains an adapter, and its reference is the policy as it started, with no"
                " weights of its own to move; nor is a mixture of two adapters' factors the mixture of the adapters."
                " Remove the callback, or train without adapter"
            )
        self._reference = reference
        if self._restored is not None:
            reference.load_state_dict(self._restored)
            self._restored = None

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Before ModelCheckpoint, which Lightning puts last: a checkpoint of this step holds the moved reference.
        step = trainer.global_step
        # further micro-steps of the next optimizer step, or its first
        if step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        assert self._reference is not None
        for mine, theirs in zip(self._reference.parameters(), pl_module.policy.parameters(), strict=True):  # type: ignore[union-attr]
            mine.lerp_(theirs, self.mixup)

    def state_dict(self) -> dict[str, Any]:
        """The newest update's step, and the reference's weights (not copied) once they have moved."""
        moved = self._reference is not None and self._last_step > 0
        return {
            "step": self._last_step,
            "reference": self._reference.state_dict() if moved and self._reference is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step, self._restored = state_dict["step"], state_dict["reference"]
