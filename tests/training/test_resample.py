"""Dynamic sampling: which groups are replaced, that nothing gets lost on the way, and where it ends."""

import math

import torch

from stateset_lightning.policy import SamplingMask
from stateset_lightning.training.resample import Sample, resample
from stateset_lightning.types import FinishReason, PromptBatch, RewardFailure, Rollout, Scenario, Scores, Turn

NAN = math.nan


def prompts(rows: list[int], positions: list[int]) -> PromptBatch:
    scenarios = [Scenario(id=str(row), prompt=f"{row}?") for row in rows]
    conversations = [scenario.turns() for scenario in scenarios]
    return PromptBatch([[row] for row in rows], conversations, scenarios, positions, 4, rows=rows)


def make(rows: list[int], groups: list[list[float]], first_position: int = 0) -> Sample:
    """Completion g of prompt `row` has g + 1 tokens 100 row + g; its text and breakdown name it. A NaN is a failure."""
    size = len(groups[0])
    names = [(row, g) for row in rows for g in range(size)]
    values_N = torch.tensor([value for group in groups for value in group], dtype=torch.float64)
    tokens = [100 * row + g for row, g in names for _ in range(g + 1)]
    return Sample(
        prompts(rows, list(range(first_position, first_position + len(rows)))),
        Rollout(
            prompt_tokens=[[row] for row in rows],
            completion_tokens_T=torch.tensor(tokens),
            lengths_N=torch.tensor([g + 1 for _, g in names]),
            logprobs_T=-torch.tensor(tokens, dtype=torch.float32),
            sampled_T=torch.tensor([(row + g) % 2 == 0 for row, g in names for _ in range(g + 1)]),
            finish_reasons=[FinishReason.LENGTH if g else FinishReason.STOP for _, g in names],
            texts=[f"{row}.{g}" for row, g in names],
            sampling_mask=SamplingMask(
                torch.tensor([token + i for token in tokens for i in range(token % 3)], dtype=torch.int32),
                torch.tensor([token % 3 for token in tokens], dtype=torch.int32),
            ),
        ),
        Scores(
            ("right",),
            values_N[:, None],
            values_N,
            [{"right": {"of": f"{row}.{g}"}} for row, g in names],
            [
                RewardFailure(n, "right", "OSError", f"{row}.{g}")
                for n, (row, g) in enumerate(names)
                if math.isnan(values_N[n])
            ],
            seconds=1.0,
        ),
    )


def test_uninformative_are_constant_and_dropped_groups() -> None:
    assert make([0, 1, 2, 3], [[1, 1], [1, 0], [NAN, 1], [0, 0]]).uninformative() == [0, 2, 3]


def test_groups_are_replaced_with_all_that_belongs_to_them() -> None:
    mine = make([0, 1, 2], [[NAN, 1.0], [0.0, 1.0], [0.5, 0.5]])
    merged = mine.with_groups([0, 2], make([7, 8], [[2.0, 3.0], [4.0, NAN]], first_position=10))
    wanted = make([7, 1, 8], [[2.0, 3.0], [0.0, 1.0], [4.0, NAN]])
    assert merged.batch.positions == [0, 1, 2]
    assert (merged.batch.rows, merged.batch.prompt_tokens) == ([7, 1, 8], [[7], [1], [8]])
    assert [scenario.id for scenario in merged.batch.scenarios] == ["7", "1", "8"]
    assert merged.batch.conversations == [[Turn("user", f"{row}?")] for row in (7, 1, 8)]
    assert (merged.batch.episode_index, merged.batch.num_micro_steps) == (4, 1)
    for name in ("completion_tokens_T", "lengths_N", "logprobs_T", "sampled_T"):
        assert getattr(merged.rollout, name).tolist() == getattr(wanted.rollout, name).tolist()
    for name in ("ids_K", "counts_T"):
        masks = (getattr(sample.rollout.sampling_mask, name).tolist() for sample in (merged, wanted))
        assert next(masks) == next(masks)
    assert merged.rollout.texts == wanted.rollout.texts
    assert merged.rollout.finish_reasons == wanted.rollout.finish_reasons
    assert merged.rollout.prompt_tokens == [[7], [1], [8]]
    torch.testing.assert_close(merged.scores.values_NF, wanted.scores.values_NF, equal_nan=True)
    torch.testing.assert_close(merged.scores.totals_N, wanted.scores.totals_N, equal_nan=True)
    assert merged.scores.breakdowns == wanted.scores.breakdowns
    # that of prompt 0 is gone, that of prompt 8 has its new number
    assert merged.scores.failures == wanted.scores.failures
    assert merged.scores.seconds == 2.0


def run(rounds: int, rewards_of: dict[int, list[float]]) -> tuple[Sample, list[list[int]]]:
    """Resamples prompts 0, 1, 2, of which 1 is mixed; the replacement of slot s in round r is prompt 10 r + s."""

    def replacements(batch: PromptBatch, slots: list[int], number: int) -> PromptBatch:
        rows = [10 * number + slot for slot in slots]
        return prompts(rows, rows)

    def sample(batch: PromptBatch) -> Sample:
        assert batch.rows is not None
        return make(batch.rows, [rewards_of.get(row, [0.0, 0.0]) for row in batch.rows])

    final, drawn = resample(sample, replacements, make([0, 1, 2], [[1, 1], [1, 0], [0, 0]]), rounds)  # type: ignore[arg-type]
    return final, [other.batch.rows or [] for other in drawn]


def test_rounds_end_when_every_group_teaches_something() -> None:
    final, drawn = run(5, {10: [1.0, 0.0], 22: [0.0, 1.0]})
    assert drawn == [[10, 12], [22]]
    assert final.batch.rows == [10, 1, 22]
    assert final.uninformative() == []


def test_rounds_are_bounded_and_what_is_left_stays() -> None:
    final, drawn = run(2, {})
    assert drawn == [[10, 12], [20, 22]]
    assert final.batch.rows == [20, 1, 22]
    assert final.uninformative() == [0, 2]
