"""Bounds hold from Python as on the command line."""

from typing import Any

import pytest

from stateset_lightning import PolicyConfig, RolloutConfig
from stateset_lightning.algorithm import DAPO, GRPO
from stateset_lightning.errors import ConfigError
from stateset_lightning.training.schedule import Schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RolloutConfig(num_generations=1), r"model\.rollout\.num_generations=1 must be at least 2"),
        (lambda: RolloutConfig(temperature=0.0), r"model\.rollout\.temperature=0\.0 must be above 0"),
        (lambda: RolloutConfig(top_p=5), r"model\.rollout\.top_p=5 must be at most 1"),
        (lambda: RolloutConfig(max_batch_rows=0), r"model\.rollout\.max_batch_rows=0 must be at least 1"),
        (lambda: PolicyConfig("tiny", dropout=1.0), r"model\.policy\.dropout=1\.0 must be below 1"),
        (lambda: Schedule(warmup_steps=-1), r"model\.lr_scheduler\.warmup_steps=-1 must be at least 0"),
        (lambda: GRPO(beta=-0.1), r"model\.algorithm\.beta=-0\.1 must be at least 0"),
        (lambda: DAPO(epsilon_low=1.5), r"model\.algorithm\.epsilon_low=1\.5 must be below 1"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_none_is_within_every_optional_bound() -> None:
    assert RolloutConfig(top_k=None, top_p=None).top_k is None
