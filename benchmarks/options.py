"""What an option changes: time per optimizer step, peak memory, size of a checkpoint, each beside the defaults.

    python benchmarks/options.py [--rounds 1] [--sides NAME ...]

Qwen2 of 31.7M parameters, 2 prompts x 8 completions of 256 / 64 tokens, float32, AdamW, no reference. Each measurement
is a process of its own (peak memory is the process's); the sides alternate; the table shows medians over steps and
rounds. LoRA is of rank 16. Half precision takes minutes per step on a CPU without arithmetic for it, and is left out
there unless it is named.
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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from workload import NUM_GENERATIONS, NUM_PROMPTS, Case, make_prompts, save_workload, score

from stateset_lightning.policy.precision import has_bfloat16_products

LORA = {"rank": 16, "alpha": 32}
SIDES: dict[str, dict[str, dict[str, Any]]] = {
    "defaults": {},
    "steps_per_episode 4": {"data": {"steps_per_episode": 4}, "trainer": {"accumulate_grad_batches": 4}},
    "gradient_checkpointing": {"policy": {"gradient_checkpointing": True}},
    "scoring padded": {"policy": {"scoring": "padded"}},
    "max_batch_rows 4": {"rollout": {"max_batch_rows": 4}},
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "bf16-true": {"trainer": {"precision": "bf16-true"}},
    "reference": {"algorithm": {"beta": 0.04}},
    "LoRA": {"policy": {"lora": LORA}},
    "LoRA, reference": {"policy": {"lora": LORA}, "algorithm": {"beta": 0.04}},
    # samples with the adapter beside its matrices, not added into copies of them
    "LoRA, not merged": {"policy": {"lora": LORA}},
}
CASE = Case(256, 64)
WARMUP_STEPS, STEPS = 1, 3
THREADS = 2
COLUMNS = {
    "step": "step s",
    "sample": "sample s",
    "train": "train s",
    "peak": "peak MB",
    "weights": "trained weights",
    "ckpt": "checkpoint MB",
}


def work(side: str, folder: Path) -> None:
    """One measurement; prints its result as the last line."""
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything

    from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
    from stateset_lightning.algorithm import GRPO
    from stateset_lightning.policy import LoRAConfig, Policy, PolicyConfig

    class Clock(Callback):
        def __init__(self) -> None:
            self.rows: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.rows.append(dict(module.metrics.last))

    torch.set_num_threads(THREADS)
    seed_everything(0, verbose=False)
    options = SIDES[side]
    policy = dict(options.get("policy", {}))
    if "lora" in policy:
        policy["lora"] = LoRAConfig(**policy["lora"])
    if "not merged" in side:
        Policy.merged_adapter = lambda self: nullcontext()  # type: ignore[method-assign]
    is_fused = "mixed" not in side  # Lightning clips no gradients of a fused optimizer under mixed precision
    module = GRPOLightningModule(
        PolicyConfig(str(folder), **policy),
        reward=lambda turns, context: score(turns[-1].content),
        rollout=RolloutConfig(
            num_generations=NUM_GENERATIONS, max_new_tokens=CASE.completion_tokens, **options.get("rollout", {})
        ),
        algorithm=GRPO(**{"beta": 0.0, **options.get("algorithm", {})}),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=is_fused),
    )
    clock, steps = Clock(), WARMUP_STEPS + STEPS
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        callbacks=[clock],
        **quiet,
        **options.get("trainer", {}),
    )
    rows = [{"prompt": prompt} for prompt in make_prompts(CASE, NUM_PROMPTS * steps)]
    data = ScenarioDataModule(train=rows, batch_size=NUM_PROMPTS, use_chat_template=False, **options.get("data", {}))
    trainer.fit(module, datamodule=data)
    result: dict[str, float] = {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    for key, name in {"step": "time/step_s", "sample": "time/sample_s", "train": "time/train_s"}.items():
        measured = [row[name] for row in clock.rows if name in row]
        result[key] = statistics.median(measured[-STEPS:])
    trainer.save_checkpoint(folder / "end.ckpt")
    result["ckpt"] = (folder / "end.ckpt").stat().st_size / 2**20
    result["weights"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    print(json.dumps(result))


def measure(side: str, folder: Path) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, __file__, "--side", side, "--folder", str(folder)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if run.returncode:
        raise RuntimeError(f"{side} failed:\n{run.stderr[-3000:]}")
    result: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    print(side, result, file=sys.stderr, flush=True)  # a table comes only when all is measured
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="*", choices=list(SIDES))
    parser.add_argument("--side", choices=list(SIDES), help="measure one side, in this process")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side:
        work(options.side, options.folder)
        return
    sides = options.sides or [side for side in SIDES if has_bfloat16_products() or "bf16" not in side]
    with tempfile.TemporaryDirectory() as name:
        save_workload(Path(name), CASE)
        rounds = [{side: measure(side, Path(name)) for side in sides} for _ in range(options.rounds)]
    print(f"| | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for side in sides:
        values = {key: statistics.median(results[side][key] for results in rounds) for key in COLUMNS}
        seconds = " | ".join(f"{values[key]:.2f}" for key in ("step", "sample", "train"))
        print(
            f"| {side} | {seconds} | {values['peak']:.0f} | {values['weights']:,.0f} | {values['ckpt']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
