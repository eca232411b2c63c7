"""Sample tables in W&B and TensorBoard, read back from what the two have stored."""

import json
import re

import pytest
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from module_runs import fit
from wandb_files import history

from stateset_lightning.callbacks import SampleWriter
from stateset_lightning.callbacks.sample_tables import sample_table, sample_text

ROW = {
    "step": 3, "episode": 2, "id": "a", "prompt": "Say\nit", "target": ["x"], "completion": "![](http://x/y.png)\n<b>|</b>", "reward": 0.5,
    "rewards": {"right": 1.0, "brief": -0.5}, "advantage": -0.25, "finish_reason": "length", "num_tokens": 7, "tokens": ["a"],
}  # fmt: skip
FAILED = {**ROW, "completion": "", "reward": None, "rewards": {"right": None, "brief": None}, "finish_reason": "stop"}
VALIDATING = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}


def test_a_table_has_a_column_per_reward_and_none_for_a_failure():
    columns, data = sample_table([ROW, FAILED])
    assert columns[-2:] == ["reward/right", "reward/brief"]
    assert "tokens" not in columns
    assert dict(zip(columns, data[0], strict=True))["target"] == "['x']"
    assert [row[columns.index("reward")] for row in data] == [0.5, None]
    assert data[1][-2:] == [None, None]
    greedy = {name: value for name, value in ROW.items() if name not in ("episode", "advantage")}
    assert not {"episode", "advantage"} & set(sample_table([greedy])[0])


def test_text_is_code_so_that_a_completion_cannot_show_an_image():
    text = sample_text([ROW, FAILED])
    assert text.count("**prompt**") == 1  # of the group
    assert "    Say\n    it" in text
    assert "reward 0.5, right 1, brief -0.5, advantage -0.25, 7 tokens, length" in text
    assert "advantage -0.25, 7 tokens, stop" in text
    assert all(line.startswith("    ") for line in text.splitlines() if re.search(r"[<!]", line))


@pytest.mark.slow  # starts the process of W&B
def test_an_offline_wandb_run_holds_the_promised_tables_and_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # its service, if an earlier test has started it, works in that test's folder
    logger = WandbLogger(project="p", save_dir=tmp_path, offline=True)
    fit(tmp_path, callbacks=[SampleWriter(1, num_prompts=2)], logger=logger, max_steps=2, **VALIDATING)
    wandb.finish()
    (file,) = tmp_path.rglob("*.wandb")
    rows = history(file)
    train, validation = ([row for row in rows if f"samples/{split}/path" in row] for split in ("train", "validation"))
    assert [row["trainer/global_step"] for row in train] == [row["trainer/global_step"] for row in validation] == [1, 2]
    assert {row["samples/train/_type"] for row in train} == {"table-file"}
    table = json.loads((file.parent / "files" / train[1]["samples/train/path"]).read_text())
    samples = [json.loads(line) for line in next(tmp_path.rglob("samples.jsonl")).read_text().splitlines()]
    written = [row for row in samples if row["split"] == "train" and row["step"] == 2]
    assert len(written) == 8
    assert (table["columns"], table["data"]) == sample_table(written)
    metrics, _ = [row for row in rows if "train/reward" in row]
    promised = {
        "train/reward",
        "reward/digit",
        "groups/mixed",
        "completion/mean_tokens",
        "policy/entropy",
        "policy/grad_norm",
        "work/tokens_per_s",
    }
    assert promised <= set(metrics)
    assert [row["trainer/global_step"] for row in rows if "val/reward" in row] == [1, 2]


def test_tensorboard_holds_the_text_and_a_resumed_run_doubles_nothing(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # TensorBoard's own

    def run(**options):
        checkpoints = ModelCheckpoint(dirpath=tmp_path / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        logger = TensorBoardLogger(tmp_path, "board", version="v")
        fit(tmp_path, callbacks=[SampleWriter(1), checkpoints], logger=logger, enable_checkpointing=True, **options)
        events = EventAccumulator(str(tmp_path / "board" / "v"))
        events.Reload()
        texts, scalars = (events.Tensors(tag) for tag in ("samples/train/text_summary", "train/reward"))
        return [text.step for text in texts], [value.step for value in scalars], texts[-1].tensor_proto.string_val[0]

    steps, scalars, text = run(max_steps=3)
    assert steps == scalars == [1, 2, 3]
    assert b"**prompt**" in text
    assert run(max_steps=4, ckpt_path=tmp_path / "c" / "step=1.ckpt")[:2] == ([1, 2, 3, 4], [1, 2, 3, 4])


def test_other_loggers_get_none(tmp_path):
    fit(tmp_path, callbacks=[SampleWriter(1)], logger=CSVLogger(tmp_path, "a"), max_steps=1)
    assert "samples" not in next(tmp_path.rglob("metrics.csv")).read_text()
