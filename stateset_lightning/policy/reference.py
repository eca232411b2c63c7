"""The reference policy: the policy as it started."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stateset_lightning.policy.loading import load_model
from stateset_lightning.policy.policy import Group, Policy


class AdapterReference:
    """The reference policy without a second model in memory: the policy as it started, by its own base.

    Args:
        policy: With an adapter.
    """

    def __init__(self, policy: Policy) -> None:
        assert policy.adapter is not None
        self.policy = policy
        self.adapter = policy.adapter

    def score_without_gradient(self, groups: Sequence[Group], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """See `Policy.score_without_gradient`."""
        with self.adapter.at_start():
            return self.policy.score_without_gradient(groups, temperature)


def make_reference(policy: Policy, dtype: torch.dtype) -> Policy | AdapterReference:
    """The reference of a policy: itself without its adapter, or a second model, loaded from the source.

    Not a copy of the policy, which may have been trained or restored since it was loaded.
    """
    if policy.adapter is not None:
        return AdapterReference(policy)
    return Policy(load_model(policy.config, dtype), policy.config).requires_grad_(False)
