"""Conversations whose environments wait: what a thousand of them cost, and whether sampling goes on beside them.

python benchmarks/waiting_conversations.py            all tables, about six minutes on two cores
python benchmarks/waiting_conversations.py --quick    40 conversations

First whole runs of one step with the bundled model, each in a process of its own: seconds of sampling, without those of
the same run whose environments do not wait, and peak memory beside what `stateset-lightning doctor` says of the run.
Then seconds of sampling by `model.environment.parts`, where answers take long, or some of them.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stateset_lightning.seeding import derive_seed, uniforms

GENERATIONS, TURNS, NEW_TOKENS = 8, 3, 6


class Waits:
    """Asks for one more sum each time, after some seconds.

    Args:
        seconds: That an answer takes.
        share: Of the answers that take so long; the others take none.
    """

    def __init__(self, seconds: float, share: float = 1.0) -> None:
        self.seconds, self.share = seconds, share

    def reset(self, scenario: Mapping[str, Any], seed: int) -> None:
        self.seed, self.asked = seed, 0

    def _pause(self, text: str) -> float:
        """Seconds that this answer takes: decided by what was said, so that a run repeats."""
        self.asked += 1
        drawn = uniforms([derive_seed(self.seed, f"{self.asked} {text}")], 1)[0, 0]
        return self.seconds * bool(drawn < self.share)

    def step(self, text: str) -> Any:
        time.sleep(self._pause(text))
        return "What is 5 + 9?", float("4" in text), False


class WaitsAsync(Waits):
    async def step(self, text: str) -> Any:
        await asyncio.sleep(self._pause(text))
        return "What is 5 + 9?", float("4" in text), False


def words_of(folder: Path, conversations: int, factory: str, options: dict[str, Any], more: list[str]) -> list[str]:
    """The command line of a run of one step."""
    rows = [{"prompt": f"What is {a} + {b}?", "target": str(a + b)} for a in range(1, 41) for b in range(1, 41)]
    train = folder / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    micro_steps = max(1, conversations // GENERATIONS // 25)
    values = {
        "model.policy.model_name": "tiny",
        "model.reward": '[{"class_path": "stateset_lightning.rewards.EnvironmentReward"}]',
        "model.rollout.num_generations": GENERATIONS,
        "model.rollout.max_new_tokens": NEW_TOKENS,
        "model.environment.factory": f"waiting_conversations.{factory}",
        "model.environment.options": json.dumps(options),
        "model.environment.max_turns": TURNS,
        "model.environment.max_tokens": 60,
        "data.train": train,
        "data.batch_size": conversations // GENERATIONS,
        "data.steps_per_episode": micro_steps,
        "trainer.accumulate_grad_batches": micro_steps,
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": 0,
        "trainer.enable_checkpointing": "false",
        "trainer.logger": '{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}',
        "trainer.log_every_n_steps": 1,
    }
    return [*(f"--{key}={value}" for key, value in values.items()), *more]


def run(command: str, words: list[str], folder: Path) -> tuple[str, float]:
    """What a command prints, and its peak memory in MB."""
    call = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from stateset_lightning.cli.main import main"
    )
    program = [sys.executable, "-c", f"{call}; main({[command, *words]!r})"]
    ended = subprocess.run(
        [sys.executable, __file__, "--child", *program], cwd=folder, capture_output=True, text=True, timeout=600
    )
    if ended.returncode:
        raise SystemExit(f"{command} ended with {ended.returncode}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
    printed, _, peak = ended.stdout.rpartition("peak ")
    return printed, float(peak)


def child(program: list[str]) -> None:
    """Runs a program, and then prints its peak memory."""
    code = subprocess.run(program, check=False).returncode
    print(f"\npeak {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}")
    raise SystemExit(code)


def fit(
    conversations: int, factory: str, options: dict[str, Any], *more: str, ask_doctor: bool = False
) -> tuple[float, float, float]:
    """Seconds of sampling, peak memory of the run in MB, and what doctor says of it (0 where it is not asked)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = words_of(folder, conversations, factory, options, list(more))
        told = run("doctor", words, folder)[0] if ask_doctor else ""
        _, peak = run("fit", words, folder)
        with next(folder.rglob("metrics.csv")).open() as file:
            seconds = max(float(row["time/sample_s"]) for row in csv.DictReader(file) if row.get("time/sample_s"))
    said = [float(number.replace(",", "")) for number in re.findall(r" s, ([\d,.]+) MB", told)]
    return seconds, peak, max(said, default=0.0)


def show_waiting(conversations: int, seconds: float, kinds: dict[str, str]) -> bool:
    """Whether all wait at once, in the memory that doctor names."""
    print(f"| {conversations:,} conversations of {TURNS} turns | sampling | wait of an answer | over | peak | doctor |")
    print("|---|---|---|---|---|---|")
    quiet, _, _ = fit(conversations, "WaitsAsync", {"seconds": 0.0})
    print(f"| without waiting | {quiet:.1f} s | - | - | | |", flush=True)
    holds = True
    for factory, how in kinds.items():
        took, peak, said = fit(conversations, factory, {"seconds": seconds}, ask_doctor=True)
        over = took - quiet - TURNS * seconds
        waits = f"{TURNS} x {seconds:g} s | {over:+.1f} s"
        print(f"| {how} | {took:.1f} s | {waits} | {peak:,.0f} MB | {said:,.0f} MB |", flush=True)
        holds = holds and over < max(TURNS * seconds, 5) and peak < 1.2 * said
    return holds


def show_parts(conversations: int) -> None:
    waits = {"none waits": (0.0, 1.0), "each takes 1 s": (1.0, 1.0), "1 in 20 takes 4 s": (4.0, 0.05)}
    print(f"\n| sampling of {conversations} conversations of 6 turns, by answers | {' | '.join(waits)} |")
    print("|---|---|---|---|")
    for parts in (1, 2, 4):
        words = [f"--model.environment.{key}" for key in (f"parts={parts}", "max_turns=6", "max_tokens=100")]
        options = [{"seconds": seconds, "share": share} for seconds, share in waits.values()]
        took = [fit(conversations, "Waits", each, *words)[0] for each in options]
        print(f"| `parts: {parts}` | {' | '.join(f'{seconds:.1f} s' for seconds in took)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    if "--child" in sys.argv[1:2]:
        child(sys.argv[2:])
    if parser.parse_args().quick:
        raise SystemExit(not show_waiting(40, 0.5, {"WaitsAsync": "async"}))
    holds = show_waiting(1000, 10.0, {"WaitsAsync": "async", "Waits": "threads"})
    show_parts(256)
    raise SystemExit(not holds)


if __name__ == "__main__":
    main()
