"""Rows of completions, and of optimizer steps that are skipped because loss, gradient or weights are not finite."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from module_runs import fit, make_data, make_module, weights

from stateset_lightning import RewardFunction, RewardResult
from stateset_lightning.algorithm import Clipped, DrGRPO
from stateset_lightning.callbacks import SampleWriter
from stateset_lightning.cli.report import write_report
from stateset_lightning.errors import NonFiniteError
from stateset_lightning.files import read_table
from stateset_lightning.run.records import append_rows, drop_later_steps, make_records
from stateset_lightning.training.checks import is_bad
from stateset_lightning.training.loss import nan_if_not_finite
from stateset_lightning.training.resample import Sample
from stateset_lightning.types import NOT_APPLICABLE, FinishReason, PromptBatch, RewardFailure, Rollout, Scenario, Scores


def make(values, totals, failures=(), advantages=None):
    batch = PromptBatch.__new__(PromptBatch)
    object.__setattr__(
        batch, "scenarios", [Scenario(id="a", prompt="one?", topic="t"), Scenario(id="b", prompt="two?")]
    )
    rollout = Rollout(
        prompt_tokens=[[1], [2]],
        completion_tokens_T=torch.tensor([1, 2, 3, 4, 5]),
        lengths_N=torch.tensor([1, 2, 1, 1]),
        logprobs_T=torch.zeros(5),
        sampled_T=torch.ones(5, dtype=torch.bool),
        finish_reasons=[FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP, FinishReason.STOP],
        texts=["A", "B", "C", "D"],
    )
    names = tuple(f"r{i}" for i in range(len(values[0])))
    scores = Scores(
        names,
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(totals, dtype=torch.float64),
        [{}] * 4,
        list(failures),
        0.0,
    )
    return make_records(Sample(batch, rollout, scores), advantages)


def test_completions_belong_to_their_prompts():
    records = make([[1.0], [0.0], [1.0], [0.5]], [1.0, 0.0, 1.0, 0.5], advantages=[0.7, -0.7, 0.1, -0.1])
    assert [(r["id"], r["prompt"], r["completion"]) for r in records] == [
        ("a", "one?", "A"),
        ("a", "one?", "B"),
        ("b", "two?", "C"),
        ("b", "two?", "D"),
    ]
    assert [r["num_tokens"] for r in records] == [1, 2, 1, 1]
    assert [r["advantage"] for r in records] == [0.7, -0.7, 0.1, -0.1]
    row = records[1]
    assert row["finish_reason"] == "length"
    assert row["rewards"] == {"r0": 0.0}
    assert row["topic"] == "t"
    assert "topic" not in records[2]


def test_a_failure_is_null_and_says_why():
    failure = RewardFailure(1, "r1", "KeyError", "'x'", "")
    records = make(
        [[1.0, 1.0], [1.0, math.nan], [1.0, NOT_APPLICABLE], [0.0, 0.0]], [2.0, math.nan, 1.0, 0.0], [failure]
    )
    failed = json.loads(json.dumps(records[1], allow_nan=False))
    assert failed["reward"] is None
    assert failed["rewards"] == {"r0": 1.0, "r1": None}
    assert failed["errors"] == ["r1: KeyError: 'x'"]
    assert records[2]["rewards"]["r1"] is None  # does not apply
    assert records[2]["reward"] == 1.0
    assert "errors" not in records[2]
    assert "advantage" not in failed


class Faulty(Clipped):
    """Its loss is not finite in some micro-steps: `how` maps the losses of a micro-step."""

    def __init__(self, how, calls):
        super().__init__()
        self.how, self.calls, self.count = how, calls, 0

    def per_token_loss(self, tokens):
        loss_T, metrics = super().per_token_loss(tokens)
        self.count += 1
        return (self.how(loss_T) if self.count in self.calls else loss_T), metrics


FAULTS = {
    "NaN loss": lambda loss_T: loss_T * math.nan,
    "infinite loss": lambda loss_T: loss_T * math.inf,
    "infinite loss of finite gradient": lambda loss_T: loss_T + math.inf,
    # 0, of infinite slope
    "NaN gradient of a finite loss": lambda loss_T: loss_T + (loss_T - loss_T.detach()).abs().sqrt(),
    "huge gradient": lambda loss_T: loss_T * 1e25,
}


@pytest.mark.parametrize("how", FAULTS.values(), ids=FAULTS.keys())
def test_a_step_that_is_not_finite_trains_nothing_and_the_next_one_trains(tmp_path, how):
    before = {name: value.clone() for name, value in _initial().items()}
    skipped = fit(tmp_path / "a", make_module(algorithm=Faulty(how, {1})), max_steps=1)
    assert skipped.lightning_module.metrics.last["policy/bad_steps"] == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(skipped).items())
    trainer = fit(tmp_path / "b", make_module(algorithm=Faulty(how, {1})), max_steps=2)
    assert trainer.lightning_module.metrics.last["policy/bad_steps"] == 0
    after = weights(trainer)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert all(value.isfinite().all() for state in trainer.optimizers[0].state.values() for value in state.values())


def _initial():
    module = make_module()
    module.configure_model()
    return module.state_dict()


class Huge(RewardFunction):
    def compute_reward(self, turns, context=None):
        return 1e30 * (len(turns[-1].content) % 3)


@pytest.mark.parametrize("algorithm", [Clipped(), DrGRPO()], ids=["normalised", "unnormalised"])
def test_huge_rewards_leave_the_weights_finite(tmp_path, algorithm):
    trainer = fit(tmp_path, make_module(algorithm=algorithm, reward=Huge()), max_steps=3)
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_what_a_skipped_step_would_have_trained_is_written_down(tmp_path):
    module = make_module(algorithm=Faulty(FAULTS["NaN loss"], range(1, 100)))
    data = make_data(steps_per_episode=4, batch_size=8)
    with pytest.warns(
        UserWarning,
        match=r"is not finite \(nan\): optimizer step skipped; .*bad_steps.jsonl has its completions",
    ):
        fit(tmp_path, module, data, accumulate_grad_batches=2, max_steps=2)
    rows = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    trained = [record for record, active in zip(module.last_records, module.episode.active_N, strict=True) if active]
    assert trained
    told = [{name: row[name] for name in ("id", "prompt", "completion", "reward", "rewards")} for row in rows]
    for expected in trained:
        assert {name: expected[name] for name in ("id", "prompt", "completion", "reward", "rewards")} in told
    assert len(rows) == len(trained)
    assert {(row["step"], row["episode"], row["grad_norm"]) for row in rows} == {(1, 0, "nan"), (2, 0, "nan")}
    assert not {row["id"] for row in rows if row["step"] == 1} & {row["id"] for row in rows if row["step"] == 2}


def test_after_a_resume_inside_the_episode_the_completions_are_still_told(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    data = {"num_iterations": 2}
    whole = make_module(algorithm=Faulty(FAULTS["NaN loss"], set()))
    fit(tmp_path, whole, make_data(**data), callbacks=[keep], enable_checkpointing=True, max_steps=1)
    module = make_module(algorithm=Faulty(FAULTS["NaN loss"], {1}))
    with pytest.warns(UserWarning, match="optimizer step skipped"):
        fit(tmp_path, module, make_data(**data), ckpt_path=tmp_path / "step=1.ckpt", max_steps=2)
    rows = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert rows
    assert all("What is" in row["prompt"] and row["completion"] and "reward" not in row for row in rows)


def test_bad_steps_after_the_checkpoint_are_not_told_twice(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    faulty = {"algorithm": Faulty(FAULTS["NaN loss"], {1, 2, 3})}
    fit(tmp_path, make_module(**faulty), callbacks=[keep], enable_checkpointing=True, max_steps=3)
    whole = (tmp_path / "bad_steps.jsonl").read_text()
    resumed = make_module(algorithm=Faulty(FAULTS["NaN loss"], {1, 2}))
    fit(tmp_path, resumed, ckpt_path=tmp_path / "step=1.ckpt", max_steps=3)
    assert (tmp_path / "bad_steps.jsonl").read_text() == whole


@pytest.mark.parametrize("damage", [b"\0" * 40, b'{"step": 1', b'{"step": "1"}', b"{}", b"7"], ids=str)
def test_a_damaged_line_costs_that_line_and_other_separators_end_none(tmp_path, caplog, damage):
    file = tmp_path / "bad_steps.jsonl"
    lines = [json.dumps({"step": step, "prompt": "a\u2028b\x85c\x0bd"}, ensure_ascii=False).encode() for step in (1, 2)]
    file.write_bytes(b"\n".join([lines[0], damage, lines[0], lines[1], b'{"torn']))
    trainer = SimpleNamespace(loggers=[], default_root_dir=tmp_path, global_rank=0)
    drop_later_steps(trainer, 1)
    assert file.read_bytes() == (lines[0] + b"\n") * 2
    assert caplog.messages == [f"{file}, line 2: damaged, left out (1 in all)"]


@pytest.mark.parametrize("limit", [0, 2])
def test_max_bad_steps_counts_steps_in_a_row_and_across_a_resume(tmp_path, limit):
    always = {"algorithm": Faulty(FAULTS["NaN loss"], range(1, 100)), "max_bad_steps": limit}
    with pytest.raises(
        NonFiniteError,
        match=rf"in {limit + 1} optimizer steps in a row \(model.max_bad_steps={limit}\), .* step {limit + 1}:",
    ):
        fit(tmp_path, make_module(**always), max_steps=20)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    if limit:
        fit(tmp_path, make_module(**always), callbacks=[keep], enable_checkpointing=True, max_steps=2)
        with pytest.raises(NonFiniteError, match="step 3:"):
            fit(tmp_path, make_module(**always), ckpt_path=tmp_path / "step=2.ckpt", max_steps=20)


def test_weights_that_a_finite_gradient_made_infinite_are_never_saved(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    large = Faulty(lambda loss_T: loss_T * 1e6, {1})
    module = make_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e38), algorithm=large)
    with pytest.raises(NonFiniteError, match=r"weights are not finite after optimizer step 1: lower the learning rate"):
        fit(tmp_path, module, callbacks=[keep], enable_checkpointing=True)
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("norm", "bad"), [(0.0, False), (1e18, False), (1e20, True), (math.inf, True), (math.nan, True)]
)
def test_norms_whose_square_overflows_are_bad(norm, bad):
    assert is_bad(norm) is bad


def test_a_finite_loss_and_its_gradient_are_left_alone():
    x = torch.tensor(3.0, requires_grad=True)
    nan_if_not_finite(x * x).backward()
    assert x.grad == 6.0
    y = torch.tensor(3.0, requires_grad=True)
    nan_if_not_finite(y + math.inf).backward()
    assert y.grad.isnan()


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_appended(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    append_rows(path, [{"a": 1}])
    append_rows(path, [{"a": 2}, {"a": None}])
    assert read(path) == [{"a": 1}, {"a": 2}, {"a": None}]


class Hostile(RewardFunction):
    """Half of its scores come with a breakdown that no file can hold, the others are such failures."""

    def compute_reward(self, turns, context=None):
        text = "\ud800\u2028\x85\x0b\n"
        if len(turns[-1].content) % 2:
            raise type(f"Odd{text}", (Exception,), {})(text)
        itself: list = []
        itself.append(itself)
        bad = {(1, text): text, "number": 10**5000, "nan": math.nan, "object": Unprintable(), "itself": itself}
        return RewardResult(float(len(turns[-1].content) % 3), bad)


class Unprintable:
    def __str__(self):
        raise GeneratorExit


def test_what_no_file_can_hold_ends_neither_a_run_nor_its_resumption_nor_its_report(tmp_path):
    loggers = [CSVLogger(tmp_path, "run", version=0), TensorBoardLogger(tmp_path, "board", version=0)]
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    target = ["é\u2028", 2**70]
    data = {"train": [{"prompt": f"What is {a} + 2?", "target": target} for a in range(8)]}
    options = {"logger": loggers, "enable_checkpointing": True, "log_every_n_steps": 1}
    for steps, ckpt_path in ((2, None), (3, tmp_path / "step=1.ckpt")):
        module = make_module(reward=Hostile(), max_reward_failures=1.0)
        callbacks = [keep, SampleWriter(every_n_episodes=1)]
        trainer = fit(
            tmp_path, module, make_data(**data), callbacks=callbacks, ckpt_path=ckpt_path, max_steps=steps, **options
        )
    folder = tmp_path / "run" / "version_0"
    text = (folder / "samples.jsonl").read_bytes().decode()
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["step"] for row in rows} == {1, 2, 3}
    assert {bool(row.get("errors")) for row in rows} == {True, False}
    assert all(row["target"] == ["é\u2028", str(2**70)] for row in rows)
    parts = [part for row in rows for part in row.get("breakdown", {}).values()]
    assert {part["number"] for part in parts} == {"<int: ValueError>"}
    json.dumps(rows, ensure_ascii=False).encode()
    assert [row["step"] for _, row in read_table(folder / "metrics.csv", "step")] == ["1", "2", "3"]
    assert write_report(folder).stat().st_size > 10_000
    assert trainer.global_step == 3
