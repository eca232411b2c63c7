"""SampleWriter and PredictionWriter: which completions become lines of which file."""

import json

import pytest
from lightning.pytorch import Trainer

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.callbacks import PredictionWriter, SampleWriter
from stateset_lightning.callbacks.samples import append_rows

ROWS = [{"id": str(i), "prompt": f"What is {i} + 1?", "target": str(i + 1)} for i in range(6)]


@pytest.fixture
def make(tmp_path):
    def make(*callbacks, **options):
        module = GRPOLightningModule("tiny", reward=lambda turns, context: len(turns[-1].content), rollout=RolloutConfig(2, 3), seed=1)
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, callbacks=list(callbacks), num_sanity_val_steps=0, **options,
        )  # fmt: skip
        return trainer, module

    return make


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_some_groups_of_some_episodes_are_written_with_advantages(make, tmp_path):
    trainer, module = make(SampleWriter(every_n_episodes=2, num_prompts=2), max_steps=6)
    data = ScenarioDataModule(ROWS, validation=ROWS[:5], batch_size=3, eval_batch_size=2, num_iterations=2, seed=0)
    trainer.fit(module, datamodule=data)
    rows = read(tmp_path / "samples.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    assert [row["episode"] for row in train] == [0] * 4 + [2] * 4  # two groups of two; once, though each episode has two passes
    assert all("advantage" in row for row in train)
    for i in range(0, len(train), 2):
        assert train[i]["id"] == train[i + 1]["id"]
        assert train[i]["advantage"] + train[i + 1]["advantage"] == pytest.approx(0, abs=1e-6)
    validation = [row for row in rows if row["split"] == "validation" and row["step"] == 4]
    assert [row["id"] for row in validation] == ["0", "1", "2", "3", "4"]  # all of them
    assert all("advantage" not in row for row in validation)


def test_evaluation_can_be_left_out(make, tmp_path):
    trainer, module = make(SampleWriter(evaluation=False), max_steps=1)
    trainer.fit(module, datamodule=ScenarioDataModule(ROWS, validation=ROWS, batch_size=6))
    assert {row["split"] for row in read(tmp_path / "samples.jsonl")} == {"train"}


def test_predictions_start_afresh(make, tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    for _ in range(2):
        trainer, module = make(PredictionWriter(str(file)))
        trainer.predict(module, datamodule=ScenarioDataModule(predict=[{"id": "é", "prompt": "What is 1?"}, *ROWS], batch_size=4))
    rows = read(file)
    assert [row["id"] for row in rows] == ["é", "0", "1", "2", "3", "4", "5"]
    assert "é" in file.read_text(encoding="utf-8")  # readable, not escaped


def test_lines_are_appended(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    append_rows(path, [{"a": 1}])
    append_rows(path, [{"a": 2}, {"a": None}])
    assert read(path) == [{"a": 1}, {"a": 2}, {"a": None}]
