"""Making a `PolicyConfig` from what users and checkpoints give."""

import pytest

from stateset_lightning.policy import PolicyConfig


def test_the_model_has_no_default() -> None:
    with pytest.raises(TypeError, match="model_name"):
        PolicyConfig()  # type: ignore[call-arg]


def test_foreign_code_and_dropout_are_off_by_default() -> None:
    config = PolicyConfig("tiny")
    assert config.trust_remote_code is False
    assert config.dropout == 0.0
    assert config.dtype is None


def test_a_config_comes_from_a_name_a_mapping_or_itself() -> None:
    config = PolicyConfig("tiny", dropout=0.1, model_kwargs={"use_cache": False})
    assert PolicyConfig.of("tiny") == PolicyConfig(model_name="tiny")
    assert PolicyConfig.of(config) is config
    assert PolicyConfig.of({"model_name": "tiny", "dropout": 0.1, "model_kwargs": {"use_cache": False}}) == config


def test_a_config_survives_the_checkpoint_as_plain_containers() -> None:
    config = PolicyConfig("tiny", dtype="bfloat16", scoring="padded", head_chunk_tokens=7, model_kwargs={"a": [1]})
    state = config.to_dict()
    assert type(state) is dict
    assert PolicyConfig.of(state) == config
    state["model_kwargs"]["a"].append(2)
    assert config.model_kwargs == {"a": [1]}


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match="dorpout"):
        PolicyConfig.of({"model_name": "tiny", "dorpout": 0.1})
