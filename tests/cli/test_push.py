"""`export --push`: a folder goes to a repository of the hub, here a local one, with nothing of another model in it."""

from functools import partialmethod
from pathlib import Path

import pytest
from cli_runs import RUN_CONFIG, start_in
from hub_server import serving
from huggingface_hub import constants
from transformers import PreTrainedModel

from stateset_lightning.cli.main import main

TOKEN = "hf_0123456789abcdefghij"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub that the user is logged in to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as server:
        changes = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        yield server


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_folder_is_pushed_with_its_shards_and_replaces_an_earlier_model(hub, tmp_path, monkeypatch, capsys):
    sharded = partialmethod(PreTrainedModel.save_pretrained, max_shard_size="2MB")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", sharded)
    hub.files = {"notes.md": b"mine", "model.safetensors": b"old", "adapter_config.json": b"old"}
    main(["export", "tiny", "out", "--push", "me/model"])
    said = capsys.readouterr()
    assert said.out.endswith(f"exported: out, {hub.url}/me/model\n")
    assert hub.files == {"notes.md": b"mine", **contents("out")}
    assert len([name for name in hub.files if name.endswith(".safetensors")]) > 1
    assert hub.made == [{"name": "model", "organization": "me", "visibility": "private"}]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in said.out + said.err


def test_an_adapter_and_its_merged_model_are_pushed(hub, tmp_path, monkeypatch):
    config = {**RUN_CONFIG, "trainer": {**RUN_CONFIG["trainer"], "max_steps": 1, "limit_val_batches": 0}}
    start_in(tmp_path, monkeypatch, config, 4)
    main(["fit", "--config", "config.yaml", "--model.policy.lora.rank=2"])
    for words in ([], ["--merge"]):
        main(["export", "last", "out", "--push", "me/model", "--overwrite", *words])
        assert hub.files == contents("out")
    assert "adapter_config.json" not in hub.files


def logged_out(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "absent")


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def gone(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def no_rights(hub, monkeypatch):
    hub.refused = "/api/"


def full(hub, monkeypatch):
    hub.refused = "/commit/"


@pytest.mark.parametrize(
    ("change", "said", "is_written"),
    [
        (logged_out, "--push me/model: no token of the Hugging Face hub is found: log in by `hf auth login`", False),
        (offline, "offline mode is enabled", False),
        (gone, "Connection refused; check the name and the connection, and log in", False),
        (no_rights, "403 Forbidden", False),
        (full, "out is complete: `hf upload me/model out` tries again", True),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_line_without_the_token(hub, monkeypatch, capsys, change, said, is_written):
    change(hub, monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        main(["export", "tiny", "out", "--push", "me/model"])
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert said in line
    assert TOKEN not in told.out + told.err
    assert "\x1b" not in line
    assert Path("out").is_dir() == is_written


def test_a_name_that_cannot_be_one_is_refused_before_anything_is_loaded(hub, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", "nowhere/model", "out", "--push", "a/b/c"])
    assert "--push a/b/c: Repo id must be in the form" in capsys.readouterr().err
