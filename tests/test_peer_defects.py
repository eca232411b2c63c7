"""What a peer gets wrong (TRL 1.16's GRPOTrainer, measured), one test each, in the order in which the defects were
found.

Where a test elsewhere proves the contrary already, it is named, and must exist.
"""

import ast
import json
import math
from pathlib import Path

import pytest
import torch
from module_runs import SCENARIOS, DigitReward, fit, make_data, make_module, weights

from stateset_lightning import RewardFunction, RolloutConfig
from stateset_lightning.algorithm import CISPO, GRPO
from stateset_lightning.callbacks import SampleWriter
from stateset_lightning.rewards import RewardResult, Scorer
from stateset_lightning.types import Turn

TESTS = Path(__file__).parent


def proved_by(*places: str) -> None:
    for place in places:
        file, name = place.split("::")
        assert name in {getattr(node, "name", "") for node in ast.parse((TESTS / file).read_text()).body}, place


def score(reward, texts, context=None):
    with Scorer(reward) as scorer:
        session = scorer.start(len(texts))
        for n, text in enumerate(texts):
            session.submit(n, [Turn("user", "q"), Turn("assistant", text)], context)
        return session.collect()


def test_d01_a_resume_in_a_later_epoch_goes_on_in_that_epochs_order():
    proved_by(
        "test_datamodule.py::test_a_run_resumed_from_each_of_its_checkpoints_sees_the_same_batches",
        "data/test_loader.py::test_a_restored_loader_serves_the_rest_of_the_epoch",
    )


def test_d02_a_resume_inside_an_episode_does_not_sample_it_again():
    proved_by("test_module.py::test_a_run_resumed_from_any_optimizer_step_ends_bit_identical")


def test_d03_a_reference_that_moves_is_in_the_checkpoint():
    proved_by("run/test_callbacks.py::test_a_moved_reference_is_in_the_checkpoint_and_goes_on_exactly")


def test_d04_a_loss_or_gradient_that_is_not_finite_never_reaches_the_weights():
    proved_by("test_module.py::test_a_gradient_that_is_not_finite_is_skipped_and_counted_and_stops_a_run_that_stays_so")


def test_d05_an_infinite_reward_fails_its_completion_and_not_its_group():
    scores = score(lambda turns, context: float(turns[-1].content), ["1", "inf", "0", "1"])
    assert scores.totals_N.isnan().tolist() == [False, True, False, False]
    assert [(failure.completion, failure.error) for failure in scores.failures] == [(1, "RewardError")]
    advantages = GRPO().advantages(scores.values_NF.view(1, 4, 1), torch.ones(1))
    std = math.sqrt(1 / 3)
    expected = torch.tensor([[1 / 3, math.nan, -2 / 3, 1 / 3]], dtype=torch.float64) / (std + 1e-4)
    torch.testing.assert_close(advantages, expected, equal_nan=True)


def test_d06_evaluation_is_a_mean_over_completions_and_not_over_batches():
    proved_by("evaluation/test_evaluation.py::test_means_are_over_completions_and_not_over_batches")


def test_d07_constant_groups_are_counted_whatever_the_scale():
    """They are told from the group's own largest and smallest reward, so the scale of the advantages plays no part."""
    scores_PGF = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])[..., None]
    for scale in ("group", "batch", "none"):
        advantages = GRPO(scale=scale).advantages(scores_PGF, torch.ones(1))
        assert (advantages == 0).all(1).tolist() == [True, False, True, False]
    proved_by("training/test_metrics.py::test_groups_by_kind")


def test_d08_and_d09_every_completion_is_written_and_evaluation_overwrites_none(tmp_path):
    """All groups of all episodes, and those of the validations between them, lie in one file, told apart by their
    split.
    """
    writer = SampleWriter(every_n_episodes=1, num_prompts=100)
    options = {"max_steps": 3, "limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    fit(tmp_path, data=make_data(batch_size=4), callbacks=[writer], **options)
    (file,) = tmp_path.rglob("samples.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(row["split"] == "train" for row in rows) == 3 * 4 * 4
    assert sum(row["split"] == "validation" for row in rows) == 3 * 4


class Sometimes(RewardFunction):
    def compute_reward(self, turns, context=None):
        return RewardResult(1.0, {"seen": turns[-1].content} if turns[-1].content == "a" else {})


def test_d10_parts_of_a_score_belong_to_their_completion_alone():
    first, second = score(Sometimes(), ["a", "b"]).breakdowns, score(Sometimes(), ["b", "b"]).breakdowns
    assert first == [{"sometimes": {"seen": "a"}}, {}]
    assert second == [{}, {}]


def test_d11_dropout_is_off_in_attention_too():
    proved_by("policy/test_loading.py::test_a_models_own_dropout_is_replaced_by_ours")


def test_d12_sampling_and_old_log_probs_are_without_dropout():
    proved_by(
        "policy/test_policy.py::test_scores_without_gradient_have_no_graph_and_no_dropout_and_leave_the_mode",
        "rollout/test_in_process.py::test_an_exception_leaves_modes_and_weights_as_they_were",
    )


def test_d13_prompts_of_uneven_length_have_the_same_log_probs_in_sampling_and_training():
    """Also with learned positions (GPT-2)."""
    proved_by("rollout/test_in_process.py::test_sampled_logprobs_are_those_that_the_policy_scores")


def test_d14_sampling_in_a_lower_precision_leaves_the_weights_in_theirs(tmp_path):
    trainer = fit(tmp_path, precision="bf16-mixed", max_steps=1)
    assert {value.dtype for value in trainer.lightning_module.parameters()} == {torch.float32}
    assert any((value.bfloat16().float() != value).any() for value in weights(trainer).values())


def test_d15_cispo_with_defaults_trains_an_on_policy_token_with_its_whole_weight():
    from stateset_lightning.types import TokenBatch

    logprobs_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss_T, _ = CISPO().per_token_loss(
        TokenBatch(logprobs_T, logprobs_T.detach(), torch.tensor([0.5]), torch.tensor([2]))
    )
    loss_T.sum().backward()
    assert logprobs_T.grad.tolist() == [-0.5, -0.5]


def test_d16_a_prompt_beyond_the_models_context_is_refused_at_the_start():
    proved_by("training/test_checks.py::test_the_longest_prompt_fits_with_its_completion")


def test_d17_an_empty_completion_is_one_like_others():
    assert score(DigitReward(), [""]).totals_N.tolist() == [0.0]
    proved_by("training/test_episode.py::test_an_empty_completion_is_not_active")


def test_d18_a_data_set_smaller_than_a_batch_trains_and_no_prompt_is_left_out(tmp_path):
    trainer = fit(tmp_path, data=make_data(train=SCENARIOS[:1], batch_size=4), max_steps=2)
    assert trainer.global_step == 2
    proved_by(
        "data/test_loader.py::test_a_data_set_smaller_than_a_batch_repeats_its_prompts",
        "data/test_loader.py::test_an_episode_is_served_for_each_micro_step_and_the_epochs_end_is_filled_from_its_start",
    )


class ByColumn(RewardFunction):
    def compute_reward(self, turns, context=None):
        if context["completions"] == "raise":
            raise KeyError("grader")
        return float(len(turns[-1].content) + len(context["prompts"]))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_d19_a_reward_that_raises_ends_no_run_and_columns_may_have_any_name(tmp_path, kind):
    rows = [
        {**row, "completions": "raise" if i == 0 else "x", "prompts": "y", "turns": 1}
        for i, row in enumerate(SCENARIOS[:4])
    ]
    inner = ByColumn()

    async def later(turns, context):
        return inner.compute_reward(turns, context)

    module = make_module(reward=inner if kind == "sync" else later)
    trainer = fit(tmp_path, module, make_data(train=rows), max_steps=1)
    assert trainer.callback_metrics["groups/dropped"] == 0.25


@pytest.mark.parametrize(
    "options", [{"num_generations": 2}, {"num_generations": 128}, {"num_generations": 4, "max_new_tokens": 1}]
)
def test_the_smallest_and_largest_groups_train(tmp_path, options):
    rollout = RolloutConfig(**{"max_new_tokens": 4, **options})
    trainer = fit(tmp_path, make_module(rollout=rollout), make_data(batch_size=2), max_steps=1)
    assert trainer.global_step == 1
    assert trainer.callback_metrics["completion/max_tokens"] <= rollout.max_new_tokens
