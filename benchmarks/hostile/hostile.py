"""A hostile world: rewards, servers, files, signals and disks that do what they should not, by seeds.

    python benchmarks/hostile/hostile.py                            all: 900 cases in forks, 100 whole processes
    python benchmarks/hostile/hostile.py --cases 90 --whole 10      some of each kind
    python benchmarks/hostile/hostile.py --only rewards:17          one case again; its files stay in --folder
    python benchmarks/hostile/hostile.py --kinds signals,disks

A case is a command line, in a folder of its own. It holds if there is no traceback but that of a user's own reward, it
ends within ten seconds beyond its time, its exit code is right, no secret is found in what it has written and printed,
in any form, no file outside the run's folder has changed, and nothing that it started runs on. Cases of one process are
forks of this one, which has imported everything, as in kill_test.py; whole processes are started as a user does. A case
that fails is printed with the command that repeats it alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no use for a pool of threads
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", WANDB_MODE="offline", CUDA_VISIBLE_DEVICES="")
sys.path.insert(1, str(Path(__file__).parents[1]))
sys.path.insert(2, str(Path(__file__).parents[2] / "tests"))

import attempt
import broken
import disks
import files
import rewards
import servers
import signals
import torch
import vllm_stub
from cases import Place, Plan

import stateset_lightning
from stateset_lightning.cli import config, convert, doctor, export, generate, report, trained
from stateset_lightning.policy import PolicyConfig, load_model

IMPORTED = (config, convert, doctor, export, generate, report, trained)
"""What commands import when they run: not again in each fork."""

KINDS = {
    "rewards": (rewards.plan, 280),
    "servers": (servers.plan, 160),
    "files": (files.plan, 260),
    "signals": (signals.plan, 110),
    "disks": (disks.plan, 90),
}
"""Each with its number of cases in forks."""


@dataclass(frozen=True)
class Case:
    """Kind and seed; of a whole process, `whole` and a seed."""

    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}"

    def plan(self, root: Path, world: Path) -> tuple[Plan, Place]:
        """The case in a folder; where a whole process cannot do what was drawn, the next draw is taken."""
        for draw in range(100):
            attempt.remove(root)
            rng = random.Random(f"{self} {draw}" if draw else str(self))
            kind = self.kind if self.kind != "whole" else rng.choices(list(KINDS), [c for _, c in KINDS.values()])[0]
            place = Place.make(root, world, rng, self.seed)
            plan = broken.plan(place) if kind == "broken" else KINDS[kind][0](place)
            if self.kind != "whole":
                return plan, place
            if kind == "signals" and plan.sent is not None:  # the moment is one of the whole process's life
                plan.inside, plan.seconds = None, rng.uniform(0.5, 9)
                plan.title = f"whole process, signalled after {plan.seconds:.2f} s: {plan.title}"
                plan.codes = (*plan.codes, -plan.sent)  # before Python's first line nothing can be done
                return plan, place
            if plan.inside is None:
                return plan, place
            if plan.listening is not None:
                plan.listening.close()
        raise AssertionError(f"{self}: nothing that a whole process can do was drawn")


@dataclass(frozen=True)
class Result:
    case: Case
    title: str
    wrong: list[str]
    seconds: float


def make_world(folder: Path) -> None:
    """What cases start from: an ordinary run, an exported model and an adapter, made by the commands themselves."""
    for name, changes in (("plain", {}), ("adapted", {"model.policy.lora": {"rank": 2}})):
        place = Place.make(folder / name, folder, random.Random(name))
        place.config(changes)
        for words in (["fit", "--config", "config.yaml"], ["export", "last", "out"]):
            if wrong := attempt.run(Plan(words, "", codes=(0,), outputs=("runs", "out")), place, False, 5.0):
                raise RuntimeError(f"an ordinary {words[0]} does not hold: {wrong}")
    (folder / "plain/work/runs").rename(folder / "run")
    (folder / "plain/work/out").rename(folder / "model")
    (folder / "adapted/work/out").rename(folder / "adapter")


def run_case(given: tuple[Case, Path, Path, float]) -> Result:
    """In a process of the pool."""
    case, folder, world, slack = given
    root, began = folder / str(case).replace(":", "-"), time.monotonic()
    title = "making the case"
    try:
        plan, place = case.plan(root, world)
        title = plan.title
        wrong = attempt.run(plan, place, case.kind == "whole", slack)
        if plan.listening is not None:
            plan.listening.close()
    except Exception:
        wrong = [f"the harness itself failed: {traceback.format_exc()[-600:]}"]
    if not wrong:
        attempt.remove(root)
    return Result(case, title, wrong, time.monotonic() - began)


def draw_cases(cases: int, whole: int, kinds: list[str], seed: int) -> list[Case]:
    """Of each kind its share."""
    total = sum(count for _, count in KINDS.values())
    drawn = [
        Case(kind, seed * 1_000_000 + number)
        for kind, (_, count) in KINDS.items()
        if kind in kinds
        for number in range(round(count * cases / total))
    ]
    drawn += [Case("whole", seed * 1_000_000 + number) for number in range(whole if "whole" in kinds else 0)]
    random.Random(seed).shuffle(drawn)  # an early look shows all kinds
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=900, help="in forks of one process")
    parser.add_argument("--whole", type=int, default=100, help="whole processes")
    parser.add_argument("--kinds", default=",".join([*KINDS, "whole"]), help="with commas between")
    parser.add_argument("--only", help="cases such as rewards:17, with commas between")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--slack", type=float, default=1.0, help="factor on all limits of time, for a busy machine")
    parser.add_argument("--folder", type=Path, help="an empty folder; the files of cases that fail stay there")
    args = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = str(Path(stateset_lightning.__file__).parents[1])  # whole processes run the same package
    warnings.filterwarnings("ignore")
    load_model(PolicyConfig("tiny"))  # imports the model's code before the first fork
    vllm_stub._model(2)
    cases = draw_cases(args.cases, args.whole, args.kinds.split(","), args.seed)
    if args.only:
        cases = [Case(kind, int(seed)) for kind, seed in (name.split(":") for name in args.only.split(","))]
    failed = []
    # not a TemporaryDirectory, which a fork would remove at its end
    folder = args.folder.absolute() if args.folder else Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        make_world(folder / "world")
        given = [(case, folder, folder / "world", args.slack) for case in cases]
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            for number, result in enumerate(pool.imap_unordered(run_case, given), start=1):
                if number % 50 == 0:
                    print(f"{number} of {len(cases)}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
                if result.wrong:
                    failed.append(result)
                    print(f"{result.case} FAILS: {result.title}", *result.wrong, sep="\n  ", flush=True)
                    command = f"python benchmarks/hostile/hostile.py --only {result.case} --folder /tmp/hostile"
                    print(f"  again: {command}", flush=True)
    finally:
        attempt.remove(folder / "world" if args.folder else folder)
    counts = Counter(case.kind for case in cases)
    print(f"{len(cases)} cases: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    end = f"{len(failed)} FAILED: {', '.join(str(result.case) for result in failed)}" if failed else "all of them hold"
    print(f"{time.monotonic() - began:.0f} s in all; {end}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
