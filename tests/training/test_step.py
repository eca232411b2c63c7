"""The order of a step, and what it refuses; its numbers are tested where they are made, its runs in test_module.py."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from stateset_lightning.algorithm import GRPO
from stateset_lightning.ranks import Ranks
from stateset_lightning.training.step import TrainingState, TrainingStep
from stateset_lightning.types import PromptBatch


def make_step(**parts: Any) -> TrainingStep:
    nothing: Any = None
    given = {
        "state": TrainingState(),
        "policy": nothing,
        "sampled_policy": nothing,
        "unsharded": nullcontext,
        "reference": None,
        "algorithm": GRPO(beta=0),
        "sampler": nothing,
        "ranks": Ranks(),
        "accumulate": 1,
        "max_tokens_per_step": None,
        "report": None,
        "upcoming": lambda: None,
    }
    return TrainingStep(**{**given, **parts})


def test_a_missing_first_micro_step_is_an_error_not_another_episode() -> None:
    batch = PromptBatch([[1]], [[]], [], [0], episode_index=3, micro_step=1, num_micro_steps=2, steps_per_episode=2)
    with pytest.raises(RuntimeError, match="micro-step 1 came without the first of episode 3"):
        make_step().loss(batch)
