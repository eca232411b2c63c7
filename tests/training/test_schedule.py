"""Learning-rate factors by hand, and as torch's scheduler applies them."""

import pytest
import torch

from stateset_lightning.errors import ConfigError
from stateset_lightning.training.schedule import Schedule, given_options, keep_given_options, start_at


def rates(schedule: Schedule, run_steps: int | None, steps: int) -> list[float]:
    """The learning rate of each optimizer step, of a base of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule.build(optimizer, run_steps)
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


def test_a_constant_rate_needs_no_horizon() -> None:
    assert rates(Schedule(), None, 3) == [1.0, 1.0, 1.0]


def test_a_warmup_rises_linearly_and_never_starts_at_zero() -> None:
    assert rates(Schedule(warmup_steps=3), None, 5) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_a_linear_decay_reaches_its_end_after_the_last_step() -> None:
    assert rates(Schedule("linear"), 4, 6) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert rates(Schedule("linear", warmup_steps=1, final_factor=0.2), 5, 6) == pytest.approx(
        [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]
    )


def test_a_cosine_decay_is_half_a_cosine() -> None:
    half = 0.5**0.5
    assert rates(Schedule("cosine"), 4, 5) == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0])
    assert rates(Schedule("cosine", final_factor=0.5), 2, 3) == pytest.approx([1.0, 0.75, 0.5])


def test_an_own_horizon_wins_over_the_runs() -> None:
    assert rates(Schedule("linear", total_steps=2), 100, 3) == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_without_a_horizon_is_refused(decay: str) -> None:
    with pytest.raises(ConfigError, match=rf"decay='{decay}' needs trainer.max_steps, or total_steps"):
        rates(Schedule(decay), None, 1)  # type: ignore[arg-type]


def test_a_warmup_longer_than_the_run_goes_on_rising() -> None:
    assert rates(Schedule("linear", warmup_steps=9), 4, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


# Resuming with other options
# ----------------------------------------------------------------------------------------------------


def resumed(
    schedule: Schedule, new_schedule: Schedule, lr: float, new_lr: float, steps: int = 2, **new_options: float
) -> torch.optim.Optimizer:
    """An optimizer restored after `steps` of 4 steps of another run, options of its own kept."""
    first = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr, weight_decay=0.1)
    saved = given_options(first)
    scheduler = schedule.build(first, 4)
    for _ in range(steps):
        first.step()
        scheduler.step()
    second = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=new_lr, **{"weight_decay": 0.1, **new_options})
    given = given_options(second)
    new_scheduler = new_schedule.build(second, 4)
    second.load_state_dict(first.state_dict())
    new_scheduler.load_state_dict(scheduler.state_dict())
    keep_given_options(second, new_scheduler, given, saved)
    return second


def test_without_a_change_the_restored_rate_stays() -> None:
    assert resumed(Schedule("linear"), Schedule("linear"), 1.0, 1.0).param_groups[0]["lr"] == pytest.approx(0.5)


def test_a_new_learning_rate_wins_over_the_checkpoints() -> None:
    optimizer = resumed(Schedule("linear"), Schedule("linear"), 1.0, 3.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.5)  # half of the way down, from 3
    assert optimizer.param_groups[0]["initial_lr"] == 3.0


def test_a_new_shape_wins_over_the_checkpoints() -> None:
    assert resumed(Schedule("linear"), Schedule("constant"), 1.0, 1.0).param_groups[0]["lr"] == pytest.approx(1.0)
    assert resumed(Schedule("linear"), Schedule("linear", total_steps=8), 1.0, 1.0).param_groups[0][
        "lr"
    ] == pytest.approx(0.75)


def test_a_rate_that_is_a_tensor_is_restored_in_place() -> None:
    options, weights = {"weight_decay": 0.1, "foreach": False}, torch.nn.Parameter(torch.zeros(1))
    first, second = (torch.optim.AdamW([weights], torch.tensor(1.0), **options) for _ in "12")
    saved, scheduler = given_options(first), Schedule("linear").build(first, 4)
    assert type(saved[0]["lr"]) is float
    for _ in range(2):
        first.step()
        scheduler.step()
    given, resumed_scheduler = given_options(second), Schedule("linear").build(second, 4)
    second.load_state_dict(first.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    rate = second.param_groups[0]["lr"]
    for changed in (given, [{**given[0], "lr": 3.0}]):
        keep_given_options(second, resumed_scheduler, changed, saved)
        assert second.param_groups[0]["lr"] is rate  # torchao refuses another
        assert float(rate) == pytest.approx(0.5 * changed[0]["lr"])
        assert float(resumed_scheduler.base_lrs[0]) == changed[0]["lr"]
    start_at(2, second, Schedule("linear").build(second, 4), given)
    assert second.param_groups[0]["lr"] is rate


def test_other_options_win_too() -> None:
    assert resumed(Schedule(), Schedule(), 1.0, 1.0).param_groups[0]["weight_decay"] == 0.1
    assert resumed(Schedule(), Schedule(), 1.0, 1.0, weight_decay=0.3).param_groups[0]["weight_decay"] == 0.3
