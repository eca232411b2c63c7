"""Correctness on the GPU, most valuable first: does a run start, and is every path what it is on a CPU.

    python checks.py                            GPU_CHECK_DEVICE=cpu python checks.py   for a rehearsal

Each line: ok, FAIL, ERROR or SKIP, the check, its seconds, what was seen. Differences are in nats per token.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from conftest import small_model
from harness import ACCELERATOR, BARE_RUN, DEVICE, IS_GPU, ROOT, append, check, exit_status, machine, peak_gib, sync
from lightning.pytorch import Trainer, seed_everything
from scoring_kernels import kernels
from windowed_models import windowed_model

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.algorithm import GRPO
from stateset_lightning.policy import (
    Group,
    LoRAConfig,
    Policy,
    PolicyConfig,
    load_model,
    load_tokenizer,
)
from stateset_lightning.policy.head import HeadOptions, token_logprobs
from stateset_lightning.rewards import ExactMatch
from stateset_lightning.rollout import InProcessEngine
from stateset_lightning.rollout.cuda_decoding import GraphBatch
from stateset_lightning.seeding import sample_seeds

TOKENIZER = load_tokenizer(PolicyConfig("tiny"))
GROUPS = [
    Group(list(range(3, 3 + n)), [[(7 * i + j) % 300 + 3 for j in range(length)] for i, length in enumerate(lengths)])
    for n, lengths in ((40, (9, 17, 3)), (7, (1, 30)), (23, (12, 12, 12, 12)))
]
OWN_GPU_TESTS = (
    "tests/gpu/test_on_a_gpu.py",
    "tests/policy/test_varlen_attention.py",
    "tests/rewards/test_models.py",
    "tests/rollout/test_cuda_decoding.py",
    "tests/rollout/test_vllm_transfer.py",
)
PROMPTS = [list(range(3, 3 + n)) for n in (5, 9, 9, 2)]
# Mean difference of log-probs from float64 on the CPU: bfloat16 has three digits, float16 four.
SCORE_LIMITS = {torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
# And of the sampler's from the trainer's, as a run tolerates it.
SAMPLING_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Runs from the command line
# ----------------------------------------------------------------------------------------------------------------------


def fit(*arguments: str, program: tuple[str, ...] = ("-m", "stateset_lightning")) -> str:
    """The demo's run on this device, with further arguments; what it printed."""
    command = [sys.executable, *program, "fit", "--config=configs/single_turn.yaml"]
    run = subprocess.run(
        [*command, f"--trainer.accelerator={ACCELERATOR}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    printed = (run.stdout + run.stderr).strip()
    if run.returncode:
        append("errors.txt", f"== {' '.join([*command, *arguments])}\n{printed}")
    assert run.returncode == 0, printed[-600:]
    return printed


def starts_without_accelerate() -> str:
    """Lightning makes the model in the device's context, where transformers wants a package that is no dependency."""
    code = (
        "import sys; sys.modules['accelerate'] = None; from stateset_lightning.cli.main import main; main(sys.argv[1:])"
    )
    few = ("--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--baseline=false")
    with tempfile.TemporaryDirectory() as folder:
        nothing_kept = ("--trainer.logger=false", "--trainer.callbacks=null", f"--trainer.default_root_dir={folder}")
        fit(*few, *nothing_kept, program=("-c", code))
    return ""


def demo(precision: str) -> str:
    """40 steps of the demo: the lines that give validation's reward."""
    with tempfile.TemporaryDirectory() as folder:
        steps = ("--trainer.max_steps=40", "--trainer.val_check_interval=40")
        save = f"--trainer.logger.init_args.save_dir={folder}"
        printed = fit(*steps, save, f"--trainer.precision={precision}")
    return "; ".join(line.strip() for line in printed.splitlines() if "validation" in line)


def resumed_run_has_the_same_bits() -> str:
    """8 steps at once, against 4, and 4 more from the checkpoint."""
    few = ("--baseline=false", "--trainer.val_check_interval=4", "--trainer.limit_val_batches=1")
    constant = "--model.lr_scheduler.decay=constant"
    with tempfile.TemporaryDirectory() as folder:

        def checkpoint(name: str, steps: int, *more: str) -> Path:
            save = f"--trainer.logger.init_args.save_dir={folder}/{name}"
            fit(*few, constant, save, f"--trainer.max_steps={steps}", *more)
            return Path(folder, name, "single_turn", "version_0", "checkpoints", "last.ckpt")

        straight, half = checkpoint("straight", 8), checkpoint("half", 4)
        resumed = checkpoint("resumed", 8, f"--ckpt_path={half}")
        a, b = (
            torch.load(path, map_location="cpu", weights_only=True)["state_dict"].values()
            for path in (straight, resumed)
        )
    worst = max((x.float() - y.float()).abs().max().item() for x, y in zip(a, b, strict=True))
    assert worst == 0, f"weights differ by up to {worst:.1e}"
    return f"{len(a)} tensors"


def own_gpu_tests() -> str:
    """The tests of the repository that are marked `gpu`."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *OWN_GPU_TESTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    append("gpu_tests.txt", run.stdout + run.stderr)
    assert run.returncode == 0, run.stdout[-600:]
    return run.stdout.strip().splitlines()[-1]


# Scoring and sampling
# ----------------------------------------------------------------------------------------------------------------------


def scores(name: str, dtype: torch.dtype, scoring: Literal["auto", "padded"]) -> str:
    """Log-probs of the completions of GROUPS, against float64 on the CPU."""
    policy = Policy(small_model(name).to(DEVICE, dtype), PolicyConfig(name, scoring=scoring))
    exact = Policy(small_model(name).double(), PolicyConfig(name, scoring="padded"))
    with torch.no_grad():
        logprobs, expected = policy.score(GROUPS)[0].cpu(), exact.score(GROUPS)[0].float()
    difference = (logprobs - expected).abs()
    path = "packed" if policy.uses_packed_scoring else "padded"
    seen = f"{path}: {difference.mean():.1e}, largest {difference.max():.1e}"
    assert logprobs.isfinite().all(), seen
    assert difference.mean() < SCORE_LIMITS[dtype], seen
    return seen


def gradients(name: str) -> str:
    """Each parameter's gradient in float32, against the CPU's."""
    grads = []
    for device in (torch.device("cpu"), DEVICE):
        policy = Policy(small_model(name).to(device), PolicyConfig(name))
        logprobs, entropies = policy.score(GROUPS)
        loss = logprobs.sum() + 0.3 * entropies.sum()
        grads.append([grad.cpu() for grad in torch.autograd.grad(loss, list(policy.parameters()))])
    worst = max(((a - b).norm() / a.norm().clamp(min=1e-12)).item() for a, b in zip(*grads, strict=True))
    assert worst < 1e-4, f"a gradient is {worst:.1e} of its norm off"
    return f"largest difference {worst:.1e} of a gradient's norm"


def sampled(policy: Policy, config: RolloutConfig) -> Any:
    engine = InProcessEngine(TOKENIZER)
    engine.sync(policy)
    return engine.generate(PROMPTS, 4, config, sample_seeds(1, "train", 0, range(len(PROMPTS)), 4))


def as_groups(completions: list[list[int]]) -> list[Group]:
    return [Group(prompt, completions[4 * i : 4 * i + 4]) for i, prompt in enumerate(PROMPTS)]


def samples(name: str, dtype: torch.dtype, **options: Any) -> str:
    """In float32 the tokens that the CPU samples; in any dtype log-probs that the trainer would give them."""
    config = RolloutConfig(num_generations=4, max_new_tokens=24, max_batch_rows=8, **options)
    policy = Policy(small_model(name).to(DEVICE, dtype), PolicyConfig(name))
    rollout = sampled(policy, config)
    completions = rollout.completions()
    trainer = policy.score_without_gradient(as_groups(completions))[0].cpu()
    difference = (trainer - rollout.logprobs_T).abs().mean().item()
    seen = f"sampler and trainer differ by {difference:.1e}"
    assert difference < SAMPLING_LIMITS[dtype], seen
    if dtype == torch.float32:
        on_cpu = sampled(Policy(small_model(name), PolicyConfig(name)), config).completions()
        same = sum(a == b for a, b in zip(completions, on_cpu, strict=True))
        seen += f"; {same} of 16 completions as on the CPU"
        assert same >= 15, seen
    return seen


# Runs in this process
# ----------------------------------------------------------------------------------------------------------------------


def run(
    precision: Any = "32-true",
    *,
    accelerator: str = ACCELERATOR,
    beta: float = 0.0,
    fused: bool | None = None,
    clip: float | None = 1.0,
    **policy: Any,
) -> dict[str, float]:
    """Four optimizer steps of two passes over two micro-steps each; the last metrics."""
    seed_everything(1, verbose=False)
    rows: list[Any] = [
        {"prompt": f"What is {a} + {b}?", "target": str(a + b)} for a in range(15, 40) for b in range(26, 30)
    ]
    module = GRPOLightningModule(
        PolicyConfig("tiny", **policy),
        reward=ExactMatch(),
        rollout=RolloutConfig(num_generations=8, max_new_tokens=8),
        algorithm=GRPO(beta=beta),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=fused),
    )
    trainer = Trainer(
        max_steps=4,
        accelerator=accelerator,
        devices=1,
        precision=precision,
        gradient_clip_val=clip,
        accumulate_grad_batches=2,
        val_check_interval=4,
        **BARE_RUN,
    )
    data = ScenarioDataModule(train=rows, validation=rows[:16], batch_size=16, steps_per_episode=2, num_iterations=2)
    trainer.fit(module, datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def same_run_as_on_the_cpu() -> str:
    on_cpu, here = run(accelerator="cpu"), run()
    names = (
        "train/reward",
        "policy/loss",
        "policy/grad_norm",
        "policy/entropy",
        "completion/mean_tokens",
        "val/reward",
    )
    worst = max(abs(on_cpu[name] - here[name]) / max(abs(on_cpu[name]), 1e-3) for name in names)
    assert worst < 0.02, f"{[(name, on_cpu[name], here[name]) for name in names]}"
    return f"largest relative difference of a metric {worst:.1e}"


def run_in(precision: str, **options: Any) -> str:
    metrics = run(precision, **options)
    names = ("train/reward", "policy/grad_norm", "policy/bad_steps", "policy/sampling_difference")
    seen = ", ".join(f"{name} {metrics[name]:.4g}" for name in names)
    assert metrics["policy/grad_norm"] < 1e3, f"the norm is that of scaled gradients: {seen}"
    return seen


def adapter_starts_as_on_the_cpu() -> str:
    """An adapter's start is to follow from the seed alone, whatever device it is made on."""
    starts = []
    for device in (torch.device("cpu"), DEVICE):
        with device:  # as Lightning does
            model = load_model(PolicyConfig("tiny", lora=LoRAConfig(rank=4)), torch.float32, 3)
        starts.append([p.detach().cpu() for name, p in model.named_parameters() if "lora_A" in name])
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True)), "drawn by the device's own generator"
    return f"{len(starts[0])} matrices"


# Kernels, and the candidates
# ----------------------------------------------------------------------------------------------------------------------


def attention_kernels() -> str:
    """Which kernel masked attention gets, by dtype and whether key heads are repeated for it."""
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cuDNN"}
    seen = []
    for dtype in (torch.float32, torch.bfloat16):
        for key_heads in (2, 14):
            q, k, v = (
                torch.randn(8, heads, length, 64, device=DEVICE, dtype=dtype, requires_grad=True)
                for heads, length in ((14, 100), (key_heads, 200), (key_heads, 200))
            )
            mask = torch.ones(1, 1, 100, 200, dtype=torch.bool, device=DEVICE)
            choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, False, enable_gqa=key_heads != 14)
            seen.append(f"{name_of(dtype)}, {key_heads} key heads: {names.get(choice, choice)}")
    return "; ".join(seen)


def attention_of_new_shapes() -> str:
    """Milliseconds forward and backward on a shape seen before and on new ones: cuDNN plans anew for each."""

    def milliseconds(longest: int, prompt: int, repeat: bool) -> float:
        q, k, v = (
            torch.randn(8, heads, length, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            for heads, length in ((14, longest), *((14 if repeat else 2, prompt + longest),) * 2)
        )
        mask = torch.ones(1, 1, longest, prompt + longest, dtype=torch.bool, device=DEVICE).tril(prompt)
        sync()
        start = time.perf_counter()
        attend = torch.nn.functional.scaled_dot_product_attention
        attend(q, k, v, attn_mask=mask, enable_gqa=not repeat).sum().backward()
        sync()
        return 1e3 * (time.perf_counter() - start)

    seen = []
    for repeat in (False, True):
        milliseconds(256, 256, repeat)
        new = sorted(milliseconds(300 + 7 * i, 250 + 3 * i, repeat) for i in range(5))
        known = sorted(milliseconds(300, 250, repeat) for _ in range(5))
        seen.append(f"{'repeated' if repeat else 'grouped'} key heads: new {new[2]:.1f} ms, known {known[2]:.2f} ms")
    return "; ".join(seen)


def kernels_are_exact(name: str, dtype: torch.dtype) -> str:
    """Log-probs and gradients with the kernels for attention and head and without, against float64 on the CPU."""
    make_model = windowed_model if name == "mistral" else small_model

    def score(policy: Policy) -> tuple[torch.Tensor, ...]:
        logprobs, entropies = policy.score(GROUPS)
        return logprobs, *torch.autograd.grad(logprobs.sum() + 0.3 * entropies.sum(), list(policy.parameters()))

    def errors(found: tuple[torch.Tensor, ...]) -> tuple[float, float]:
        logprobs, *grads = (x.double().cpu() for x in found)
        off = [((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in zip(grads, exact[1:], strict=True)]
        return (logprobs - exact[0]).abs().mean().item(), max(off)

    exact = score(Policy(make_model(name).double(), PolicyConfig(name)))
    policy = Policy(make_model(name).to(DEVICE, dtype), PolicyConfig(name))
    with kernels(attention=False, head=False):
        plain = errors(score(policy))
    with kernels():
        ours = errors(score(policy))
    seen = f"log-probs {ours[0]:.1e} (without {plain[0]:.1e}), gradients {ours[1]:.1e} (without {plain[1]:.1e})"
    assert ours[0] < 2 * plain[0] + 1e-4, seen
    assert ours[1] < 2 * plain[1] + 1e-3, seen
    return seen


def head_is_exact() -> str:
    """In parts of a vocabulary that chunks do not divide, against float64 from the same rounded operands."""
    hidden, weight = (
        torch.randn(size, 64, device=DEVICE, requires_grad=True) for size in ((5000, 40_000) if IS_GPU else (50, 400))
    )
    targets = torch.randint(len(weight), (len(hidden),), device=DEVICE)
    grad = torch.randn(len(hidden), device=DEVICE)
    rounded = [x.detach().bfloat16().cpu().double().requires_grad_() for x in (hidden, weight)]
    plain = (rounded[0] @ rounded[1].t()).log_softmax(-1)
    expected = plain[torch.arange(len(targets)), targets.cpu()], -(plain.exp() * plain).sum(-1)
    with kernels():
        scores = token_logprobs(hidden, weight, None, targets, HeadOptions(dtype=torch.bfloat16))
        grads = torch.autograd.grad((scores[0] + 0.3 * scores[1]) @ grad, (hidden, weight))
    exact = torch.autograd.grad((expected[0] + 0.3 * expected[1]) @ grad.cpu().double(), rounded)
    off = max((a.cpu() - b).abs().max().item() for a, b in zip(scores, expected, strict=True))
    off_grads = max(((a.cpu() - b).norm() / b.norm()).item() for a, b in zip(grads, exact, strict=True))
    seen = f"log-probs and entropies {off:.1e}, gradients {off_grads:.1e}"
    assert off < 1e-3, seen
    assert off_grads < 1e-2, seen
    return seen


@torch.inference_mode()
def a_row_takes_other_tokens(dtype: torch.dtype) -> str:
    """Rows that ended, take tokens that were not sampled, and go on: their log-probs against the model's own."""
    model = small_model("qwen2", hidden_size=64).to(DEVICE, dtype)
    batch, tokens_B, rows = GraphBatch(model, 24), torch.zeros(2, dtype=torch.long, device=DEVICE), PROMPTS[:2]
    batch.admit(PROMPTS, [0, 1])

    def decode(*tokens: int) -> None:
        tokens_B.copy_(torch.tensor(tokens))
        batch.repeat(partial(batch.step, tokens_B), 1)

    decode(5, 6)
    decode(7, 8)
    kept = [batch.kept(row, len(rows[row]) + count).copied() for row, count in ((1, 1), (0, 2))]
    batch = GraphBatch(model, 24)
    texts = [[*rows[1], 6, 9, 10, 11], [*rows[0], 5, 7, 14]]
    batch.resume(kept, texts)
    decode(12, 13)
    texts = [[*texts[0], 12], [*texts[1], 13]]
    differences = [
        (model(torch.tensor([text], device=DEVICE)).logits[0, -1].float().log_softmax(-1) - logits).abs().mean().item()
        for text, logits in zip(texts, batch.logits_BV.float().log_softmax(-1), strict=True)
    ]
    assert max(differences) < SAMPLING_LIMITS[dtype], differences
    return f"largest mean difference {max(differences):.1e}"


def main() -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    os.environ["PL_GLOBAL_SEED"] = "0"
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    print(machine(), flush=True)
    check("a run starts without accelerate", starts_without_accelerate, 30)
    if IS_GPU:
        check("attention kernels", attention_kernels)
    check("four steps as on the CPU, 32-true", same_run_as_on_the_cpu, 15)
    for dtype in dtypes:
        for name in ("qwen2", "qwen3", "llama", "gpt2", "gemma2"):
            if dtype == torch.float32 or name in ("qwen2", "gemma2"):
                check(f"score {name} {name_of(dtype)}", partial(scores, name, dtype, "auto"))
        check(f"score qwen2 {name_of(dtype)} padded", partial(scores, "qwen2", dtype, "padded"))
    for name in ("qwen2", "qwen3", "gpt2"):
        check(f"gradients {name}", partial(gradients, name))
    for dtype in dtypes:
        check(f"sampling qwen2 {name_of(dtype)}", partial(samples, "qwen2", dtype, decoding="eager"))
        check(f"sampling qwen2 {name_of(dtype)} by a graph", partial(samples, "qwen2", dtype, decoding="graph"))
        check(f"a row takes other tokens, {name_of(dtype)}", partial(a_row_takes_other_tokens, dtype))
    filters: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "min_p": 0.01}
    for decoding in ("eager", "graph"):
        name = f"sampling qwen2 float32, filtered, {decoding}"
        check(name, partial(samples, "qwen2", torch.float32, decoding=decoding, **filters))
    check("sampling gemma2 float32 (sliding window)", partial(samples, "gemma2", torch.float32))
    lora = LoRAConfig(rank=8)
    check("a run in bf16-mixed", partial(run_in, "bf16-mixed"), 5)
    check("a run in bf16-true", partial(run_in, "bf16-true"), 5)
    check("a run with KL in bf16-mixed", partial(run_in, "bf16-mixed", beta=0.04), 5)
    check("a run with LoRA in bf16-mixed", partial(run_in, "bf16-mixed", lora=lora), 5)
    check("a run with LoRA on a bfloat16 base", partial(run_in, "32-true", lora=lora, dtype="bfloat16"), 5)
    recomputed = {"gradient_checkpointing": True, "dropout": 0.1}
    check("a run with gradient checkpointing and dropout", partial(run_in, "bf16-mixed", **recomputed), 5)
    if IS_GPU:
        check("a run in 16-mixed", partial(run_in, "16-mixed"), 5)
        for precision in ("16-mixed", "bf16-mixed"):
            check(f"fused AdamW in {precision}", partial(run_in, precision, fused=True, clip=None), 5)
        check("an adapter starts as on the CPU", adapter_starts_as_on_the_cpu)
        check("attention of new shapes", attention_of_new_shapes)
    half = torch.bfloat16 if IS_GPU else torch.float32
    for name in ("qwen2", "llama", "mistral"):
        check(f"kernels against float64, {name}", partial(kernels_are_exact, name, half))
    check("head against float64", head_is_exact)
    check("the repository's GPU tests", own_gpu_tests, 90)
    for precision in ("32-true", "bf16-mixed") if IS_GPU else ("32-true",):
        check(f"40 steps of the demo in {precision}", partial(demo, precision), 40)
    check("a resumed run has the same bits", resumed_run_has_the_same_bits, 40)
    print(f"peak {peak_gib()} GiB", flush=True)
    return exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
