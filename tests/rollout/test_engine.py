"""Defaults and refusals of the rollout's options."""

import dataclasses

import pytest
from docstring_parser import parse

from stateset_lightning.errors import ConfigError
from stateset_lightning.rollout import RolloutConfig


def test_defaults_sample_the_model_as_it_is() -> None:
    config = RolloutConfig()
    assert (config.temperature, config.top_k, config.top_p, config.min_p, config.stop) == (1.0, None, None, None, [])
    assert config.num_generations == 8


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.rollout.stop=\['end', ''\] contains an empty string"):
        RolloutConfig(stop=["end", ""])


@pytest.mark.parametrize("filters", [{}, {"top_p": 1.0}])
def test_a_kept_mask_of_nothing_excluded_is_refused(filters: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"keep_sampling_mask=true has no effect: set top_k, min_p or top_p below 1"):
        RolloutConfig(keep_sampling_mask=True, **filters)  # type: ignore[arg-type]


def test_an_unknown_way_of_decoding_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.rollout.decoding='fast' must be one of auto, graph, eager"):
        RolloutConfig(decoding="fast")  # type: ignore[arg-type]


def test_a_config_cannot_change_and_has_its_own_list() -> None:
    config = RolloutConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 2.0  # type: ignore[misc]
    assert config.stop is not RolloutConfig().stop


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [("num_generations", 1, "at least 2"), ("temperature", 0.0, "above 0"), ("top_p", 1.5, "at most 1")],
)
def test_bounds_are_named(name: str, value: float, bound: str) -> None:
    with pytest.raises(ConfigError, match=f"model.rollout.{name}={value} must be {bound}"):
        RolloutConfig(**{name: value})  # type: ignore[arg-type]


def test_every_option_is_documented_where_the_command_line_looks() -> None:
    described = {param.arg_name for param in parse(RolloutConfig.__doc__ or "").params}
    assert described == {field.name for field in dataclasses.fields(RolloutConfig)}
