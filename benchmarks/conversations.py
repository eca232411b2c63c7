"""Conversations with a tool against TRL's GRPOTrainer: rewards, time per step and peak memory of the process.

    python benchmarks/conversations.py [--tasks tools class] [--steps 20] [--rounds 1] [--trl-python PATH]

Task and model are those of `examples/calculator`, which `scripts/make_tool_model.py` made: products, which the model
can get right by calling `multiply` alone. `tools` gives both sides that function; `class` gives both the same class,
written for TRL's `environment_factory`, which has the tool and scores itself. Model, template, prompts and
hyperparameters are the same, and so is what reads calls: the tokenizer's `response_template`, without which TRL does
not. Each side has its own noise and its own order of the prompts. Each measurement is a process of its own, and TRL
runs in its fastest honest setting here (`workload.TRL_SETTINGS`), all completions of a step in one generation and one
backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from compare_trl import StepTimes, trl_clock
from make_tool_model import multiply
from workload import TRL_SETTINGS

EXAMPLE = Path(__file__).parents[1] / "examples" / "calculator"
NUM_PROMPTS, NUM_GENERATIONS = 16, 8
MAX_TOKENS = 64  # of a turn; on both sides another one begins only where no more than these came before it
MAX_TURNS = 3
LEARNING_RATE = 3e-4
THREADS = 1  # the model has half a million parameters

# TRL takes templates that write calls which stand in a turn of their own, and reads calls by a `response_template`.
CALLS_IN_TEMPLATE = (
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>", "content": "text"},
    },
}


class Calculator:
    """A calculator as TRL's `environment_factory` takes it: the model is right if it asked for the right product."""

    def reset(self, **columns: Any) -> None:
        self.target, self.was_right = columns["target"], False

    def multiply(self, a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.was_right |= str(a * b) == self.target
        return a * b

    def get_reward(self) -> float:
        return float(self.was_right)


def score(answer: str, target: str) -> float:
    """Whether the last turn says the product."""
    return float(answer.strip() == f"It is {target}")


def save_model(source: Path, folder: Path) -> None:
    """The model, with a tokenizer whose calls both sides can read and write."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True)
    for file in (source / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = "{{ message['content'] }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(content, content + CALLS_IN_TEMPLATE)
    tokenizer.response_template = RESPONSE_TEMPLATE
    tokenizer.save_pretrained(folder)


# One measurement, in a process of its own -----------------------------------------------------------------------------


def run_ours(folder: Path, rows: list[dict[str, str]], task: str, steps: int, seed: int) -> dict[str, Any]:
    """Rewards, calls per sample, and times of each optimizer step, sampling included."""
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything

    from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
    from stateset_lightning.algorithm import GRPO
    from stateset_lightning.environments import EnvironmentConfig, Tools
    from stateset_lightning.rewards import EnvironmentReward

    times, logged = StepTimes(), []

    class Clock(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            times.start()

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            times.stop()
            logged.append([module.metrics.last.get(name, 0.0) for name in ("train/reward", "conversation/tool_calls")])

    def reward(turns: Any, context: Any) -> float:
        return score(turns[-1].content, context["target"])

    seed_everything(seed, verbose=False)
    options: dict[str, Any] = {"factory": Tools, "options": {"functions": [multiply]}}
    if task == "class":
        options = {"factory": Calculator}
    module = GRPOLightningModule(
        str(folder),
        reward=EnvironmentReward() if task == "class" else reward,
        # As TRL does, which drops a tool's answer that leads beyond `max_completion_length`: here each turn has room
        # for MAX_TOKENS of its own, there all turns together.
        environment=EnvironmentConfig(**options, max_turns=MAX_TURNS, max_tokens=2 * MAX_TOKENS),
        rollout=RolloutConfig(num_generations=NUM_GENERATIONS, max_new_tokens=MAX_TOKENS),
        algorithm=GRPO(beta=0.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
    )
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        callbacks=[Clock()],
        logger=False,
        **quiet,
    )
    trainer.fit(module, datamodule=ScenarioDataModule(train=rows, batch_size=NUM_PROMPTS))
    return result(times, logged)


def run_trl(folder: Path, rows: list[dict[str, str]], task: str, steps: int, seed: int) -> dict[str, Any]:
    """The same for TRL."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    times = StepTimes()
    clock = trl_clock(times)

    def reward(completions: list[Any], target: list[str], **columns: Any) -> list[float]:
        return [score(turns[-1]["content"], right) for turns, right in zip(completions, target, strict=True)]

    options: dict[str, Any] = {"tools": [multiply], "reward_funcs": reward}
    if task == "class":
        options = {"environment_factory": Calculator}
    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}], "target": row["target"]} for row in rows]
    trainer = GRPOTrainer(
        model=str(folder),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        train_dataset=Dataset.from_list(prompts),
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=NUM_PROMPTS * NUM_GENERATIONS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=MAX_TOKENS,
            max_tool_calling_iterations=MAX_TURNS - 1,
            temperature=1.0,
            top_k=0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            logging_steps=1,
            **TRL_SETTINGS,
        ),
        **options,
    )
    trainer.train()
    return result(times, [[row["reward"], row["tools/call_frequency"]] for row in clock.rows])


def result(times: StepTimes, logged: list[Any]) -> dict[str, Any]:
    """Lists of a number per step, and the peak of memory in MB."""
    wall, cpu = zip(*times.rows, strict=True)
    rewards, calls = zip(*logged, strict=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rewards": rewards, "calls": calls, "cpu_s": cpu, "wall_s": wall, "peak_mb": peak}


# All of them ----------------------------------------------------------------------------------------------------------


def measure(side: str, python: str, folder: Path, options: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    """One measurement; its process prints the result as the last line."""
    words = [python, __file__, "--side", side, "--model", str(folder), "--folder", str(options.folder)]
    words += ["--tasks", task, "--steps", str(options.steps), "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(words, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{side} failed:\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def print_table(task: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """A row for each run, and the ratio of CPU seconds; the first step is left out of the times."""
    print(
        f"\n| {task}, seed | mean reward | first 5 steps | last 5 | calls per sample, last 5 | CPU s per step"
        " | s per step | peak MB |\n|---|---|---|---|---|---|---|---|"
    )
    mean = statistics.mean
    for side, runs in results.items():
        for seed, run in enumerate(runs, 1):
            rewards = run["rewards"]
            cells = [f"{mean(values):.3f}" for values in (rewards, rewards[:5], rewards[-5:], run["calls"][-5:])]
            cells += [f"{statistics.median(run[name][1:]):.2f}" for name in ("cpu_s", "wall_s")]
            print(f"| {side}, {seed} | {' | '.join(cells)} | {run['peak_mb']:.0f} |")
    cpu = {side: statistics.median(t for run in runs for t in run["cpu_s"][1:]) for side, runs in results.items()}
    if len(cpu) == 2:
        print(f"CPU seconds per step: TRL / ours = {cpu['trl'] / cpu['ours']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=EXAMPLE, help="model and train.jsonl of scripts/make_tool_model.py"
    )
    parser.add_argument("--tasks", nargs="+", choices=["tools", "class"], default=["tools", "class"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1, help="seeds of each side")
    parser.add_argument("--sides", nargs="+", choices=["trl", "ours"], default=["trl", "ours"])
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--side", choices=["trl", "ours"], help="measure one side of one task, in this process")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.side:
        import torch

        torch.set_num_threads(THREADS)
        rows = [json.loads(line) for line in (options.folder / "train.jsonl").read_text().splitlines()]
        run = run_ours if options.side == "ours" else run_trl
        print(json.dumps(run(options.model, rows, options.tasks[0], options.steps, options.seed)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        save_model(options.folder, model)
        for task in options.tasks:
            results: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
            for seed in range(1, options.rounds + 1):
                for side, runs in results.items():
                    python = options.trl_python if side == "trl" else sys.executable
                    runs.append(measure(side, python, model, options, task, seed))
            print_table(task, results)


if __name__ == "__main__":
    main()
