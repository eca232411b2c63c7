"""Loss scaling and clipping with every kind of optimizer: gradients are judged, logged and clipped as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins import MixedPrecision
from module_runs import DigitReward, fit, make_module, relative_difference, weights

from stateset_lightning.algorithm import GRPO, KL
from stateset_lightning.policy import LoRAConfig, PolicyConfig

START = {"scale": 2.0**10, "overflow": 2.0**60}


def run(folder: Path, precision: Any, kind: Any, *, fused: bool, scale: float = START["scale"], **module: Any) -> Any:
    if precision == "16-mixed":  # which the Trainer's option turns into bf16-mixed on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        options: dict[str, Any] = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    else:
        options = {"precision": precision}

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return kind(parameters, lr=1e-2, fused=fused)

    return fit(folder, make_module(optimizer=optimizer, **module), gradient_clip_val=0.5, **options)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_a_fused_optimizer_clips_and_logs_the_gradient_itself(tmp_path: Path, precision: str) -> None:
    plain, fused = (run(tmp_path, precision, torch.optim.SGD, fused=fused) for fused in (False, True))
    norms = [t.lightning_module.metrics.last["policy/grad_norm"] for t in (plain, fused)]
    assert 0.5 < norms[0] < 50  # clipped, and not 2**10 times as large
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert relative_difference(weights(fused), weights(plain)) < 1e-6


def test_a_model_in_bfloat16_has_an_adapter_in_float32_under_mixed_precision(tmp_path: Path) -> None:
    policy = PolicyConfig("tiny", dtype="bfloat16", lora=LoRAConfig(rank=2))
    trainer = run(tmp_path, "bf16-mixed", torch.optim.AdamW, fused=True, policy=policy)
    trained = {p.requires_grad: p.dtype for p in trainer.lightning_module.parameters()}
    assert trained == {True: torch.float32, False: torch.bfloat16}
    moments = [state["exp_avg"].dtype for state in trainer.optimizers[0].state.values()]
    assert set(moments) == {torch.float32}
    assert trainer.lightning_module.metrics.last["policy/grad_norm"] > 0


class NoReward(DigitReward):
    def compute_reward(self, turns: Any, context: Any = None) -> float:
        return 0.0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("reward", "scale", "metric"),
    [(NoReward(), "scale", "policy/empty_steps"), (DigitReward(), "overflow", "policy/bad_steps")],
)
def test_a_skipped_step_under_loss_scaling_leaves_the_weights(
    tmp_path: Path, fused: bool, reward: DigitReward, scale: str, metric: str
) -> None:
    """One with nothing to train, and one whose scaled gradient overflows."""
    trainer = run(tmp_path, "16-mixed", torch.optim.AdamW, fused=fused, scale=START[scale], reward=reward)
    last, start = trainer.lightning_module.metrics.last, make_module()
    start.configure_model()
    assert (last[metric], last["policy/grad_norm"], trainer.global_step) == (1, 0, 2)
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in weights(trainer).items())


def test_bf16_true_rounds_weights_and_no_numbers_beside_them(tmp_path: Path) -> None:
    """Lightning makes bfloat16 the default dtype while a step runs."""
    module = make_module(algorithm=GRPO(beta=0.1, kl=KL("k1", place="reward"), top_entropy=0.5))
    seen, select = [], module.algorithm.select

    def note(tokens: Any, seed: int) -> torch.Tensor:
        seen.append({tokens.advantages_N.dtype, tokens.old_logprobs_T.dtype, tokens.entropies_T.dtype})
        return select(tokens, seed)

    module.algorithm.select = note  # type: ignore[method-assign]
    shown: set[torch.dtype] = set()

    def look(trainer: Any, module: Any) -> None:  # while the step runs
        shown.update(value.dtype for value in trainer.callback_metrics.values())

    fit(tmp_path, module, precision="bf16-true", max_steps=1, callbacks=[LambdaCallback(on_after_backward=look)])
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert seen == [{torch.float32}]
    assert shown == {torch.float32}
