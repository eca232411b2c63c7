"""What only a GPU can show. `GPU_CHECK_DEVICE=cpu` rehearses the tests themselves on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from module_runs import fit, make_data, make_module, relative_difference, weights
from plain_kernels import plain_kernels

from stateset_lightning import RolloutConfig
from stateset_lightning.policy import Group, LoRAConfig, Policy, PolicyConfig, head

DEVICE = torch.device(os.environ.get("GPU_CHECK_DEVICE", "cuda"))
ACCELERATOR = "gpu" if DEVICE.type == "cuda" else DEVICE.type
GROUPS = [
    Group([3 + i % 50 for i in range(23)], [[7, 9, 11], [4] * 12]),
    Group([5, 8, 13], [[20 + i for i in range(9)], [6], [40, 41]]),
]
# Nats from float64 on a CPU, mean over tokens.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.01}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def scores_and_gradients(policy: Policy) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logprobs_T, entropies_T = policy.score(GROUPS)
    gradients = torch.autograd.grad((logprobs_T + 0.1 * entropies_T).sum(), list(policy.parameters()))
    return logprobs_T.detach().double().cpu(), [gradient.double().cpu() for gradient in gradients]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("scoring", ["auto", "padded"])
def test_log_probs_and_gradients_are_those_of_float64(
    make_model: Callable[..., Any], architecture: str, scoring: Any, dtype: torch.dtype
) -> None:
    exact = Policy(make_model(architecture).double(), PolicyConfig(architecture, scoring="padded"))
    policy = Policy(make_model(architecture).to(DEVICE, dtype), PolicyConfig(architecture, scoring=scoring))
    (expected, slopes), (found, gradients) = scores_and_gradients(exact), scores_and_gradients(policy)
    assert (found - expected).abs().mean() < LIMITS[dtype]
    if dtype == torch.float32:
        for slope, gradient in zip(slopes, gradients, strict=True):
            assert (slope - gradient).norm() <= 1e-3 * slope.norm() + 1e-6


def kernels(*dtypes: torch.dtype) -> AbstractContextManager[None]:
    """The GPU's, or in a rehearsal their plain twins."""
    return nullcontext() if DEVICE.type == "cuda" else plain_kernels(dtypes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "softcap": 4.0}], ids=["plain", "bounded"])
def test_gradients_of_the_head_are_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, float]
) -> None:
    """From the same rounded operands, in parts of tokens and vocabulary that leave a rest."""
    monkeypatch.setattr(head, "GPU_CHUNK_BYTES", 4 * 128 * 300)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*size, generator=generator).to(dtype) for size in ((500, 64), (1000, 64), (1000,))]
    targets_T = torch.randint(1000, (500,), generator=generator)
    grad_T = torch.randn(500, generator=generator)
    operands = [x.to(DEVICE).requires_grad_() for x in drawn]
    with kernels():
        how = head.HeadOptions(chunk_tokens=128, **options)  # type: ignore[arg-type]
        assert how.chunk(1000, is_on_gpu=True) == (128, 300)
        logprobs_T, entropies_T = head.token_logprobs(*operands, targets_T.to(DEVICE), how)
        found = torch.autograd.grad((logprobs_T + 0.3 * entropies_T) @ grad_T.to(DEVICE), operands)
    exact = [x.double().requires_grad_() for x in drawn]
    logits_TV = head.capped(exact[0] @ exact[1].t() + exact[2], options.get("softcap"))
    logps_TV = (logits_TV / options.get("temperature", 1.0)).log_softmax(-1)
    expected_T = logps_TV[range(500), targets_T] - 0.3 * (logps_TV.exp() * logps_TV).sum(-1)
    gradients = torch.autograd.grad(expected_T @ grad_T.double(), exact)
    total_T = (logprobs_T + 0.3 * entropies_T).detach().cpu()
    torch.testing.assert_close(total_T.double(), expected_T.detach(), atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(found, gradients, strict=True):
        assert (ours.cpu() - theirs).norm() < torch.finfo(dtype).eps * theirs.norm()


def peak_bytes(work: Callable[[], Any]) -> int:
    """What a call takes of the device's memory at most, beside what it finds there."""
    if DEVICE.type != "cuda":
        from torch.distributed._tools.mem_tracker import MemTracker  # private, and for a rehearsal alone

        with MemTracker() as tracker:
            work()
        return int(tracker.get_tracker_snapshot("peak")[DEVICE]["Total"])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_a_micro_step_takes_less_memory_than_its_logits(make_model: Callable[..., Any]) -> None:
    """The head has a sixteenth of the logits at a time; all of them at once are there some times in float32."""
    vocabulary, count = (32_768, 32) if DEVICE.type == "cuda" else (8192, 4)
    groups = [Group([5] * 16, [[7] * 64] * 8)] * count
    logits_bytes = 4 * vocabulary * sum(group.num_completion_tokens for group in groups)
    peaks = []
    with kernels(torch.bfloat16), patch.object(head, "GPU_CHUNK_BYTES", logits_bytes // 16):
        policy = Policy(make_model("qwen2", vocab_size=vocabulary).to(DEVICE, torch.bfloat16), PolicyConfig("qwen2"))

        def micro_step() -> None:
            policy.zero_grad(set_to_none=True)
            logprobs_T, entropies_T = policy.score(groups)
            (logprobs_T + 0.1 * entropies_T).sum().backward()

        for is_chunked in (True, False):
            policy.uses_chunked_head = is_chunked
            micro_step()  # libraries take memory for good at first
            policy.zero_grad(set_to_none=True)
            peaks.append(peak_bytes(micro_step))
    assert peaks[0] < 0.6 * logits_bytes < 0.2 * peaks[1]


def run(folder: Path, **options: Any) -> Trainer:
    data = make_data(num_iterations=2, steps_per_episode=2)
    settings = {"max_steps": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "accelerator": ACCELERATOR}
    return fit(folder, data=data, **{**settings, **options})


def test_a_curve_is_the_cpus(tmp_path: Path) -> None:
    here, there = (run(tmp_path, accelerator=kind).lightning_module.metrics.last for kind in (ACCELERATOR, "cpu"))
    for name in ("train/reward", "policy/loss", "policy/grad_norm", "policy/entropy", "completion/mean_tokens"):
        assert here[name] == pytest.approx(there[name], rel=0.02, abs=1e-4), name


@pytest.mark.parametrize("policy", ["tiny", PolicyConfig("tiny", lora=LoRAConfig(rank=2))], ids=["whole", "adapter"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"])
def test_every_precision_trains(tmp_path: Path, precision: Any, policy: Any) -> None:
    optimizer = torch.optim.SGD if precision == "16-true" else torch.optim.AdamW  # whose eps is 0 in float16

    def fused(parameters: Any) -> torch.optim.Optimizer:
        return optimizer(parameters, lr=1e-3, fused=True)

    module = make_module(policy, optimizer=fused)
    settings = {"max_steps": 3, "gradient_clip_val": 1.0, "accelerator": ACCELERATOR, "precision": precision}
    last = fit(tmp_path, module, make_data(), **settings).lightning_module.metrics.last
    assert 0 < last["policy/grad_norm"] < 1e3 or last["policy/bad_steps"]  # and not that of scaled gradients
    assert last["policy/sampling_difference"] < 0.1


@pytest.mark.parametrize("decoding", ["graph", "eager"])
def test_training_sees_the_masks_of_sampling(tmp_path: Path, decoding: Any) -> None:
    sizes = {"num_generations": 8, "max_new_tokens": 40, "max_batch_rows": 24}  # some rows leave, others come
    filters = {"temperature": 2.0, "top_p": 0.8, "keep_sampling_mask": True}
    module = make_module(rollout=RolloutConfig(**sizes, **filters, decoding=decoding))
    last = fit(tmp_path, module, make_data(), max_steps=1, accelerator=ACCELERATOR).lightning_module.metrics.last
    assert last["policy/sampling_difference"] < 1e-4
    assert last["policy/grad_norm"] > 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def ends(steps: int, **options: Any) -> dict[str, torch.Tensor]:
        keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
        try:
            return weights(
                run(
                    tmp_path,
                    max_steps=steps,
                    callbacks=[keep],
                    enable_checkpointing=True,
                    deterministic="warn",  # sampling puts tokens at places of their own
                    precision=precision,
                    **options,
                )
            )
        finally:
            torch.use_deterministic_algorithms(False)

    straight = ends(6)
    ends(3)  # inside an episode
    assert relative_difference(ends(6, ckpt_path=tmp_path / "last.ckpt"), straight) == 0
