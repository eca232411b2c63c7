"""Counted randomness: every draw comes from a seed derived from what is drawn, never from a generator's past.

A seed is mixed from (run seed, purpose, episode, position of the prompt in the global batch, sample): the noise of a
completion is the same whatever the batch size, the number of ranks, or what was drawn before. Nothing here reads or
advances torch's global generator, and nothing needs saving.

The mixing is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

import os
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on unsigned 64-bit integers, elementwise."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def run_seed(given: int | None = None) -> int:
    """The seed that is given, or that of `seed_everything`; 0 if it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if given is None else given


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed from the run's seed, what it is for, and any number of counters."""
    return int(_state(purpose, seed, *counters)[0]) >> 1


def _state(purpose: str, *counters: int) -> np.ndarray:
    # Python's hash of a string differs between processes; a digest does not.
    state = np.frombuffer(blake2b(purpose.encode(), digest_size=8).digest(), dtype="<u8")
    for counter in counters:
        state = _advance(state, np.array([counter % 2**64], dtype=np.uint64))
    return state


def _advance(state: np.ndarray, counter: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64
        return _mix(state + np.uint64(_GOLDEN) + counter)


def sample_seeds(seed: int, purpose: str, episode: int, positions: Sequence[int], num_samples: int) -> list[int]:
    """Seeds of P x num_samples completions, those of one prompt next to each other."""
    states_P = _advance(_state(purpose, seed, episode), np.asarray(positions, dtype=np.int64).astype(np.uint64))
    states_PG = _advance(states_P[:, None], np.arange(num_samples, dtype=np.uint64)[None, :])
    return [int(value) for value in (states_PG >> np.uint64(1)).flatten()]


def uniforms(seeds_N: Sequence[int], num_draws: int) -> np.ndarray:
    """Uniform numbers in (0, 1), float64 [N, num_draws]; number t of row n depends on `seeds_N[n]` and t alone."""
    seeds = np.asarray(seeds_N, dtype=np.uint64)[:, None]
    counters = np.arange(1, num_draws + 1, dtype=np.uint64)[None, :] * np.uint64(_GOLDEN)
    bits = _mix(seeds + counters) >> np.uint64(12)  # 52 bits: the largest is below 1
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def permutation(seed: int, purpose: str, *counters: int, size: int) -> np.ndarray:
    """A shuffled `arange(size)`; equal on every rank and in every process."""
    return np.random.default_rng(derive_seed(seed, purpose, *counters)).permutation(size)
