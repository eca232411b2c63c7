"""Several ranks are one process, only faster: the same samples, rewards, gradients and weights; and when one of them
dies, the run ends.

    python benchmarks/ranks.py            world sizes 1, 2 and 4, DDP and FSDP2, and every way to lose a rank
    python benchmarks/ranks.py --quick    two ranks, fewer steps, two ways

The run is that of `kill_test.py` without dropout: two passes over an episode of four prompts in micro-steps of so few
that some ranks have nothing to train; some rewards fail; a KL term with an adaptive coefficient, a curriculum, a
schedule, validations. Everything is imported once, and each rank is a fork.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kill_test
import torch
from kill_test import Kill, Settings, differences, end_state, fork, free_port
from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.policy import PolicyConfig, load_model
from stateset_lightning.ranks import unsharded
from stateset_lightning.run.fsdp_strategy import FSDP2Strategy

LOST = "another rank has ended"
LIMIT = 60  # seconds in which all ranks have to end after one has died
FIRST_GRADIENT, GRADIENTS, WEIGHTS = {"32-true": 3e-6, "64-true": 1e-7}, 1e-4, 1e-5
"""Relative differences that are float error: of the first gradient, of later ones, whose weights differ, and of the
last weights. In float32 the first gradient of one process is 1.1e-6 away from that in float64, on a CPU with AVX-512.
"""


class Recorder(Callback):
    """What a rank sampled, and every gradient; written at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.micro_step == 0:
            rows: Any = pl_module.last_records
            size = len(rows) // len(batch)
            for p, position in enumerate(batch.positions):
                self.samples[batch.episode_index, position] = rows[p * size : (p + 1) * size]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({name: unsharded(p.grad).detach().clone() for name, p in named if p.grad is not None})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, FSDP2Strategy):
            gloo: Any = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
            assert gloo.options._threads == 1, "two threads of a group crash the process, seldom"
        weights = {name: unsharded(p).detach() for name, p in pl_module.named_parameters()}
        with (self.folder / f"rank{trainer.global_rank}.pt").open("wb") as file:
            torch.save({"samples": self.samples, "gradients": self.gradients, "weights": weights}, file)


def recorded(folder: Path, settings: Settings, started: int | None) -> None:
    kill_test.train(folder, settings, started, [Recorder(folder)])


class FailsOn(Callback):
    """Raises on one rank, outside everything that is agreed on."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 3:
            raise ValueError("this rank has a defect")


def with_defect(folder: Path, settings: Settings, started: int | None) -> None:
    kill_test.train(folder, settings, started, [FailsOn(settings.ranks - 1)])


def with_failing_rewards(folder: Path, settings: Settings, started: int | None) -> None:
    """Every reward of the last rank fails; with two ranks that is half, which is allowed, and the limit is lower."""

    def compute_reward(self: Any, turns: Any, context: Any = None) -> float:
        if int(os.environ["RANK"]) == settings.ranks - 1:
            raise OSError("no judge on this machine")
        return len(turns[-1].content) / 8

    kill_test.EvenDigits.compute_reward = compute_reward  # type: ignore[method-assign]
    kill_test.train(folder, replace(settings, max_reward_failures=0.2), started)


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: exit codes, seconds between the first end and the last, and what they printed."""

    codes: list[int]
    seconds: float
    output: str


def launch(
    folder: Path, settings: Settings, run: Callable[..., None] = kill_test.train, plan: Kill | None = None
) -> Ended:
    """All ranks of a run, until each has ended; those that are still there `LIMIT` seconds after the first are killed,
    with code -9.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "output.txt").unlink(missing_ok=True)
    port = free_port()
    pids = [fork(folder, settings, plan, rank, port, None, run) for rank in range(settings.ranks)]
    codes: dict[int, int] = {}
    first = float("inf")
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            first = min(first, time.monotonic())
        elif time.monotonic() - first > LIMIT:
            for other in set(pids) - codes.keys():
                os.kill(other, 9)
        else:
            time.sleep(0.02)
    return Ended([codes[pid] for pid in pids], time.monotonic() - first, (folder / "output.txt").read_text())


def print_failure(ended: Ended) -> bool:
    """Whether a run that should end well did not."""
    if any(ended.codes):
        print(f"a run ended with {ended.codes}:\n{ended.output[-20_000:]}")  # with the stacks of a rank that crashed
    return any(ended.codes)


def merged(folder: Path, ranks: int) -> dict[str, Any]:
    """The samples of all ranks, in global order, and gradients and weights, which each has."""
    parts = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
    samples = {key: rows for part in parts for key, rows in part["samples"].items()}
    return {**parts[0], "samples": dict(sorted(samples.items()))}


def relative(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    assert mine.keys() == other.keys()
    pairs = [(mine[name].double(), other[name].double()) for name in mine]
    size = sum(float(b.square().sum()) for _, b in pairs)
    return (sum(float((a - b).square().sum()) for a, b in pairs) / size) ** 0.5 if size else 0.0


def named(settings: Settings) -> str:
    which = " with an adapter" * settings.lora + " in conversations" * settings.conversations
    return settings.strategy + which + " in float64" * (settings.precision == "64-true")


def check_equal(folder: Path, steps: int, others: Sequence[Settings]) -> bool:
    """Runs of several ranks against that of one."""
    one = replace(others[0], ranks=1)
    print_failure(launch(folder / "one", one, recorded))
    reference = merged(folder / "one", 1)
    passed = True
    for settings in others:
        place = folder / f"{settings.strategy}{settings.ranks}"
        if print_failure(launch(place, settings, recorded)):
            return False
        mine = merged(place, settings.ranks)
        same = mine["samples"] == reference["samples"]
        gradients = [relative(a, b) for a, b in zip(mine["gradients"], reference["gradients"], strict=True)]
        weights = relative(mine["weights"], reference["weights"])
        fine = (
            same
            and gradients[0] < FIRST_GRADIENT[settings.precision]
            and max(gradients) < GRADIENTS
            and weights < WEIGHTS
        )
        passed &= fine
        rows = sum(map(len, mine["samples"].values()))
        print(
            f"{named(settings)}, {settings.ranks} ranks against one process, {steps} optimizer steps: {rows} samples"
            f" and rewards {'equal' if same else 'DIFFERENT'}; the first gradient differs by {gradients[0]:.1e}, later"
            f" ones by up to {max(gradients):.1e}, weights by {weights:.1e}{'' if fine else '  TOO MUCH'}"
        )
    return passed


def check_failures(folder: Path, settings: Settings) -> bool:
    """Rewards that fail on one rank alone end all ranks alike; a defect of one rank ends the others."""
    rewards = launch(folder / "rewards", settings, with_failing_rewards)
    fine = all(code == 1 for code in rewards.codes) and rewards.output.count("RewardError") >= settings.ranks
    print(
        f"rewards that fail on one rank: all {settings.ranks} ended within {rewards.seconds:.1f}"
        f" s{'' if fine else f' WRONG: {rewards}'}"
    )
    defect = launch(folder / "defect", settings, with_defect)
    told = (
        all(code == 1 for code in defect.codes) and "this rank has a defect" in defect.output and LOST in defect.output
    )
    print(f"a defect of one rank: the others ended within {defect.seconds:.1f} s{'' if told else f'  WRONG: {defect}'}")
    return fine and told


def check_kills(folder: Path, settings: Settings, plans: Sequence[Kill]) -> bool:
    """A killed rank: the others end with a message, and the resumed run ends bit-identical."""
    straight = folder / "straight"
    print_failure(launch(straight, settings))
    expected, passed = end_state(straight), True
    for i, plan in enumerate(plans):
        place = folder / f"killed{i}"
        ended = launch(place, settings, plan=plan)
        told = LOST in ended.output and all(ended.codes)
        others = [code for rank, code in enumerate(ended.codes) if rank != plan.rank]
        resumed = launch(place, settings)
        different = differences(end_state(place), expected) if not any(resumed.codes) else [resumed.output[-2000:]]
        fine = ended.codes[plan.rank] == -9 and -9 not in others and told and not different
        passed &= fine
        print(
            f"{named(settings)}, rank {plan.rank} of {settings.ranks} killed, {plan.place}: the others ended within "
            f"{ended.seconds:.1f} s {'with' if told else 'WITHOUT'} a message; resumed, the end is "
            + (f"DIFFERENT in {different[:3]}" if different else "bit-identical")
            + ("" if fine else f"  WRONG: {ended.codes} {ended.output[-1500:]}")
        )
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["equal", "failures", "kills"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    load_model(PolicyConfig("tiny"))  # imports the model's code before the first fork
    steps = 8 if args.quick else 20
    worlds = [2] if args.quick else [2, 4]
    runs = [
        Settings(steps, ranks=world, strategy=strategy, dropout=0.0)
        for strategy in ("ddp", "fsdp2")
        for world in worlds
    ]
    kills = [Kill("sampling", 4, 0, 1), Kill("optimizer step", 3, 0, 0)]
    if not args.quick:
        kills += [
            Kill("scoring", 20, 0, 0),
            Kill("micro-step", 7, 0, 1),
            Kill("validation", 1, 0, 1),
            Kill("before the rename", 3, 0, 0),
        ]
    passed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.only in (None, "equal"):
            passed.append(check_equal(folder / "equal", steps, runs))
            adapters = [replace(settings, lora=True) for settings in runs if settings.strategy == "fsdp2"]
            passed.append(check_equal(folder / "adapters", steps, adapters))
            exact = [replace(each, precision="64-true") for each in runs if each.strategy == "ddp"]  # fsdp2 has none
            passed.append(check_equal(folder / "exact", steps, exact))
            # Later on the policy is sure of its answers, and its gradients are so small that float error shows.
            talking = [replace(each, steps=8, conversations=True) for each in exact]
            passed.append(check_equal(folder / "conversations", 8, talking))
        if args.only in (None, "failures"):
            passed.append(check_failures(folder / "failures", Settings(steps, ranks=2)))
        if args.only in (None, "kills"):
            passed.append(check_kills(folder / "ddp", Settings(steps, ranks=2), kills))
            passed.append(check_kills(folder / "fsdp2", Settings(steps, ranks=2, strategy="fsdp2"), kills[:2]))
            shards = Settings(steps, ranks=2, strategy="fsdp2", file_per_rank=True)
            passed.append(check_kills(folder / "shards", shards, kills[:2]))
            if not args.quick:
                passed.append(check_kills(folder / "adapter shards", replace(shards, lora=True), kills[:1]))
                adapter = Settings(steps, ranks=2, strategy="fsdp2", lora=True)
                passed.append(check_kills(folder / "adapter", adapter, kills[1:2]))
    print("passed" if all(passed) else "FAILED")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
