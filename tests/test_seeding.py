"""Counted randomness: fixed values, independence of company, and numbers that look random."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from stateset_lightning.seeding import derive_seed, permutation, run_seed, sample_seeds, uniforms


def test_the_mixing_is_splitmix64() -> None:
    # Published outputs for the seeds 0 and 1234567; a uniform number is the upper 52 bits, centred in their interval.
    published = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973],
    }
    for seed, outputs in published.items():
        assert uniforms([seed], len(outputs))[0].tolist() == [((bits >> 12) + 0.5) / 2**52 for bits in outputs]


def test_seeds_never_change() -> None:
    """A run's noise follows from these: whoever changes them breaks every resume and every published result."""
    assert derive_seed(0, "train") == 9080038290603995622
    assert derive_seed(42, "train", 3, 7, 1) == 5364010649142315735
    assert derive_seed(-1, "dropout", 2**63) == 6122993785735434292
    assert sample_seeds(1, "validation", 0, [4, 2], 2) == [
        2843339672987665794,
        8111913487805238802,
        6642675223303085191,
        4776218316799535416,
    ]
    assert permutation(5, "order", 1, size=8).tolist() == [0, 5, 1, 7, 3, 6, 4, 2]


def test_seeds_are_the_same_in_a_process_with_another_hash_seed() -> None:
    code = "from stateset_lightning.seeding import derive_seed; print(derive_seed(42, 'train', 3, 7, 1))"
    for hash_seed in ("1", "2"):
        output = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(output.stdout) == 5364010649142315735


def test_every_part_of_what_is_drawn_changes_the_seed() -> None:
    base = (7, "train", 3, 5, 1)
    others = [
        (8, "train", 3, 5, 1),
        (7, "val", 3, 5, 1),
        (7, "train", 4, 5, 1),
        (7, "train", 3, 6, 1),
        (7, "train", 3, 5, 2),
        (7, "train", 5, 3, 1),
    ]
    others += [(7, "train", 3, 5), (7, "train", 3, 5, 1, 0)]  # type: ignore[list-item]
    seeds = {derive_seed(*arguments) for arguments in [base, *others]}
    assert len(seeds) == len(others) + 1


def test_seeds_do_not_collide_and_have_63_bits() -> None:
    seeds = [
        derive_seed(0, "train", episode, position, sample)
        for episode in range(20)
        for position in range(50)
        for sample in range(8)
    ]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert max(seeds) > 0.99 * 2**63


def test_sample_seeds_do_not_depend_on_the_batch() -> None:
    together = sample_seeds(7, "train", 3, range(8), 4)
    for position in range(8):
        assert sample_seeds(7, "train", 3, [position], 4) == together[4 * position : 4 * position + 4]
    assert sample_seeds(7, "train", 3, [6, 1], 2) == [together[24], together[25], together[4], together[5]]


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6), st.integers(1, 20))
def test_a_row_of_uniforms_depends_on_its_seed_alone(seeds: list[int], draws: int) -> None:
    together = uniforms(seeds, draws)
    assert together.shape == (len(seeds), draws)
    for row, seed in zip(together, seeds, strict=True):
        assert (uniforms([seed], draws + 5)[0, :draws] == row).all()
    assert (together > 0).all()
    assert (together < 1).all()


def test_the_smallest_and_largest_numbers_are_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from stateset_lightning import seeding

    for bits, expected in ((0, 2.0**-53), (2**64 - 1, 1 - 2.0**-53)):
        monkeypatch.setattr(seeding, "_mix", lambda z, bits=bits: np.full_like(z, bits))
        value = uniforms([1], 1)[0, 0]
        assert value == expected
        assert 0 < value < 1


def test_uniforms_are_uniform_and_independent() -> None:
    values = uniforms(range(2000), 50)
    number = values.size
    assert values.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * number))
    assert values.var() == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 180 / number))
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    chi_square = ((counts - number / 100) ** 2 / (number / 100)).sum()
    assert abs(chi_square - 99) < 4 * math.sqrt(2 * 99)
    for first, second in (
        (values[:, :-1], values[:, 1:]),
        (values[:-1], values[1:]),
    ):  # along a row, and between seeds that follow each other
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / math.sqrt(first.size)


def test_uniforms_of_derived_seeds_are_independent_over_samples() -> None:
    first_draws = uniforms(sample_seeds(0, "train", 0, range(1000), 8), 1).reshape(1000, 8)
    correlations = np.corrcoef(first_draws.T)[np.triu_indices(8, 1)]
    assert np.abs(correlations).max() < 4.5 / math.sqrt(1000)


@pytest.mark.parametrize("size", [0, 1, 2, 100])
def test_a_permutation_holds_every_index_once(size: int) -> None:
    order = permutation(3, "order", 0, size=size)
    assert sorted(order.tolist()) == list(range(size))
    assert (permutation(3, "order", 0, size=size) == order).all()
    if size == 100:
        assert order.tolist() != list(range(100))
        assert (permutation(3, "order", 1, size=size) != order).any()
        assert (permutation(4, "order", 0, size=size) != order).any()


def test_nothing_reads_or_advances_a_global_generator() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = permutation(3, "order", size=9).tolist(), uniforms([5], 3).tolist()
    torch.manual_seed(2)
    np.random.seed(2)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert (permutation(3, "order", size=9).tolist(), uniforms([5], 3).tolist()) == expected
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_the_run_seed_is_the_one_given_or_that_of_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert run_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert run_seed() == 17
    assert run_seed(0) == 0
