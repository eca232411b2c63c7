"""Breaks the package in a dozen ways, one at a time, and sees that the tests notice: `make mutants`, some minutes.

Each mutant is a small fault of the maths, the resume or the packing, with the tests that must fail on it. It is made in
a copy of the package, so that the checkout is never broken. Exit code 1 if one survives, or if its text is gone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; one of `tests` must fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(
        "algorithm/losses.py",
        "-torch.minimum(",
        "-torch.maximum(",
        ("algorithm/test_losses.py",),
    ),
    Mutant(
        "training/episode.py",
        "active_PG = active_PG & (advantages_PGK != 0).any(-1)",
        "active_PG = active_PG & (advantages_PGK > 0).any(-1)",
        ("training/test_episode.py",),
    ),
    Mutant(
        "training/episode.py",
        "return positions * self.optimizer_steps // (self.num_prompts * self.ranks.world)",
        "return positions * self.optimizer_steps // (self.num_prompts * self.ranks.world + 1)",
        ("training/test_episode.py",),
    ),
    Mutant(
        "training/episode.py",
        "return tokens_T if self.sampled_T is None else tokens_T & self.sampled_T",
        "return tokens_T",
        ("training/test_episode.py",),
    ),
    Mutant(
        "training/loss.py",
        "loss = (weights_T * loss_T).sum()",
        "loss = (weights_T * loss_T).mean()",
        ("test_reduction.py", "training/test_loss.py"),
    ),
    Mutant(
        "training/step.py",
        "factor = self.ranks.world * self.accumulate",
        "factor = self.ranks.world",
        ("test_reduction.py",),
    ),
    Mutant(
        "training/step.py",
        "optimizer.zero_grad(set_to_none=True)  # None rather than zero",
        "optimizer.zero_grad(set_to_none=False)  # None rather than zero",
        ("test_module.py",),
    ),
    Mutant(
        "training/loss.py",
        "torch.manual_seed(seed)",
        "torch.manual_seed(seed + 1)",
        ("test_version_0_1.py",),
    ),
    Mutant(
        "run/checkpoint.py",
        '"episode": state.episode_of_ranks,',
        '"episode": None,',
        ("test_module.py",),
    ),
    Mutant(
        "run/checkpoint.py",
        'module.algorithm.load_state_dict(saved["algorithm"])',
        "pass",
        ("training/test_collect.py",),
    ),
    Mutant(
        "data/loader.py",
        'self._completed = int(state["epoch"]) * len(self) + min(int(state["completed"]), len(self))',
        'self._completed = int(state["epoch"]) * len(self)',
        ("data/test_loader.py",),
    ),
    Mutant(
        "policy/packed_attention.py",
        "np.tri(longest, dtype=bool)",
        "np.ones((longest, longest), dtype=bool)",
        ("policy/test_packed_attention.py", "policy/test_policy.py"),
    ),
    Mutant(
        "policy/varlen_attention.py",
        "min(prompt, window - 1)",
        "min(prompt, window - 2)",
        ("policy/test_varlen_attention.py",),
    ),
    Mutant(
        "policy/policy.py",
        "positions += range(len(group.prompt), len(group.prompt) + len(completion))",
        "positions += range(len(group.prompt) + 1, len(group.prompt) + len(completion) + 1)",
        ("policy/test_policy.py",),
    ),
    Mutant(
        "seeding.py",
        "_advance(_state(purpose, seed, episode), np",
        "_advance(_state(purpose, seed), np",
        ("test_seeding.py",),
    ),
]


def is_caught(mutant: Mutant, folder: Path) -> bool:
    """Whether a test fails on a copy of the package with the fault in it.

    Raises:
        ValueError: If the text to be changed does not stand in the file exactly once.
    """
    file = folder / "stateset_lightning" / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {text.count(mutant.old)} times {mutant.old!r}")
    file.write_text(text.replace(mutant.old, mutant.new))
    tests = [str(folder / "tests" / test) for test in mutant.tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    settings = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    file.write_text(text)
    if done.returncode not in (0, 1):  # the tests could not be run
        raise ValueError(f"{mutant.file}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main() -> None:
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("stateset_lightning", "tests", "configs", "examples", "pyproject.toml"):
            source = REPOSITORY / part
            shutil.copytree(source, folder / part) if source.is_dir() else shutil.copy(source, folder)
        for number, mutant in enumerate(MUTANTS, 1):
            caught = is_caught(mutant, folder)
            survivors += not caught
            print(f"{number:2} {'caught' if caught else 'SURVIVED':8} {mutant.file}: {mutant.new}", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants caught")
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
