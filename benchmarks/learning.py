"""How a real chat model learns: held-out accuracy against samples, CPU time and wall time; and TRL on the same task.

    python benchmarks/learning.py --banking77 FILE [--only PATTERN ...] [--seeds 1 2 3] [--trl] [--picture FILE]

The model is SmolLM2-135M-Instruct from the package index, the messages are Banking77's (the authors' train.csv). Each
run is a process of its own; a curve that is finished stands in FOLDER/results.jsonl and is not made again, and a run
that was stopped goes on from its last checkpoint: the command goes on where it was. What `--only` names is made, by
parts of names (`--only six 'warm start'`), and before it what it starts from; by default all of it, which takes days.

- `six`: six intents; GRPO and MaxRL, all weights and LoRA, three seeds; Dr. GRPO, DAPO and RLOO, one seed.
- `all`: the same on all 77 intents, after 4 CPU minutes of supervised steps on 1,500 labelled messages: the model
  itself never samples a right answer, so there is nothing to learn from.
- `parts`: six intents, with a reward of two parts: the answer, and its form, which every other example in the prompt
  has.
- `warm start`: all 77 intents, 1,500 labelled messages, the others checkable only. Supervised steps and GRPO after
  them, against either alone, at equal CPU time.
- `distilled`: a third of the trained model's layers, warm-started, learns from it, by the tokens that it sampled or
  (GKD) by whole distributions; against supervised training on the same prompts.
- `--trl`: 20 steps of TRL's GRPOTrainer and of ours, at equal hyperparameters, in one run. TRL runs in its fastest
  honest setting here: all 64 completions in one generation and one backward pass, no reference, no gradient
  checkpointing, float32, fused AdamW; the line end, our stop string, is its end of sequence.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "examples" / "small_chat_model"
sys.path += [str(EXAMPLE), str(REPOSITORY / "examples" / "intent_classification")]

ALGORITHM = "stateset_lightning.algorithm."
STEPS, SAMPLES_PER_STEP = 80, 64
WARM_CPU_MINUTES, CPU_MINUTES = 4, 12  # of the supervised start; of each side of that comparison
TRL_STEPS = 20
LORA = {"model": {"policy": {"lora": {"rank": 16, "alpha": 32, "target_modules": "all-linear"}}}}
RATE = 1e-5  # constant, in all comparisons
LORA_RATE = 1e-4  # ten times that of all weights
# Ten times as much has `OnPolicyDistillation` push the student's answers away faster than it finds better ones.
RATES = {"Supervised": 5e-5, "OnPolicyDistillation": 5e-6, "GKD": 5e-5}
WHOLE_BATCHES = {"data": {"batch_size": 32}}  # of steps with one or two completions per prompt


def nested(**keys: Any) -> dict[str, Any]:
    """`nested(data__batch_size=8)` is {"data": {"batch_size": 8}}."""
    config: dict[str, Any] = {}
    for key, value in keys.items():
        *path, last = key.split("__")
        place = config
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return config


ALL_INTENTS = nested(
    data__fields={"target": "intent"},
    data__use_chat_template=False,
    data__prompt_template="Which topic does this message to a bank have?\n\n{{ message }}\nTopic:",
    data__train="checkable.jsonl",
    data__validation="held_out.jsonl",
    data__eval_batch_size=64,  # 769 messages, five times
    model__rollout__max_new_tokens=16,
    model__rollout__num_generations=8,
    model__rollout__stop=["\n"],
)
AS_THE_TEACHER = nested(data__row="learning.six_targets")
PLAIN_EXAMPLES = yaml.safe_load((EXAMPLE / "banking77.yaml").read_text(encoding="utf-8"))["data"]["prompt_template"]
# Every other `Topic: delivery` becomes `Topic: [delivery]`.
FORM = nested(
    data__prompt_template=re.sub(r"Topic: (\w+)((?:.*\n)+?.*)(Topic: \w+)", r"Topic: [\1]\2\3", PLAIN_EXAMPLES),
    model__reward=[
        {"class_path": "stateset_lightning.rewards.Contains"},
        {"class_path": "stateset_lightning.rewards.FormatReward", "init_args": {"pattern": r"\[\w+\]", "weight": 0.5}},
    ],
    model__evaluation__solved_by="contains",
    model__rollout__max_new_tokens=8,
)


@dataclass(frozen=True)
class Run:
    """One curve.

    Args:
        name: What the table calls it; its first word is the task.
        seed: Of order and sampling.
        configs: Overlays on the example's config: mappings, or files.
        algorithm: By its name in `stateset_lightning.algorithm`.
        options: Its init_args.
        start: The name of the run whose exported model it starts from; `student` for a third of the layers of the
            trained model; None for the model of the package.
        cpu_minutes: Training ends after so much CPU time instead of `STEPS` steps.
        teacher: The name of the run whose exported model is the teacher.
    """

    name: str
    seed: int
    configs: tuple[Any, ...]
    algorithm: str
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    cpu_minutes: float | None = None
    teacher: str | None = None

    @property
    def folder_name(self) -> str:
        return f"{self.name} {self.seed}".replace(" ", "_").replace(".", "")


def all_runs(seeds: list[int]) -> Iterator[Run]:
    """Every curve, in an order in which each comes after the one that it starts from."""
    six = (EXAMPLE / "banking77.yaml",)
    labelled = (ALL_INTENTS, WHOLE_BATCHES, nested(data__train="labelled.jsonl"))
    start, rest = f"warm start {WARM_CPU_MINUTES} min", CPU_MINUTES - WARM_CPU_MINUTES
    for seed in seeds:
        yield Run(start, seed, labelled, "Supervised", cpu_minutes=WARM_CPU_MINUTES)
        for task, configs, begin in (("six", six, None), ("all", (ALL_INTENTS,), start)):
            for name in ("GRPO", "MaxRL"):
                yield Run(f"{task} {name}", seed, configs, name, start=begin)
                yield Run(f"{task} {name} LoRA", seed, (*configs, LORA), name, start=begin)
            if seed == seeds[0]:
                for name in ("DrGRPO", "DAPO", "RLOO"):
                    yield Run(f"{task} {name}", seed, configs, name, start=begin)
        for name in ("GRPO", "GDPO"):
            yield Run(f"parts {name}", seed, (*six, FORM), name)
        yield Run("warm start, then MaxRL", seed, (ALL_INTENTS,), "MaxRL", start=start, cpu_minutes=rest)
        yield Run("warm start for all the time", seed, labelled, "Supervised", cpu_minutes=CPU_MINUTES)
        yield Run("warm start: none, MaxRL alone", seed, (ALL_INTENTS,), "MaxRL", cpu_minutes=CPU_MINUTES)
        student, targets = "distilled: the student's start", (*six, WHOLE_BATCHES, AS_THE_TEACHER)
        yield Run(student, seed, targets, "Supervised", start="student", cpu_minutes=WARM_CPU_MINUTES)
        of_six = {"start": student, "cpu_minutes": CPU_MINUTES}
        many = (*six, WHOLE_BATCHES, nested(model__rollout__num_generations=2))  # 64 samples, of 32 messages
        yield Run("distilled", seed, many, "OnPolicyDistillation", teacher="six GRPO", **of_six)
        # Forward KL: where the student is sure of what is wrong, other divergences have next to no gradient.
        yield Run("distilled: GKD", seed, many, "GKD", {"jsd_beta": 0.0}, teacher="six GRPO", **of_six)
        yield Run("distilled: supervised instead", seed, targets, "Supervised", **of_six)


def with_starts(runs: list[Run], chosen: list[Run]) -> list[Run]:
    """The chosen runs and those that they start from or learn from, in order."""
    needed = {(run.name, run.seed) for run in chosen}
    for run in reversed(runs):
        if (run.name, run.seed) in needed:
            needed |= {(run.start, run.seed), (run.teacher, run.seed)}
    return [run for run in runs if (run.name, run.seed) in needed]


def six_targets(row: dict[str, str]) -> dict[str, str] | None:
    """The six intents with targets as a teacher writes them, between `Topic:` and the next line."""
    from banking77 import six_intents

    found = six_intents(row)
    return found and {**found, "target": f" {found['target']}\n"}


# One run, in a process of its own -------------------------------------------------------------------------------------


class Clock(Callback):
    """CPU and wall seconds of training, without validations, over all tries; and the end of a run by CPU time."""

    def __init__(self, cpu_minutes: float | None = None) -> None:
        self.cpu_minutes = cpu_minutes
        self.rows: list[dict[str, float]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.begun = time.process_time(), time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        cpu, wall = time.process_time() - self.begun[0], time.perf_counter() - self.begun[1]
        before = self.rows[-1] if self.rows else {"cpu_s": 0.0, "wall_s": 0.0}
        now = {"cpu_s": before["cpu_s"] + cpu, "wall_s": before["wall_s"] + wall}
        self.rows.append({"step": trainer.global_step, **now})
        if self.cpu_minutes is not None and now["cpu_s"] >= 60 * self.cpu_minutes:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


def clock_of(trainer: Trainer) -> Any:
    """The run's clock, whose class is that of this file as a module, and not as the program."""
    return next(callback for callback in trainer.callbacks if type(callback).__name__ == "Clock")


def configured(run: Run, folder: Path, model: str, data: Path) -> list[str]:
    """The flags of `fit`, with the overlays written into the run's folder."""
    files = [EXAMPLE / "config.yaml"]
    limit = {"max_steps": STEPS} if run.cpu_minutes is None else {"max_steps": 100_000}
    rate = LORA_RATE if LORA in run.configs else RATES.get(run.algorithm, RATE)
    last = nested(
        seed_everything=run.seed,
        model__policy__model_name=model,
        model__algorithm={"class_path": ALGORITHM + run.algorithm, "init_args": run.options},
        model__optimizer__init_args__lr=rate,
        model__lr_scheduler__decay="constant",
        trainer__val_check_interval=20 if run.cpu_minutes is None else 100_000,  # else at the end alone
        trainer__logger__init_args={"save_dir": str(folder), "name": "run"},
        trainer__callbacks=[
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 10, "save_top_k": 0, "save_last": True},
            },
            {"class_path": "learning.Clock", "init_args": {"cpu_minutes": run.cpu_minutes}},
        ],
    )
    last["trainer"].update(limit, enable_progress_bar=False)
    for n, config in enumerate((*run.configs, last)):
        if isinstance(config, dict):
            file = folder / f"overlay_{n}.yaml"
            file.write_text(yaml.safe_dump(_placed(config, data)), encoding="utf-8")
            config = file
        files.append(config)
    return [f"--config={file}" for file in files]


def _placed(config: dict[str, Any], data: Path) -> dict[str, Any]:
    """The config with the names of files made paths."""
    place = {name: str(data / value) for name, value in config.get("data", {}).items() if str(value).endswith(".jsonl")}
    return {**config, "data": {**config["data"], **place}} if place else config


def make(run: Run, folder: Path, model: str, data: Path, banking77: str) -> dict[str, Any]:
    """Trains, or goes on; exports the model, from which another run may start; returns the row of the results."""
    from stateset_lightning.cli.main import main as command_line

    place = folder / run.folder_name
    place.mkdir(parents=True, exist_ok=True)
    flags = configured(run, place, model, data)
    if any(isinstance(config, Path) for config in run.configs):
        flags.append(f"--data.train={banking77}")
    if run.teacher is not None:
        flags.append(f"--model.teacher={exported_of(run.teacher, run, folder)}")
    cli = command_line(["fit", *flags, "--ckpt_path=last"])
    assert cli is not None
    clock = clock_of(cli.trainer)
    table = max(place.glob("run/version_*/metrics.csv"), key=lambda file: file.stat().st_mtime_ns)
    with table.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    exported = place / "exported"
    if not exported.exists():
        merge = ["--merge"] if LORA in run.configs else []
        command_line(["export", str(table.parent), str(exported), *merge])
    times = {row["step"]: row for row in clock.rows}
    curve = [
        {
            "step": int(row["step"]),
            "solved": float(row["val/solved"]),
            **{
                name: round(times[int(row["step"])][name], 1) if int(row["step"]) else 0.0
                for name in ("cpu_s", "wall_s")
            },
        }
        for row in rows
        if row.get("val/solved")
    ]
    return {
        "name": run.name,
        "seed": run.seed,
        "curve": curve,
        "train_reward": [float(row["train/reward"]) for row in rows if row.get("train/reward")],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def model_of(run: Run, folder: Path) -> str:
    """The folder that a run starts from, made if it is not there."""
    from make_model import make_model

    base = folder / "model"
    if not base.exists():
        make_model(base)
    if run.start == "student":
        if not (folder / "student").exists():
            make_student(folder / "student", base)
        return str(folder / "student")
    if run.start is not None:
        return exported_of(run.start, run, folder)
    return str(base)


def exported_of(name: str, run: Run, folder: Path) -> str:
    """The exported model of another run with the seed of this one."""
    return str(folder / Run(name, run.seed, (), "").folder_name / "exported")


def make_student(student: Path, base: Path) -> None:
    """Every third layer of the model, with its embeddings and head."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stateset_lightning.files import atomic_folder

    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers = torch.nn.ModuleList(model.model.layers[::3])
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.layer_types = None
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = n
    with atomic_folder(student) as unfinished:
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(base).save_pretrained(unfinished)


def write_messages(data: Path, banking77: str) -> None:
    """Banking77 in three parts: 15% labelled, 10 messages of each intent held out, the others checkable only."""
    from messages import read_messages, split_messages

    if (data / "held_out.jsonl").exists():
        return
    split = split_messages(read_messages(Path(banking77)), labelled=0.15, held_out=0.077)
    data.mkdir(parents=True, exist_ok=True)
    for name in ("labelled", "checkable", "held_out"):
        rows = ({"message": m.text, "intent": m.intent.replace("_", " ").strip("?")} for m in getattr(split, name))
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# TRL ------------------------------------------------------------------------------------------------------------------


def run_trl(folder: Path, model: str, banking77: str, seed: int) -> None:
    """The task `six` in TRL's words. Prints its row as the last line."""
    from banking77 import six_intents
    from compare_trl import StepTimes, trl_clock
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from workload import TRL_SETTINGS

    from stateset_lightning.rewards import ExactMatch
    from stateset_lightning.types import Turn

    names = "config.yaml", "banking77.yaml"
    config, task = (yaml.safe_load((EXAMPLE / name).read_text(encoding="utf-8")) for name in names)
    template = task["data"]["prompt_template"]
    with Path(banking77).open(encoding="utf-8", newline="") as lines:
        messages = [message for row in csv.DictReader(lines) if (message := six_intents(row))]
    rows = [
        {"prompt": template.replace("{{ message }}", m["message"]).strip(), "target": m["target"]} for m in messages
    ]
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer("\n")["input_ids"][0])
    exact, times = ExactMatch(ignore_case=True), StepTimes()
    clock = trl_clock(times)

    def reward(completions: list[str], target: list[str], **columns: Any) -> list[float]:
        answered = zip(completions, target, strict=True)
        return [exact.compute_reward([Turn("assistant", text)], {"target": t}).score for text, t in answered]

    rollout, data = config["model"]["rollout"] | task["model"]["rollout"], config["data"]
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            seed=seed,
            max_steps=TRL_STEPS,
            per_device_train_batch_size=data["batch_size"] * rollout["num_generations"],
            num_generations=rollout["num_generations"],
            max_completion_length=rollout["max_new_tokens"],
            temperature=rollout["temperature"],
            top_k=0,
            learning_rate=RATE,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=config["model"]["lr_scheduler"]["warmup_steps"],
            weight_decay=0.0,
            max_grad_norm=config["trainer"]["gradient_clip_val"],
            optim="adamw_torch_fused",
            logging_steps=1,
            **TRL_SETTINGS,
        ),
    )
    trainer.train()
    wall, cpu = zip(*times.rows, strict=True)
    print_row(cpu, wall, [row["reward"] for row in clock.rows])


def run_ours(folder: Path, model: str, banking77: str, seed: int) -> None:
    """The same by the example's config. Prints its row as the last line."""
    from stateset_lightning.cli.main import main as command_line

    flags = {
        "seed_everything": seed,
        "baseline": "false",
        "model.policy.model_name": model,
        "data.train": banking77,
        "model.optimizer.init_args.lr": RATE,
        "model.lr_scheduler.decay": "constant",
        "trainer.max_steps": TRL_STEPS,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.init_args.save_dir": folder / f"ours_{time.time_ns()}",
    }
    callbacks = [{"class_path": "learning.Clock"}]
    configs = [f"--config={EXAMPLE / name}" for name in ("config.yaml", "banking77.yaml")]
    flags["trainer.callbacks"] = json.dumps(callbacks)
    cli = command_line(["fit", *configs, *(f"--{name}={value}" for name, value in flags.items())])
    assert cli is not None
    clock = clock_of(cli.trainer)
    (table,) = Path(str(flags["trainer.logger.init_args.save_dir"])).rglob("metrics.csv")
    with table.open(encoding="utf-8", newline="") as lines:
        rewards = [float(row["train/reward"]) for row in csv.DictReader(lines) if row.get("train/reward")]
    sums = [(0.0, 0.0), *((row["cpu_s"], row["wall_s"]) for row in clock.rows)]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(sums)]
    print_row(*zip(*steps, strict=True), rewards)


def print_row(cpu_s: Any, wall_s: Any, rewards: list[float]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_s": list(cpu_s), "wall_s": list(wall_s), "rewards": rewards, "peak_mb": peak}))


def compare_with_trl(options: argparse.Namespace, model: str) -> None:
    """Both sides, one after the other; a row each, and the ratios."""
    results: dict[str, dict[str, Any]] = {}
    for side, python in (("ours", sys.executable), ("trl", options.trl_python)):
        words = [python, __file__, "--banking77", options.banking77, "--folder", str(options.folder), "--side", side]
        run = subprocess.run([*words, "--model", model], capture_output=True, text=True, env=environment())
        if run.returncode:
            raise RuntimeError(f"{side} failed:\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}")
        results[side] = json.loads(run.stdout.strip().splitlines()[-1])
        (options.folder / f"{side}.json").write_text(json.dumps(results[side]), encoding="utf-8")
    print(f"| {TRL_STEPS} steps of 64 samples | mean reward | of the last 5 | CPU s per step | s per step | peak MB |")
    print("|---|---|---|---|---|---|")
    for side, result in results.items():
        mean, last = statistics.mean(result["rewards"]), statistics.mean(result["rewards"][-5:])
        cpu, wall = (statistics.median(result[name][1:]) for name in ("cpu_s", "wall_s"))
        print(f"| {side} | {mean:.3f} | {last:.3f} | {cpu:.1f} | {wall:.1f} | {result['peak_mb']:.0f} |")


# All of it ------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    paths = [str(Path(__file__).parent), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def read_results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def print_table(results: list[dict[str, Any]]) -> None:
    """Means over seeds, with their standard deviation."""
    print("| run | seeds | steps | before | after | sd | CPU min | minutes |\n|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["name"] for row in results):
        rows = [row for row in results if row["name"] == name]
        after = [row["curve"][-1]["solved"] for row in rows]
        sd = f"{statistics.stdev(after):.3f}" if len(rows) > 1 else "-"
        before, steps, cpu, wall = (
            statistics.mean(row["curve"][place][key] for row in rows)
            for place, key in ((0, "solved"), (-1, "step"), (-1, "cpu_s"), (-1, "wall_s"))
        )
        print(
            f"| {name} | {len(rows)} | {steps:.0f} | {before:.3f} | {statistics.mean(after):.3f} | {sd}"
            f" | {cpu / 60:.1f} | {wall / 60:.1f} |"
        )


def draw(results: list[dict[str, Any]], picture: Path) -> None:
    """Held-out accuracy against samples, a panel per task; a line per seed. Needs matplotlib."""
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row["name"].split()[0] for row in results))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        rows = [row for row in results if row["name"].split()[0] == task]
        names = list(dict.fromkeys(row["name"] for row in rows))
        for row in rows:
            samples = [SAMPLES_PER_STEP * point["step"] for point in row["curve"]]
            label = row["name"] if row is next(r for r in rows if r["name"] == row["name"]) else None
            solved = [point["solved"] for point in row["curve"]]
            axis.plot(samples, solved, label=label, color=f"C{names.index(row['name'])}")
        axis.set(title=task, xlabel="samples", ylabel="held-out accuracy, greedy")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--banking77", required=True, help="the authors' train.csv")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of runs")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "learning")
    parser.add_argument("--trl", action="store_true", help="compare with TRL instead")
    parser.add_argument("--trl-python", default=sys.executable, help="the interpreter of an environment that has TRL")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")
    parser.add_argument("--side", choices=["ours", "trl"], help="measure one side, in this process")
    parser.add_argument("--model", help="of that side")
    parser.add_argument("--run", help="make one curve, in this process")
    options = parser.parse_args()
    options.folder, options.banking77 = options.folder.absolute(), str(Path(options.banking77).absolute())
    os.chdir(REPOSITORY)
    if options.side:
        side = run_ours if options.side == "ours" else run_trl
        return side(options.folder, options.model, options.banking77, options.seeds[0])
    runs = list(all_runs(options.seeds))
    if options.run:
        run = next(run for run in runs if run.folder_name == options.run)
        row = make(run, options.folder, model_of(run, options.folder), options.folder / "messages", options.banking77)
        with (options.folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return None
    write_messages(options.folder / "messages", options.banking77)
    if options.trl:
        return compare_with_trl(options, model_of(Run("", 0, (), ""), options.folder))
    done = {(row["name"], row["seed"]) for row in read_results(options.folder / "results.jsonl")}
    chosen = [run for run in runs if any(part in run.name for part in options.only)]
    for run in with_starts(runs, chosen):
        if (run.name, run.seed) not in done:
            print(f"{run.name}, seed {run.seed}", flush=True)
            words = [sys.executable, __file__, f"--run={run.folder_name}", f"--folder={options.folder}"]
            words += [f"--banking77={options.banking77}", "--seeds", *map(str, options.seeds)]
            subprocess.run(words, check=True, env=environment())
    results = read_results(options.folder / "results.jsonl")
    print_table(results)
    if options.picture:
        draw(results, options.picture)
    return None


if __name__ == "__main__":
    main()
