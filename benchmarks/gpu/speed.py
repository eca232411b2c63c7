"""Where a step's time and memory go on the GPU, what each candidate gives, and the hardware's ceilings beside them.

    python speed.py [--model 0.5B] [--folder FOLDER] [--shapes 64x8:512/512 ...] [--parts ceilings train ...]

A shape is prompts x completions of each : tokens of a prompt / of a completion. What is not a whole step takes its
lengths from the first shape, a micro-step from each.

ceilings   TFLOP/s of matrix products by precision, GB/s of a copy
train      forward and backward of a micro-step under bf16-mixed; on one shape and on shapes that are new each time, as
           in a run
sample     milliseconds per decoding step by a CUDA graph
step       whole steps under Lightning's Trainer with the settings of configs/gpu.yaml; needs --folder, where the model
           is put for the peers as well
variants   the same of the first shape: with `data.steps_per_episode: auto`, with an adapter
candidates train and sample with other settings: attention in buckets, a float32 head, no graph, an adapter
head       forward and backward of the last layer alone: as it is, and with products in half precision
optimizer  AdamW, and the norms of gradients and weights that guard a step
profile    tables of kernels into OUT: profile_train.txt, profile_decode.txt
continuous decoding by transformers' continuous batching

On a CPU all of it runs with a toy model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workload
import yaml
from harness import (
    ACCELERATOR,
    BARE_RUN,
    DEVICE,
    IS_GPU,
    OUT,
    ROOT,
    check,
    exit_status,
    machine,
    peak_gib,
    record,
    reset_peak,
    sync,
    timed,
)
from scoring_kernels import kernels
from torch import Tensor, nn

from stateset_lightning import GRPOLightningModule, ScenarioDataModule
from stateset_lightning.algorithm import GRPO
from stateset_lightning.policy import Group, LoRAConfig, Policy, PolicyConfig, packed_attention
from stateset_lightning.policy.head import HeadOptions, token_logprobs
from stateset_lightning.policy.lora import add_adapter
from stateset_lightning.rollout import InProcessEngine, RolloutConfig
from stateset_lightning.rollout.engine import DecodingKind
from stateset_lightning.seeding import sample_seeds

# Hidden size, intermediate size, layers, heads, key heads, tied embeddings: shapes of Qwen2.5.
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
    "toy": (64, 128, 2, 4, 2, True),
}
VOCABULARY = 151_936 if IS_GPU else 512
MICRO_STEP_GROUPS = 4 if IS_GPU else 1
DTYPE = torch.bfloat16 if IS_GPU else torch.float32
CANDIDATES = [
    (),
    ("float32 head",),
    ("float32 head", "TF32"),
    ("buckets",),
    ("buckets", "large buckets"),
    ("buckets", "float32 head"),
    ("buckets", "cuDNN"),  # seconds for each new shape
]
SETTINGS = yaml.safe_load((ROOT / "configs" / "gpu.yaml").read_text())


@dataclass(frozen=True)
class Shape:
    """Of an optimizer step."""

    prompts: int
    group: int
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, name: str) -> Shape:
        match = re.fullmatch(r"(\d+)x(\d+):(\d+)/(\d+)", name)
        if match is None:
            raise argparse.ArgumentTypeError(f"{name!r} is no shape such as 64x8:512/512")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.prompts}x{self.group}:{self.prompt_tokens}/{self.completion_tokens}"

    @property
    def micro_steps(self) -> int:
        return max(1, self.prompts // MICRO_STEP_GROUPS)

    @property
    def size(self) -> float:
        """Tokens of all completions with their prompts, in those of 16x8:512/512."""
        return self.prompts * self.group * (self.prompt_tokens + self.completion_tokens) / 2**17

    def texts(self, steps: int) -> list[str]:
        case = workload.Case(self.prompt_tokens, self.completion_tokens)
        return workload.make_prompts(case, self.prompts * steps)


DEFAULT_SHAPES = [Shape.of(name) for name in (("64x8:512/512", "64x8:2048/512") if IS_GPU else ("2x4:16/12",))]


def make_model(name: str) -> Any:
    """Random weights, float32; no completion ends early, since the model has no logit for the end token."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, intermediate, layers, heads, key_heads, tied = SHAPES[name]
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.generation_config.eos_token_id = VOCABULARY
    model.generation_config.pad_token_id = 0
    return model.eval()


def autocast() -> Any:
    """As Lightning's bf16-mixed."""
    return torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False)


def ceilings() -> str:
    n, megabytes = (8192, 2048) if IS_GPU else (512, 4)
    seen = []
    cases = (("bf16", torch.bfloat16, "highest"), ("tf32", torch.float32, "high"), ("fp32", torch.float32, "highest"))
    for name, dtype, precision in cases:
        torch.set_float32_matmul_precision(precision)
        a, b = torch.randn(n, n, device=DEVICE, dtype=dtype), torch.randn(n, n, device=DEVICE, dtype=dtype)
        rate = 2e-12 * n**3 / timed(partial(torch.mm, a, b), 5, 2)
        record(ceiling=f"{name} products", tflops=rate)
        seen.append(f"{name} {rate:.3g} TFLOP/s")
    torch.set_float32_matmul_precision("highest")
    x = torch.randn(megabytes * 2**18, device=DEVICE)
    rate = 2e-9 * x.nbytes / timed(partial(torch.empty_like(x).copy_, x), 5, 2)
    record(ceiling="copy", gigabytes_per_s=rate)  # what is read and what is written
    return ", ".join(seen) + f", copy {rate:.3g} GB/s"


def head(hidden_size: int) -> None:
    """One line for each precision and chunk size."""
    tokens = 8192 if IS_GPU else 64
    hidden = torch.randn(tokens, hidden_size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = nn.Parameter(0.02 * torch.randn(VOCABULARY, hidden_size, device=DEVICE))
    targets = torch.randint(VOCABULARY, (tokens,), device=DEVICE)
    grad = torch.randn(tokens, device=DEVICE)

    def measure(name: str, function: Callable[[], tuple[Tensor, Tensor]]) -> str:
        reset_peak()
        seconds = timed(lambda: torch.autograd.grad(function()[0], (hidden, weight), grad), 2, 1)
        rate = 8e-12 * tokens * hidden_size * VOCABULARY / seconds  # forward, again, and two gradients
        record(head=name, hidden=hidden_size, tokens=tokens, seconds=seconds, peak=peak_gib())
        return f"{1e3 * seconds:.1f} ms, {rate:.3g} TFLOP/s, peak {peak_gib()} GiB"

    for precision in ("highest", "high"):
        for size in (None, 2048):
            name = f"head, float32 {precision}, chunks of {size or 'its own size'}"
            torch.set_float32_matmul_precision(precision)
            options = HeadOptions(chunk_tokens=size, dtype=torch.float32)
            check(name, partial(measure, name, partial(token_logprobs, hidden, weight, None, targets, options)), 5)
    torch.set_float32_matmul_precision("highest")
    for size in (110, 512, 2048, 4096):
        name = f"head, bfloat16 products, chunks of {size}"
        options = HeadOptions(chunk_tokens=size, dtype=torch.bfloat16)
        check(name, partial(measure, name, partial(token_logprobs, hidden, weight, None, targets, options)), 5)


# A micro-step of training
# ----------------------------------------------------------------------------------------------------------------------


def random_groups(shape: Shape, ragged: bool, seed: int) -> list[Group]:
    """Those of a micro-step, of the largest lengths, or of random ones: from a quarter of a prompt, and an eighth of a
    completion, on.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = shape.prompt_tokens, shape.completion_tokens
    shortest = (longest[0] // 4, longest[1] // 8) if ragged else longest

    def tokens(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        return torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()

    return [
        Group(tokens(shortest[0], longest[0]), [tokens(shortest[1], longest[1]) for _ in range(shape.group)])
        for _ in range(shape.prompts // shape.micro_steps)
    ]


@contextmanager
def candidates(names: tuple[str, ...]) -> Iterator[None]:
    """What is named in place of the kernels, and settings, while the context lasts."""
    bucket_tokens = packed_attention.BUCKET_TOKENS
    with ExitStack() as stack:
        stack.enter_context(kernels("buckets" not in names, "float32 head" not in names))
        try:
            torch.set_float32_matmul_precision("high" if "TF32" in names else "highest")
            torch.backends.cuda.enable_cudnn_sdp("cuDNN" in names)
            if "large buckets" in names:
                packed_attention.BUCKET_TOKENS = 2**18
            yield
        finally:
            packed_attention.BUCKET_TOKENS = bucket_tokens
            torch.set_float32_matmul_precision("highest")
            torch.backends.cuda.enable_cudnn_sdp(False)


def micro_step(policy: Policy, groups: list[Group]) -> None:
    """Forward and backward; any loss that is linear in the log-probs costs what GRPO's does."""
    policy.zero_grad(set_to_none=True)
    with autocast():
        logprobs_T, _ = policy.score(groups)
    logprobs_T.mean().backward()


def train(policy: Policy, shape: Shape, settings: list[tuple[str, ...]]) -> None:
    """A line for each of the settings, which are names of `candidates`."""
    head_weights = policy.model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for name, p in policy.named_parameters() if "embed" not in name and "lm_head" not in name)
    seeds = iter(range(1000, 10_000))

    def measure(title: str, names: tuple[str, ...], ragged: bool) -> str:
        micro_steps = [random_groups(shape, ragged, next(seeds) if ragged else 1) for _ in range(3)]
        with candidates(names):
            micro_step(policy, micro_steps[0])
            reset_peak()
            sync()
            start = time.perf_counter()
            for groups in micro_steps[1:]:
                micro_step(policy, groups)
            sync()
            seconds = (time.perf_counter() - start) / 2
        timed_groups = [group for groups in micro_steps[1:] for group in groups]
        completions = sum(group.num_completion_tokens for group in timed_groups) / 2
        tokens = completions + sum(len(group.prompt) for group in timed_groups) / 2
        rate = 1e-12 * (6 * body * tokens + 8 * head_weights * completions) / seconds
        record(train=title, shape=str(shape), seconds=seconds, tokens=tokens, tflops=rate, peak=peak_gib())
        return f"{seconds:.3f} s for {tokens:,.0f} tokens, {rate:.3g} TFLOP/s, peak {peak_gib()} GiB"

    for ragged in (False, True):
        for names in settings:
            if ragged and names and ("buckets" not in names or "cuDNN" in names):
                continue  # the shapes change nothing for these, or take a minute
            title = f"{'new shapes' if ragged else 'one shape'}: {' + '.join(names) or 'as it is'}"
            check(f"micro-step {shape}, {title}", partial(measure, title, names, ragged), 20 if names else 5)
    policy.zero_grad(set_to_none=True)


# Sampling
# ----------------------------------------------------------------------------------------------------------------------


def bytes_of_a_token(config: Any, rows: int, length: int) -> int:
    """What a decoding step has to read: the weights and, for each row, keys and values of so many tokens."""
    head_dim = config.hidden_size // config.num_attention_heads
    attention = 2 * config.hidden_size * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    weights = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    weights += config.hidden_size * config.vocab_size
    keys = 2 * rows * length * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return DTYPE.itemsize * (weights + keys)


def with_adapter(policy: Policy) -> Policy:
    """A policy of a copy of the model."""
    config = PolicyConfig(policy.config.model_name, lora=LoRAConfig(rank=16))
    model = copy.deepcopy(policy.model)
    add_adapter(model, config.lora, 1)
    return Policy(model, config)


def sample(policy: Policy, shape: Shape, rows: int, tokens: int, parts: list[str]) -> None:
    group = shape.group
    prompts = [torch.randint(5, VOCABULARY, (shape.prompt_tokens,)).tolist() for _ in range(rows // group)]
    config = RolloutConfig(max_new_tokens=tokens, max_batch_rows=rows)
    seeds = sample_seeds(1, "train", 0, range(len(prompts)), group)
    tokenizer = workload.make_tokenizer(unreachable_eos=True, vocabulary=VOCABULARY)

    def measure(name: str, function: Callable[[], int]) -> str:
        reset_peak()
        sync()
        start = time.perf_counter()
        made = function()
        sync()
        seconds = time.perf_counter() - start
        rate = 1e-9 * bytes_of_a_token(policy.model.config, rows, shape.prompt_tokens + tokens // 2) * tokens / seconds
        kept = {"steps": tokens, "gigabytes_per_s": rate, "peak": peak_gib()}
        record(sample=name, rows=rows, tokens=tokens, seconds=seconds, **kept)
        step = 1e3 * seconds / tokens
        return f"{seconds:.2f} s, {step:.2f} ms per step, {made / seconds:,.0f} tokens/s, peak {peak_gib()} GiB"

    def engine(policy: Policy, decoding: DecodingKind, *names: str) -> str:
        how = replace(config, decoding=decoding)
        made = InProcessEngine(tokenizer, DTYPE if IS_GPU else None)
        made.sync(policy)
        with candidates(names):
            made.generate(prompts, group, replace(how, max_new_tokens=4), seeds)
            name = " ".join(["engine", decoding, *names, *(["adapter"] if policy.adapter else [])])
            return measure(name, lambda: int(made.generate(prompts, group, how, seeds).lengths_N.sum()))

    def small_model() -> Any:
        """A copy with weights in half precision and plain attention; the rotation stays float32."""
        model = copy.deepcopy(policy.model)
        for parameter in model.parameters():
            parameter.data = parameter.detach().to(DTYPE)
        model.set_attn_implementation("sdpa")
        return model

    def continuous_batching() -> str:
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        model = small_model()
        generation = GenerationConfig(
            max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, eos_token_id=VOCABULARY, pad_token_id=0
        )
        rows_of_prompts = [prompt for prompt in prompts for _ in range(group)]

        def generate() -> int:
            outputs = model.generate_batch(
                rows_of_prompts,
                generation_config=generation,
                continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.4),
                progress_bar=False,
            )
            return sum(len(output.generated_tokens) for output in outputs.values())

        with torch.no_grad():
            generate()  # captures graphs
            return measure("continuous batching", generate)

    if "sample" in parts:
        name = f"sampling {rows} rows: by a CUDA graph, prefill and capture included"
        check(name, partial(engine, policy, "graph"), 5)
    if "candidates" in parts:
        adapted = with_adapter(policy)
        check(f"sampling {rows} rows: the same, an adapter", partial(engine, adapted, "graph"), 5)
        check(f"sampling {rows} rows: without a graph", partial(engine, policy, "eager"), 10)
        check(f"sampling {rows} rows: without a graph, an adapter", partial(engine, adapted, "eager"), 10)
    if "continuous" in parts:
        check(f"sampling {rows} rows: without a graph, cuDNN", partial(engine, policy, "eager", "cuDNN"), 25)
        check(f"sampling {rows} rows: continuous batching", continuous_batching, 40)


# Optimizer, profile, whole steps
# ----------------------------------------------------------------------------------------------------------------------


def optimizer_step(policy: Policy, fused: bool) -> str:
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    reset_peak()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=fused)
    step = timed(optimizer.step)
    grads = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    weights = [parameter.detach() for parameter in policy.parameters()]
    norms = timed(lambda: [float(torch.nn.utils.get_total_norm(tensors)) for tensors in (grads, weights)])
    policy.zero_grad(set_to_none=True)
    record(optimizer="AdamW, fused" if fused else "AdamW, foreach", seconds=step, peak=peak_gib())
    return f"{1e3 * step:.1f} ms, peak {peak_gib()} GiB; norms of gradients and of weights {1e3 * norms:.1f} ms"


def profile(policy: Policy, shape: Shape) -> str:
    from torch.profiler import ProfilerActivity, profile as profiler

    engine = InProcessEngine(workload.make_tokenizer(unreachable_eos=True, vocabulary=VOCABULARY), DTYPE)
    engine.sync(policy)
    prompts = [torch.randint(5, VOCABULARY, (shape.prompt_tokens,)).tolist() for _ in range(4)]
    config = RolloutConfig(num_generations=shape.group, max_new_tokens=16)
    seeds = sample_seeds(1, "train", 0, range(4), shape.group)
    parts: dict[str, Callable[[], object]] = {
        "train": partial(micro_step, policy, random_groups(shape, True, 5)),
        "decode": partial(engine.generate, prompts, shape.group, config, seeds),
    }
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if IS_GPU else [])]
    order = "cuda_time_total" if IS_GPU else "cpu_time_total"
    OUT.mkdir(parents=True, exist_ok=True)
    for name, function in parts.items():
        function()
        with profiler(activities=activities) as seen:
            function()
            sync()
        table = seen.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70)
        (OUT / f"profile_{name}.txt").write_text(table)
    policy.zero_grad(set_to_none=True)
    return ""


def whole_steps(
    folder: Path, shape: Shape, title: str, lora: LoRAConfig | None = None, auto: bool = False, steps: int = 2
) -> str:
    """Seconds of each step, with the settings of configs/gpu.yaml; the first one makes graphs and reserves memory.

    Args:
        folder: Of the model.
        shape: Of a step.
        title: Of what is recorded.
        lora: An adapter is trained.
        auto: Micro-steps are chosen by memory, and not `MICRO_STEP_GROUPS` groups in each.
        steps: How many.
    """
    from lightning.pytorch import Callback, Trainer, seed_everything

    lines: list[str] = []

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index % trainer.accumulate_grad_batches == 0:
                self.start = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            count = trainer.accumulate_grad_batches
            if index % count == count - 1:
                sync()
                seconds = time.perf_counter() - self.start
                sampling = module.metrics.last["time/sample_s"]
                row = {"seconds": seconds, "sampling": sampling, "peak": peak_gib(), "micro_steps": count}
                record(step=title, shape=str(shape), index=len(lines), **row)
                lines.append(f"{seconds:.2f} s ({sampling:.2f} sampling, {count} micro-steps)")

    seed_everything(0, verbose=False)
    data = ScenarioDataModule(
        train=[{"prompt": prompt} for prompt in shape.texts(steps)],
        batch_size=shape.prompts,
        use_chat_template=False,
        steps_per_episode=SETTINGS["data"]["steps_per_episode"] if auto else shape.micro_steps,
    )
    optimizer = SETTINGS["model"]["optimizer"]["init_args"]
    module = GRPOLightningModule(
        PolicyConfig(str(folder), lora=lora, **SETTINGS["model"]["policy"]),
        reward=lambda turns, context: workload.score(turns[-1].content),
        rollout=RolloutConfig(num_generations=shape.group, max_new_tokens=shape.completion_tokens),
        algorithm=GRPO(beta=0.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, **optimizer),
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator=ACCELERATOR,
        devices=1,
        precision=SETTINGS["trainer"]["precision"] if IS_GPU else "32-true",
        gradient_clip_val=1.0,
        accumulate_grad_batches=1 if auto else shape.micro_steps,
        callbacks=[Clock()],
        **BARE_RUN,
    )
    gc.collect()  # trainer and module of an earlier run hold each other
    reset_peak()
    try:
        trainer.fit(module, datamodule=data)
    finally:
        torch.set_float32_matmul_precision("highest")
    return f"{', '.join(lines)}; peak {peak_gib()} GiB"


PARTS = ["ceilings", "train", "sample", "step", "variants", "candidates", "head", "optimizer", "profile", "continuous"]


def measure_parts(model: Any, options: argparse.Namespace) -> None:
    """What needs the model in this process."""
    parts, first = options.parts, options.shapes[0]
    policy = Policy(model, PolicyConfig(options.model))
    policy.train()
    if "train" in parts:
        for shape in options.shapes:
            train(policy, shape, CANDIDATES[:1])
    if {"sample", "candidates", "continuous"} & set(parts):
        for rows, tokens in ((128, 128), (512, 64)) if IS_GPU else ((8, 8),):
            sample(policy, first, rows, tokens, parts)
    if "candidates" in parts:
        train(policy, first, CANDIDATES[1:])
    if "optimizer" in parts:
        for fused in (False, True):
            check(f"AdamW, {'fused' if fused else 'foreach'}", partial(optimizer_step, policy, fused), 5)
    if "profile" in parts:
        check("profile", partial(profile, policy, first), 20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5B" if IS_GPU else "toy", choices=SHAPES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--shapes", nargs="+", type=Shape.of, default=DEFAULT_SHAPES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(machine(), flush=True)
    if "ceilings" in options.parts:
        check("ceilings", ceilings)
    in_process = set(options.parts) - {"ceilings", "step", "variants", "head"}
    if in_process or (options.folder is not None and not options.folder.exists()):
        model = make_model(options.model)
        print(f"{options.model}: {model.num_parameters():,} parameters, vocabulary {VOCABULARY:,}", flush=True)
        if options.folder is not None and not options.folder.exists():
            saved = copy.deepcopy(model)
            workload.add_unreachable_end(saved)
            saved.save_pretrained(options.folder)
            workload.make_tokenizer(unreachable_eos=True, vocabulary=VOCABULARY).save_pretrained(options.folder)
            del saved
        measure_parts(model, options)
        del model
        gc.collect()  # whole steps would find its memory taken
    if "head" in options.parts:
        head(SHAPES[options.model][0])
    if options.folder is not None:
        rows: list[tuple[Shape, str, dict[str, Any]]] = []
        if "step" in options.parts:
            rows += [(shape, "ours", {}) for shape in options.shapes]
        if "variants" in options.parts:
            rows.append((options.shapes[0], "ours, micro-steps by memory", {"auto": True}))
            rows.append((options.shapes[0], "ours, an adapter of rank 16", {"lora": LoRAConfig(rank=16)}))
        for shape, title, variant in rows:
            steps = partial(whole_steps, options.folder, shape, title, **variant)
            check(f"whole steps {shape}, {title}", steps, 10 + 6 * shape.size if IS_GPU else 5)
    return exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
