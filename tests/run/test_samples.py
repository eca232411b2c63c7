"""Which completions become lines of which file, token by token, and what W&B and TensorBoard show of them."""

import json
import math
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from module_runs import fit, make_data, make_module
from wandb_files import history

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.algorithm import GRPO
from stateset_lightning.callbacks import PredictionWriter, SampleWriter
from stateset_lightning.policy import Policy, PolicyConfig
from stateset_lightning.run import samples
from stateset_lightning.run.samples import log_samples, sample_table, thinned_out, token_rows, token_texts
from stateset_lightning.training.episode import Episode

ROWS = [{"id": str(i), "prompt": f"What is {i} + 1?", "target": str(i + 1)} for i in range(6)]


@pytest.fixture
def make(tmp_path):
    def make(*callbacks, **options):
        module = GRPOLightningModule(
            "tiny", reward=lambda turns, context: len(turns[-1].content), rollout=RolloutConfig(2, 3), seed=1
        )
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            num_sanity_val_steps=0,
            **options,
        )
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


@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "temperature": 3.0, "keep_sampling_mask": True}])
def test_the_reference_and_the_policy_agree_while_nothing_is_updated(tmp_path, filters):
    rollout = RolloutConfig(num_generations=4, max_new_tokens=5, **filters)
    still = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    module = make_module(algorithm=GRPO(beta=0.1), rollout=rollout, optimizer=still)
    fit(tmp_path, module, callbacks=[SampleWriter(1, max_tokens=3)], max_steps=1)
    rows = read(tmp_path / "samples.jsonl")
    for row in rows:
        assert row["logprobs_after"] == pytest.approx(row["logprobs"], abs=2e-4)
        if "ref_logprobs" in row:
            assert row["ref_logprobs"] == pytest.approx(row["logprobs"], abs=2e-4)
    assert any("ref_logprobs" in row for row in rows)


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


def test_a_file_is_thinned_out_evenly_and_keeps_its_ends():
    train = [("train", k, k) for k in range(1, 7)]
    validation = [("validation", k, -1) for k in (0, 3, 6)]
    blocks = [*train[:3], *validation, *train[3:]]
    dropped = thinned_out(blocks)
    assert dropped == {train[1], train[3], validation[1]}
    assert thinned_out([block for block in blocks if block not in dropped]) == {train[2]}


def test_the_file_stays_below_its_limit_and_is_the_same_after_any_kill(tmp_path):
    def run(folder, **options):
        checkpoints = ModelCheckpoint(folder / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        writer = SampleWriter(1)
        writer.max_megabytes = 0.004
        callbacks = [writer, checkpoints]
        validating = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
        fit(folder, callbacks=callbacks, enable_checkpointing=True, max_steps=9, **validating, **options)
        return read(folder / "samples.jsonl")

    straight = run(tmp_path)
    assert (tmp_path / "samples.jsonl").stat().st_size < 3 * 4000
    for split in ("train", "validation"):
        steps = sorted({row["step"] for row in straight if row["split"] == split})
        assert steps[0] == 1
        assert steps[-1] == 9
        assert len(steps) < 9
    for step in (6, 4, 1):  # thinned out since then, more than once
        assert run(tmp_path, ckpt_path=tmp_path / "c" / f"step={step}.ckpt") == straight


@pytest.mark.parametrize(
    "damage",
    [b'{"split": "tr', b'{"split": "train", "step": "x"}', b"[" * 9999],
    ids=["torn", "no step", "nested"],
)
def test_a_damaged_line_costs_that_line_and_is_told_once(tmp_path, caplog, damage):
    def run(**options):
        checkpoints = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit(tmp_path, callbacks=[SampleWriter(1), checkpoints], enable_checkpointing=True, **options)

    run(max_steps=1)
    file = tmp_path / "samples.jsonl"
    first, *others = whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + damage + b"\n" + b"".join(others[1:]))
    run(max_steps=2, ckpt_path=tmp_path / "c" / "step=1.ckpt")
    lines = file.read_bytes().splitlines(keepends=True)
    assert lines[: len(whole) - 1] == [first, *others[1:]]
    assert len(lines) == 2 * len(whole) - 1
    told = [message for message in caplog.messages if "damaged, left out" in message]
    assert told == [f"{file}, line 2: damaged, left out (1 in all)"]


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


def test_tokens_join_to_the_text_and_a_character_is_not_torn(tiny_tokenizer):
    text = "12 é 🦊, what?"
    tokens = tiny_tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tiny_tokenizer, tokens)
    assert "".join(texts) == text
    assert len(texts) == len(tokens)
    assert [piece for piece in texts if "🦊" in piece] == [piece for piece in texts if piece.strip() == "🦊"]
    assert "" in texts  # the first bytes of the fox
    half = token_texts(tiny_tokenizer, tokens[: texts.index("🦊")])  # a completion cut inside a character
    assert half[-1].endswith("\ufffd")


class Pieces:
    """As SentencePiece does it: a text loses its leading space."""

    def decode(self, tokens, **options):
        return "".join([" the", " cat", "s"][token] for token in tokens).removeprefix(" ")


def test_leading_spaces_are_kept():
    assert token_texts(Pieces(), [0, 1, 2, 1]) == ["the", " cat", "s", " cat"]


def make_fixed_episode():
    return Episode(
        index=0,
        prompt_tokens=[[3, 4], [5]],
        completion_tokens_T=torch.tensor([40, 41, 42, 43, 44]),
        lengths_N=torch.tensor([2, 0, 1, 2]),
        sampling_logprobs_T=torch.tensor([-0.12345, -1.0, -2.0, -3.0, -4.0]),
        advantages_N=torch.zeros(4),
        weights_N=torch.ones(4),
        active_N=torch.tensor([True, False, False, True]),
        micro_step_N=torch.zeros(4),
        active_by_step=[2],
        ref_logprobs_T=torch.tensor([-0.5, -0.6, 0.0, -0.7, -0.8]),
    )


@pytest.fixture
def tokens_of(tiny_model, tiny_tokenizer):
    """`tokens_of(num_completions, max_tokens)` -> token by token, of the fixed episode."""
    module = SimpleNamespace(tokenizer=tiny_tokenizer, rollout=RolloutConfig(2, 3, temperature=2.0))
    module.policy = Policy(tiny_model, PolicyConfig("tiny"))

    def rows(num_completions=4, max_tokens=9, unknown=None):
        episode = make_fixed_episode()
        if unknown is not None:
            episode.sampling_logprobs_T[unknown] = math.nan
        return token_rows(episode, num_completions, max_tokens, module)

    return rows


def test_token_rows_hold_what_is_known(tokens_of):
    rows = tokens_of()
    assert [row["logprobs"] for row in rows] == [[-0.1235, -1.0], [], [-2.0], [-3.0, -4.0]]
    # The reference scored active completions alone: what stands for the others is no log-prob.
    assert [row.get("ref_logprobs") for row in rows] == [[-0.5, -0.6], None, None, [-0.7, -0.8]]
    assert len(tokens_of(2)) == 2


def test_a_token_for_which_the_server_gave_no_log_prob_has_none(tokens_of):
    rows = tokens_of(unknown=1)
    assert [row["logprobs"] for row in rows] == [[-0.1235, None], [], [-2.0], [-3.0, -4.0]]


def test_log_probs_now_are_those_of_a_plain_forward(tokens_of, tiny_model):
    now = [row["logprobs_after"] for row in tokens_of()]
    assert [len(row) for row in now] == [2, 0, 1, 2]
    logits = tiny_model(input_ids=torch.tensor([[5, 43, 44]])).logits[0] / 2.0
    assert now[3] == pytest.approx(
        [float(logits.log_softmax(-1)[i, token]) for i, token in enumerate((43, 44))], abs=2e-4
    )
    assert tokens_of(max_tokens=1)[3]["logprobs_after"] == now[3][:1]


def test_sharded_weights_are_not_asked(tokens_of, monkeypatch):
    monkeypatch.setattr(samples, "DTensor", torch.nn.Parameter)  # as if all were
    assert not [row for row in tokens_of() if "logprobs_after" in row]


ROW = {
    "step": 3,
    "episode": 2,
    "id": "a",
    "prompt": "Say\nit",
    "target": ["x"],
    "completion": "![](http://x/y.png)\n<b>|</b>",
    "reward": 0.5,
    "rewards": {"right": 1.0, "brief": -0.5},
    "advantage": -0.25,
    "finish_reason": "length",
    "num_tokens": 7,
    "tokens": ["a"],
}


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
    logger = create_autospec(TensorBoardLogger, instance=True)
    log_samples(SimpleNamespace(loggers=[logger]), "train", [ROW, FAILED])
    (name, text, step), _ = logger.experiment.add_text.call_args
    assert (name, step) == ("samples/train", 3)
    first, second = text.split("\n\n---\n\n")
    assert "    prompt: Say\n    it\n" in first
    assert "    reward: 0.5\n    advantage: -0.25\n" in first
    assert "    reward: None\n" in second
    assert all(line.startswith("    ") for part in (first, second) for line in part.splitlines())


@pytest.mark.slow  # starts the process of W&B
def test_an_offline_wandb_run_holds_the_promised_tables_and_metrics(tmp_path, wandb_here):
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


def test_tensorboard_holds_the_text_and_a_resumed_run_doubles_nothing(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # TensorBoard's own
    from tensorboard.summary.writer import event_file_writer

    def run(**options):
        checkpoints = ModelCheckpoint(dirpath=tmp_path / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        logger = TensorBoardLogger(tmp_path, "board", version="v")
        fit(tmp_path, callbacks=[SampleWriter(1), checkpoints], logger=logger, enable_checkpointing=True, **options)
        events = EventAccumulator(str(tmp_path / "board" / "v"))
        events.Reload()
        texts, scalars = (events.Tensors(tag) for tag in ("samples/train/text_summary", "train/reward"))
        return [text.step for text in texts], [value.step for value in scalars], texts[-1].tensor_proto.string_val[0]

    # Numbers of files, which TensorBoard reads as text: the resumed run's events come in the tenth.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(6))
    steps, scalars, text = run(max_steps=3)
    assert steps == scalars == [1, 2, 3]
    assert b"    prompt: " in text
    assert run(max_steps=4, ckpt_path=tmp_path / "c" / "step=1.ckpt")[:2] == ([1, 2, 3, 4], [1, 2, 3, 4])


def test_other_loggers_get_none(tmp_path):
    fit(tmp_path, callbacks=[SampleWriter(1)], logger=CSVLogger(tmp_path, "a"), max_steps=1)
    assert "samples" not in next(tmp_path.rglob("metrics.csv")).read_text()
