"""Measures of greedy completions and of samples, by hand and in runs; a held-out reward beside the trained one."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from module_runs import SCENARIOS, DigitReward, fit, make_data, make_module, make_trainer, weights

from stateset_lightning.callbacks import RunSummary
from stateset_lightning.errors import ConfigError
from stateset_lightning.evaluation import Evaluation, EvaluationConfig
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import ExactMatch, FunctionReward, Scorer
from stateset_lightning.types import NOT_APPLICABLE, FinishReason, Rollout, Scenario, Scores

NAN, ALONE = math.nan, Ranks()


def completions(texts, values):
    """A rollout with these texts, and scores of the rewards `right` (weight 1) and `format` (weight 0.5)."""
    values_NF = torch.tensor(values, dtype=torch.float64)
    totals_N = torch.where(values_NF == NOT_APPLICABLE, 0.0, values_NF) @ torch.tensor([1.0, 0.5], dtype=torch.float64)
    lengths_N = torch.ones(len(texts), dtype=torch.long)
    reasons = [FinishReason.STOP] * len(texts)
    rollout = Rollout([[1]], lengths_N, lengths_N, lengths_N.float(), lengths_N.bool(), reasons, texts)
    return rollout, Scores(("right", "format"), values_NF, totals_N)


def test_greedy_and_sampled_measures_by_hand():
    metric = Evaluation(["right", "format"], EvaluationConfig(samples=3, solved_by="right"))
    scenarios = [Scenario(id="0", prompt="a", topic="sums"), Scenario(id="1", prompt="b", topic="dates")]
    greedy = completions(["4", "5"], [[1, 0], [0, 1]])
    # The first prompt: one of three is right, and outvoted. The second: one sample fails, both others are right.
    samples = completions(["4", "5", "5", "7", "?", "7"], [[1, 0], [0, 1], [0, 1], [1, 1], [NAN, 1], [1, 1]])
    metric.update(scenarios, greedy, samples)
    values = metric.compute(ALONE)
    expected = {
        "reward": 0.75,
        "reward/right": 0.5,
        "reward/format": 0.5,
        "solved": 0.5,
        "pass@1": (1 / 3 + 1) / 2,
        "pass@2": (2 / 3 + 1) / 2,
        "pass@3": 1.0,  # of the first prompt alone: the second has two scored samples
        "pass^2": (0 + 1) / 2,
        "pass^3": 0.0,
        "avg@3": (2 / 3 + 1.5) / 2,
        "majority@3": 0.5,
        "sample_failures": 1 / 6,
        "topic/sums/solved": 1.0,
        "topic/dates/solved": 0.0,
        "topic/sums/avg@3": 2 / 3,
        "topic/dates/reward": 0.5,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    templates = {
        "/".join(["topic", "<topic>", name.split("/")[-1]]) if name.startswith("topic/") else name for name in values
    }
    assert templates <= set(metric.logged_names())


def test_solved_is_the_total_unless_a_reward_is_named():
    scenarios = [Scenario(id=str(i), prompt="a") for i in range(4)]
    greedy = completions(["a", "b", "c", "d"], [[1, 0], [0.8, 0.4 - 1e-15], [0, 1], [NOT_APPLICABLE, 1]])
    for options, share in [
        ({}, 0.5),
        ({"solved_at": 0.5}, 1.0),
        ({"solved_by": "right"}, 1 / 3),
        ({"solved_by": "format"}, 0.5),
    ]:
        metric = Evaluation(["right", "format"], EvaluationConfig(**options))
        metric.update(scenarios, greedy)
        assert metric.compute(ALONE)["solved"] == pytest.approx(share), options


def greedy_means(*batches):
    """An evaluation of the greedy completions' rewards and lengths: batches of (values_NF, totals_N, lengths_N)."""
    metric = Evaluation(["right", "tone"], EvaluationConfig())
    for batch in batches:
        add(metric, *batch)
    return metric


def add(metric, values, totals, lengths):
    rollout, scores = completions(["a"] * len(values), values)
    lengths_N = torch.tensor(lengths)
    rollout = replace(rollout, lengths_N=lengths_N, sampled_T=torch.ones(int(lengths_N.sum()), dtype=torch.bool))
    scores = Scores(("right", "tone"), scores.values_NF, torch.tensor(totals, dtype=torch.float64))
    metric.update([Scenario(id="0", prompt="a")] * len(values), (rollout, scores))


def test_means_are_over_completions_and_not_over_batches():
    metric = greedy_means(
        ([[1.0, 0.5], [0.0, 0.5], [0.0, 0.5]], [1.0, 0.0, 0.0], [1, 2, 3]), ([[1.0, 0.5]], [1.0], [6])
    )
    expected = {"num_completions": 4, "mean_tokens": 3.0, "reward_failures": 0.0, "reward": 0.5, "reward/right": 0.5}
    values = metric.compute(ALONE)
    assert values.items() >= expected.items()
    assert set(values) <= set(metric.logged_names())


def test_failures_are_counted_and_enter_no_mean():
    values = [[1.0, 0.5], [NAN, 0.25], [0.0, NOT_APPLICABLE], [NAN, NAN]]
    metric = greedy_means((values, [1.5, NAN, 0.0, NAN], [1, 1, 1, 1]))
    expected = {"reward": 0.75, "reward/right": 0.5, "reward/tone": 0.375, "reward_failures": 0.5, "num_completions": 4}
    assert metric.compute(ALONE).items() >= expected.items()


def prompts(rows, topics):
    """An evaluation of greedy completions: their totals and whether they are right (NaN: it failed), and topics."""
    metric = Evaluation(["right"], EvaluationConfig(solved_by="right"))
    values_PM = torch.tensor(rows, dtype=torch.float64)
    rollout, _ = completions(["a"] * len(rows), [[0, 0]] * len(rows))
    scenarios = [Scenario(id="0", prompt="a", topic=topic) for topic in topics]
    metric.update(scenarios, (rollout, Scores(("right",), values_PM[:, 1:], values_PM[:, 0])))
    return metric


def test_means_intervals_and_topics_by_hand():
    rows = [[0.5, 1.0], [NAN, NAN], [1.5, 0.0], [1.0, 1.0]]
    metric = prompts(rows, ["sums", "sums", "dates/iso", None])
    values = metric.compute(ALONE)
    assert values.pop("reward_ci95") == pytest.approx(1.959964 * 0.5 / math.sqrt(3))
    low, high = values.pop("solved_low"), values.pop("solved_high")
    assert (low, high) == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert values == {
        "reward": 1.0,
        "reward/right": pytest.approx(2 / 3),
        "reward_failures": 0.25,
        "mean_tokens": 1.0,
        "solved": pytest.approx(2 / 3),
        "topic/sums/reward": 0.5,
        "topic/dates/iso/reward": 1.5,
        "topic/sums/solved": 1.0,
        "topic/dates/iso/solved": 0.0,
        "num_completions": 4,
    }
    named = {"reward", "reward/right", "reward_failures", "mean_tokens", "solved", "reward_ci95", "num_completions"}
    named |= {"solved_low", "solved_high", "topic/<topic>/reward", "topic/<topic>/solved"}
    named |= {"turns", "score_by_turns/<n>"}  # of conversations alone
    assert set(metric.logged_names()) == named


def test_one_prompt_has_no_interval_of_its_mean_reward():
    values = prompts([[2.0, 1.0]], [None]).compute(ALONE)
    assert {"solved_low", "solved_high"} < set(values)
    assert "reward_ci95" not in values


class Gathering(Ranks):
    """Rank 0 of several, of which the others hold what `others` do."""

    def __init__(self, others):
        super().__init__(0, 1 + len(others))
        object.__setattr__(self, "others", others)

    def gather(self, value):
        return [value, *(other._prompts for other in self.others)]


def test_ranks_of_different_size_and_with_different_topics_give_the_whole():
    rows, topics = [[0.5, 1.0], [0.25, 0.0], [1.0, 1.0]], ["a", "b", "c"]
    others = [prompts(rows[2:], topics[2:]), greedy_means()]  # and one without any
    metric = prompts(rows[:2], topics[:2])
    assert metric.compute(Gathering(others)) == prompts(rows, topics).compute(ALONE)
    assert metric.compute(ALONE) == {"num_completions": 0}  # another split may follow


def test_what_was_never_scored_has_no_mean():
    assert greedy_means().compute(ALONE) == {"num_completions": 0}
    metric = greedy_means(([[NAN, 1.0]], [NAN], [2]))
    assert metric.compute(ALONE) == {
        "num_completions": 1,
        "mean_tokens": 2.0,
        "reward_failures": 1.0,
        "reward/tone": 1.0,
    }


def test_sums_keep_their_precision_over_many_completions():
    metric = greedy_means(([[2.0**24, 0.0]], [2.0**24], [1]), *[([[1.0, 0.0]], [1.0], [1])] * 8)
    assert metric.compute(ALONE)["reward"] * 9 == pytest.approx(
        2.0**24 + 8, abs=1e-3
    )  # float32 would have lost the ones


def test_samples_do_not_change_greedy_metrics_and_do_not_depend_on_the_batch(tmp_path):
    def validate(samples, eval_batch_size):
        module = make_module(reward=ExactMatch(), evaluation=EvaluationConfig(samples=samples), seed=1)
        data = make_data(validation=SCENARIOS, eval_batch_size=eval_batch_size)
        (values,) = make_trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
        return values

    state = torch.get_rng_state()
    greedy, sampled, apart = validate(0, 8), validate(4, 8), validate(4, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert greedy.items() <= sampled.items()
    assert sampled == pytest.approx(apart, abs=1e-7)
    assert sampled["val/pass@1"] == pytest.approx(sampled["val/avg@4"])  # ExactMatch is 0 or 1
    assert sampled["val/pass^4"] <= sampled["val/pass@1"] <= sampled["val/pass@4"]
    assert sampled["val/pass@1"] < sampled["val/pass@4"]  # the samples differ


def test_callbacks_monitor_the_new_metrics_and_unknown_ones_are_refused(tmp_path):
    scenarios = [{**row, "topic": "sums"} for row in SCENARIOS[:4]]
    monitors = [
        ModelCheckpoint(tmp_path, monitor="val/pass@2", mode="max"),
        EarlyStopping("val/topic/sums/solved", mode="max"),
    ]

    def run(callbacks):
        module = make_module(evaluation=EvaluationConfig(samples=2))
        options = {"limit_val_batches": 1.0, "val_check_interval": 1, "enable_checkpointing": True, "max_steps": 1}
        return fit(tmp_path, module, make_data(validation=scenarios), callbacks=callbacks, **options)

    trainer = run([*monitors, RunSummary()])
    assert monitors[0].best_model_score == trainer.callback_metrics["val/pass@2"]
    assert monitors[1].best_score == trainer.callback_metrics["val/topic/sums/solved"]
    for unknown in ("val/pass@8", "val/topic/sums/majority"):
        with pytest.raises(ConfigError, match="validation logs no such metric"):
            run([EarlyStopping(unknown)])


RANKS_SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from module_runs import SCENARIOS, make_data, make_module, make_trainer
from stateset_lightning.callbacks import SampleWriter
from stateset_lightning.evaluation import EvaluationConfig
from stateset_lightning.rewards import ExactMatch

rows = [{{**row, "topic": "abcabcd"[i]}} for i, row in enumerate(SCENARIOS[:7])]
module = make_module(reward=ExactMatch(), evaluation=EvaluationConfig(samples=3), seed=1)
options = {{"devices": {devices}, "strategy": "ddp" if {devices} > 1 else "auto", "callbacks": [SampleWriter()]}}
trainer = make_trainer(Path({folder!r}, "run-{devices}"), limit_val_batches=1.0, **options)
(values,) = trainer.validate(module, datamodule=make_data(validation=rows, eval_batch_size=3), verbose=False)
Path({folder!r}, f"{devices}-{{trainer.global_rank}}.json").write_text(json.dumps(values))
"""


@pytest.mark.slow  # starts processes that import torch and lightning
def test_two_ranks_measure_what_one_does(tmp_path):
    for devices in (1, 2):
        script = tmp_path / f"{devices}.py"
        script.write_text(
            RANKS_SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path), devices=devices)
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        # Lightning's advice, once per metric, to reduce what is of all ranks already
        assert "sync_dist" not in done.stderr
    one, *two = [json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json")]
    assert {"val/pass@3", "val/topic/a/solved", "val/topic/d/avg@3"} <= set(one)
    for values in two:
        assert values == pytest.approx(one, abs=1e-6)
    samples = [
        [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(tmp_path.rglob("samples.jsonl"))
    ]
    assert [row["id"] for row in samples[0]] == [row["id"] for row in samples[1]]
    assert len(samples[0]) == len({row["id"] for row in samples[0]}) == 7


def held_out(function):
    return FunctionReward(function, weight=0.0, name="held_out")


def test_a_held_out_reward_is_shown_and_never_trained_on(tmp_path):
    def fails_on_some(turns, context):
        if "3" in turns[-1].content:
            raise ValueError("no")
        return None if "4" in turns[-1].content else 100.0 * len(turns[-1].content)

    alone = fit(tmp_path, make_module(max_reward_failures=0))
    beside = fit(tmp_path, make_module(reward=[DigitReward(), held_out(fails_on_some)], max_reward_failures=0))
    expected, found = weights(alone), weights(beside)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    metrics = beside.callback_metrics
    assert metrics["reward/held_out"] > 50
    assert metrics["train/reward"] == alone.callback_metrics["train/reward"]
    assert metrics["reward_failures/held_out/ValueError"] > 0


def test_a_held_out_reward_neither_fails_nor_scores_a_completion():
    def raises(turns, context):
        raise ValueError("no")

    rewards = [FunctionReward(lambda turns, context: context["trained"], name="trained"), held_out(raises)]
    with Scorer(rewards) as scorer, scorer.start(2) as session:
        session.submit(0, [], {"trained": 0.5})
        session.submit(1, [], {"trained": None})
        scores = session.collect()
    assert scores.totals_N[0] == 0.5
    assert scores.totals_N[1].isnan()  # no trained reward applies
    assert scores.values_NF[:, 1].isnan().all()
    failures = [(failure.completion, failure.reward, failure.error) for failure in scores.failures]
    assert sorted(failures) == [
        (0, "held_out", "ValueError"),
        (1, "all", "NotApplicable"),
        (1, "held_out", "ValueError"),
    ]


def test_held_out_rewards_alone_are_refused():
    with pytest.raises(ConfigError, match=r"all rewards have weight 0 \(held_out\): nothing would be trained"):
        make_module(reward=[held_out(lambda turns, context: 1.0)])
