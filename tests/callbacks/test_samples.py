"""SampleWriter and PredictionWriter: which completions become lines of which file."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from module_runs import fit, make_data, make_module

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.algorithm import GRPO
from stateset_lightning.callbacks import PredictionWriter, SampleWriter
from stateset_lightning.callbacks.samples import append_rows, thin_out

ROWS = [{"id": str(i), "prompt": f"What is {i} + 1?", "target": str(i + 1)} for i in range(6)]


@pytest.fixture
def make(tmp_path):
    def make(*callbacks, **options):
        module = GRPOLightningModule(
            "tiny", reward=lambda turns, context: len(turns[-1].content), rollout=RolloutConfig(2, 3), seed=1
        )
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
    # two groups of two; once, though each episode has two passes
    assert [row["episode"] for row in train] == [0] * 4 + [2] * 4
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


def plain_logprobs(module, prompt, completion):
    """Of the model as it is now, from a plain forward of transformers."""
    model = module.policy.model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].float()
    model.train()
    logps = (logits / module.rollout.temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return [float(row[token]) for row, token in zip(logps, completion, strict=True)]


def test_tokens_have_the_log_probs_of_sampling_and_those_after_the_update(tmp_path):
    trainer = fit(tmp_path, callbacks=[SampleWriter(1, num_prompts=1)], max_steps=1)
    module, rows = trainer.lightning_module, read(tmp_path / "samples.jsonl")
    episode = module.episode
    assert len(rows) == 4
    for n, (row, completion) in enumerate(
        zip(rows, episode.completion_tokens_T.split(episode.lengths_N.tolist()), strict=False)
    ):
        assert "".join(row["tokens"]).removesuffix("<|end|>") == row["completion"]
        assert row["logprobs"] == pytest.approx(
            episode.sampling_logprobs_T.split(episode.lengths_N.tolist())[n].tolist(), abs=1e-4
        )
        assert row["logprobs_after"] == pytest.approx(
            plain_logprobs(module, episode.prompt_tokens[0], completion.tolist()), abs=2e-4
        )
        assert "ref_logprobs" not in row  # there is no reference
    moved = [
        after - before for row in rows for before, after in zip(row["logprobs"], row["logprobs_after"], strict=True)
    ]
    assert max(map(abs, moved)) > 0.01  # the update did something
    assert module.policy.training


def test_the_reference_and_the_policy_agree_before_the_first_step(tmp_path):
    fit(tmp_path, make_module(algorithm=GRPO(beta=0.1)), callbacks=[SampleWriter(1)], max_steps=1)
    rows = read(tmp_path / "samples.jsonl")
    for row in rows:
        assert row["ref_logprobs"] == pytest.approx(row["logprobs"], abs=2e-4)


def test_long_completions_are_not_broken_down_to_their_end(tmp_path):
    fit(tmp_path, callbacks=[SampleWriter(1, max_tokens=1)], max_steps=1)
    rows = read(tmp_path / "samples.jsonl")
    assert max(row["num_tokens"] for row in rows) > 1
    assert {len(row[name]) for row in rows for name in ("tokens", "logprobs", "logprobs_after")} == {1}
    assert all(row["completion"].startswith(row["tokens"][0].replace("<|end|>", "")) for row in rows)


def test_a_run_that_goes_on_inside_an_episode_writes_it_once(tmp_path):
    def run(folder, **options):
        checkpoints = ModelCheckpoint(dirpath=folder / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        data = make_data(num_iterations=2)
        fit(folder, data=data, callbacks=[SampleWriter(1), checkpoints], enable_checkpointing=True, **options)
        return read(folder / "samples.jsonl")

    straight = run(tmp_path / "straight", max_steps=4)
    assert [(row["step"], row["episode"]) for row in straight] == [(2, 0)] * 8 + [(4, 1)] * 8
    ended_inside = run(tmp_path / "again", max_steps=3)
    assert [(row["step"], row["episode"]) for row in ended_inside] == [(2, 0)] * 8
    for step in (1, 3):
        assert (
            run(tmp_path / "again", max_steps=4, ckpt_path=tmp_path / "again" / "c" / f"step={step}.ckpt") == straight
        )


def test_a_file_is_thinned_out_evenly_and_keeps_its_ends(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [{"split": "train", "step": k, "episode": k, "i": i} for k in range(1, 7) for i in range(2)]
    rows += [{"split": "validation", "step": k} for k in (0, 3, 6)]
    append_rows(path, rows)
    with path.open("a") as file:
        file.write('{"torn')
    thin_out(path)
    kept = read(path)
    assert [(row["step"], row["i"]) for row in kept if row["split"] == "train"] == [
        (k, i) for k in (1, 3, 5, 6) for i in range(2)
    ]
    assert [row["step"] for row in kept if row["split"] == "validation"] == [0, 6]
    thin_out(path)
    assert [row["step"] for row in read(path) if row["split"] == "train"] == [1, 1, 5, 5, 6, 6]


def test_the_file_stays_below_its_limit(tmp_path, monkeypatch):
    writer = SampleWriter(1)
    writer.max_megabytes = 0.004
    fit(tmp_path, callbacks=[writer], max_steps=8)
    rows = read(tmp_path / "samples.jsonl")
    assert (tmp_path / "samples.jsonl").stat().st_size < 2 * 8000
    episodes = [row["episode"] for row in rows[::8]]
    assert episodes[0] == 0
    assert episodes[-1] == 7
    assert len(episodes) < 8


def test_predictions_start_afresh(make, tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    for _ in range(2):
        trainer, module = make(PredictionWriter(str(file)))
        trainer.predict(
            module, datamodule=ScenarioDataModule(predict=[{"id": "é", "prompt": "What is 1?"}, *ROWS], batch_size=4)
        )
    rows = read(file)
    assert [row["id"] for row in rows] == ["é", "0", "1", "2", "3", "4", "5"]
    assert "é" in file.read_text(encoding="utf-8")  # readable, not escaped


def test_lines_are_appended(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    append_rows(path, [{"a": 1}])
    append_rows(path, [{"a": 2}, {"a": None}])
    assert read(path) == [{"a": 1}, {"a": 2}, {"a": None}]
