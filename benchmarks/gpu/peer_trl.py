"""TRL's GRPOTrainer on the same card, model, prompts and reward as `speed.py --parts step`; skipped without TRL.

    python peer_trl.py FOLDER [--shapes 64x8:512/512 ...] [--sampler vllm] [--checkpointing] [--cudnn]

FOLDER is that of the model that speed.py wrote. Its fastest honest setting: no reference, no gradient checkpointing,
fused AdamW, TF32 beside bfloat16; it is sampled by vLLM in this process where that is installed, else by transformers'
`generate`. An episode is one generation, unless memory does not suffice; 16 rows at a time are trained, or what fits.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workload
from harness import IS_GPU, check, exit_status, peak_gib, record, reset_peak, sync
from speed import DEFAULT_SHAPES, Shape

HAS_VLLM = IS_GPU and importlib.util.find_spec("vllm") is not None
SAMPLERS: dict[str, dict[str, Any]] = {
    "vllm": {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3},
    "generate": {},
    "continuous": {"use_transformers_continuous_batching": True},
}


def whole_steps(options: argparse.Namespace, shape: Shape, name: str) -> str:
    """Seconds of each optimizer step; where memory does not suffice, with half the rows in sampling and training."""
    rows = math.gcd(options.per_device, shape.prompts * shape.group)
    while True:
        try:
            with tempfile.TemporaryDirectory() as output:
                return steps_of(options, shape, name, output, rows)
        except torch.cuda.OutOfMemoryError:
            if rows <= options.per_device // 4 or rows % 2:
                raise
        rows //= 2
        gc.collect()
        torch.cuda.empty_cache()


def steps_of(options: argparse.Namespace, shape: Shape, name: str, output: str, rows: int) -> str:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            sync()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            sync()
            took = time.perf_counter() - self.start
            row = {"seconds": took, "peak": peak_gib()}
            record(step=f"{name}, {rows} rows at a time", shape=str(shape), index=len(seconds), **row)
            seconds.append(took)

    reset_peak()
    sampler = dict(SAMPLERS[options.sampler])
    if options.sampler == "vllm":
        sampler["vllm_max_model_length"] = shape.prompt_tokens + shape.completion_tokens
    trainer = GRPOTrainer(
        model=str(options.folder),
        processing_class=AutoTokenizer.from_pretrained(options.folder),
        reward_funcs=lambda completions, **columns: [workload.score(text) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in shape.texts(options.steps)]),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=output,
            max_steps=options.steps,
            per_device_train_batch_size=rows,
            num_generations=shape.group,
            gradient_accumulation_steps=shape.prompts * shape.group // rows,
            steps_per_generation=max(1, shape.prompts * shape.group // options.per_device),
            max_completion_length=shape.completion_tokens,
            learning_rate=1e-6,
            beta=0.0,
            loss_type="grpo",
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            gradient_checkpointing=options.checkpointing,
            model_init_kwargs={"dtype": "float32"},
            bf16=IS_GPU,
            use_cpu=not IS_GPU,
            save_strategy="no",
            report_to="none",
            logging_steps=1000,
            disable_tqdm=True,
            log_completions=False,
            **sampler,
        ),
    )
    trainer.train()
    return f"steps of {', '.join(f'{s:.2f}' for s in seconds)} s, {rows} rows at a time, peak {peak_gib()} GiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", nargs="+", type=Shape.of, default=DEFAULT_SHAPES)
    parser.add_argument("--sampler", choices=SAMPLERS, default="vllm" if HAS_VLLM else "generate")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, which is TRL's default")
    parser.add_argument("--cudnn", action="store_true", help="leave PyTorch its cuDNN attention, which is its default")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--per-device", type=int, default=16 if IS_GPU else 8)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.backends.cuda.enable_cudnn_sdp(options.cudnn)
    torch.set_float32_matmul_precision("high")
    switches = [word for word in ("checkpointing", "cudnn") if getattr(options, word)]
    name = ", ".join(["TRL", options.sampler, *switches])
    if importlib.util.find_spec("trl") is None:
        record(note="TRL is not installed here, so nothing stands beside our steps")
        print(f"SKIP  {name}: not installed", flush=True)
        return 0
    if not HAS_VLLM:
        record(note="vLLM is not installed here, so TRL samples by transformers")
    for shape in options.shapes:
        needed = 15 + options.steps * (10 + 7 * shape.size) if IS_GPU else 5
        check(f"whole steps {shape}, {name}", partial(whole_steps, options, shape, name), needed)
    return exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
