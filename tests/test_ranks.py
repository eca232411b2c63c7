"""Gathering over ranks, and the order of their prompts."""

from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError

from stateset_lightning.ranks import Ranks, explain_lost_rank


def test_a_single_rank_gathers_its_own_value_without_a_process_group() -> None:
    value = {"a": 1}
    assert Ranks().gather(value) == [value]
    values = torch.arange(6).reshape(3, 2)
    assert torch.equal(Ranks().by_position(values), values)


def test_the_first_ranks_value_is_everyones(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast_object_list(values: list[Any], src: int) -> None:
        values[:] = [f"of rank {src}"]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast_object_list)
    assert Ranks(1, 2).from_first("mine") == "of rank 0"
    assert Ranks().from_first("mine") == "mine"


@pytest.mark.parametrize("world", [2, 3])
def test_values_come_in_order_of_global_position(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    positions = torch.arange(4 * world)
    of_rank = [torch.stack([positions[rank::world], -positions[rank::world]], dim=1) for rank in range(world)]

    def all_gather_object(output: list[Any], mine: Any) -> None:
        assert torch.equal(mine, of_rank[1])
        output[:] = of_rank

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    ranks = Ranks(1, world)
    assert ranks.by_position(of_rank[1]).tolist() == [[p, -p] for p in range(4 * world)]
    assert [values.tolist() for values in ranks.gather(of_rank[1])] == [values.tolist() for values in of_rank]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"), DistBackendError("x")],
)
def test_an_error_of_a_collective_says_that_another_rank_has_ended(error: Exception) -> None:
    explain_lost_rank(error)
    assert "another rank has ended" in error.__notes__[0]
    assert "--ckpt_path last" in error.__notes__[0]


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ConnectionError("Connection closed by peer")]
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    explain_lost_rank(error)
    assert not hasattr(error, "__notes__")
