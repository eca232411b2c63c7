"""Making a `PolicyConfig` from what users and checkpoints give."""

import logging
from dataclasses import asdict, fields
from typing import Any

import pytest

from stateset_lightning.errors import CheckpointError
from stateset_lightning.policy import LoadingOptions, LoRAConfig, PolicyConfig


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
    assert PolicyConfig.of({"model_name": "tiny", "dropout": 0.1}) == PolicyConfig("tiny", dropout=0.1)


FROM_FILE: dict[str, Any] = {
    "dtype": "bfloat16",
    "gradient_checkpointing": True,
    "dropout": 0.1,
    "scoring": "padded",
    "head_chunk_tokens": 7,
    "head_dtype": "float32",
    "lora": LoRAConfig(rank=3, peft_kwargs={"use_rslora": True}),
    "adapter": "some",
    "float32_matmul": "high",
    "router_aux_loss": 0.01,
}
LOADING: dict[str, Any] = {
    "revision": "v2",
    "attn_implementation": "eager",
    "trust_remote_code": True,
    "model_kwargs": {"a": [1]},
}


def test_a_config_survives_the_checkpoint_as_plain_containers() -> None:
    config = PolicyConfig("tiny", **FROM_FILE, **LOADING)
    state = asdict(config)
    assert type(state) is type(state["lora"]) is dict
    assert PolicyConfig.from_checkpoint(state, LoadingOptions(**LOADING)) == config
    state["model_kwargs"]["a"].append(2)
    assert config.model_kwargs == {"a": [1]}


def test_what_chooses_code_never_comes_from_a_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    state = asdict(PolicyConfig("tiny", **FROM_FILE, **LOADING))
    with caplog.at_level(logging.INFO, "stateset_lightning"):
        assert PolicyConfig.of(state) == PolicyConfig("tiny", **FROM_FILE)
    assert [record.getMessage() for record in caplog.records] == [
        f"the run's model.policy.{name}={value!r} is not taken from a checkpoint: give --{name} where you trust it"
        for name, value in LOADING.items()
    ]
    caplog.clear()
    given = LoadingOptions(revision="v3", attn_implementation="sdpa", trust_remote_code=True, model_kwargs={"b": 1})
    with caplog.at_level(logging.INFO, "stateset_lightning"):
        assert PolicyConfig.from_checkpoint(state, given) == PolicyConfig("tiny", **FROM_FILE, **asdict(given))
    assert caplog.records == []


def test_a_checkpoint_cannot_write_to_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    state = {"model_name": "tiny", "revision": "\x1b[2J" + "v" * 999, "model_kwargs": {"\x1b[2J": "\x9b"}}
    with caplog.at_level(logging.INFO, "stateset_lightning"):
        PolicyConfig.from_checkpoint(state)
    assert len(caplog.records) == 2
    assert all(record.getMessage().isprintable() and len(record.getMessage()) < 400 for record in caplog.records)


def test_every_option_is_either_a_checkpoints_or_the_users() -> None:
    """A new option must be added here, after a thought: what chooses code must be one of `LoadingOptions`."""
    assert {item.name for item in fields(LoadingOptions)} == LOADING.keys()
    assert {item.name for item in fields(PolicyConfig)} == {"model_name", *FROM_FILE, *LOADING}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"model_name": "tiny", "dorpout": 0.1}, "dorpout is unknown here"),
        ({}, "model_name=None"),
        ({"model_name": [1]}, r"model_name=\[1\]"),
    ],
)
def test_what_is_no_policy_is_named(state: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        PolicyConfig.of(state)
