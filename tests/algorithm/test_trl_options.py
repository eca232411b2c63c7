"""Every option of TRL 1.16's GRPOConfig for advantages and losses: the values that TRL's own methods give with it, and
ours with the option that takes its place; or that the two differ, and by what.

TRL's scoring and loss run unchanged, with a GRPOConfig that holds the option, on completions that were sampled already.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from algorithm.test_trl_agreement import LENGTHS, MAX_LENGTH, PROMPT, UNBIASED, Case, distance, trl
from torch import Tensor

from stateset_lightning.algorithm import (
    BNPO,
    CISPO,
    DAPO,
    GDPO,
    GRPO,
    GSPO,
    LUSPO,
    SAPO,
    VESPO,
    AdaptiveEntropy,
    Algorithm,
    DrGRPO,
    Mismatch,
    TokenBatch,
    TopEntropy,
)
from stateset_lightning.algorithm.aggregation import per_token
from stateset_lightning.types import NOT_APPLICABLE

# Two groups of two, two rewards, one of which does not apply to the third completion; the second one is truncated.
SCORES = torch.tensor([[1.0, 0.2], [0.0, 0.9], [0.5, torch.nan], [0.0, 0.1]], dtype=torch.float64)
TRUNCATED = torch.tensor([False, True, False, False])

OPTIONS = {
    *("loss_type", "beta", "use_bias_correction_kl", "epsilon", "epsilon_high", "delta", "importance_sampling_level"),
    *("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
    *("vespo_lambda_neg", "scale_rewards", "reward_weights", "multi_objective_aggregation", "top_entropy_quantile"),
    *("mask_truncated_completions", "entropy_coef", "use_adaptive_entropy", "entropy_target", "entropy_coef_delta"),
    *("entropy_coef_max", "entropy_coef_min", "off_policy_mask_threshold", "vllm_importance_sampling_correction"),
    *("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
    "vllm_importance_sampling_cap",
}
ELSEWHERE = re.compile(
    "learning_rate|model_init_kwargs|trust_remote_code|router_aux_loss_coef|disable_dropout|cast_lm_head_to_fp32"
    "|remove_unused_columns|num_.*|max_.*|ds3_.*|shuffle_dataset|pad_to_multiple_of|generation_.*|steps_per_generation"
    "|temperature|top_p|top_k|min_p|chat_template_kwargs|repetition_penalty|cache_implementation|use_vllm|sync_ref_model"
    "|ref_model_.*|log_.*|use_transformers_.*|transformers_.*"
    "|vllm_(mode|model_impl|enable_sleep_mode|structured_outputs_regex|server_.*|group_port|gpu_.*|max_.*|tensor_.*)"
)
"""Options of the model, of data, batches, sampling, logging: none changes what an advantage or a loss is."""

Result = tuple[Tensor, float, dict[str, Tensor]]


@pytest.fixture(scope="module")
def case() -> Case:
    case = Case()
    ends = case.input_ids[torch.arange(4), PROMPT + LENGTHS - 1]
    case.ends = [int(token) for token in ends[~TRUNCATED]]  # type: ignore[attr-defined]
    assert int(ends[1]) not in case.ends  # type: ignore[attr-defined]
    return case


def their_trainer(case: Case, folder: Path, **options: Any) -> Any:
    args = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        num_generations=2,
        num_iterations=2,
        max_completion_length=MAX_LENGTH,
        pad_to_multiple_of=None,
        **options,
    )
    trainer = object.__new__(trl.GRPOTrainer)
    trainer.__dict__.update(vars(args))
    same = {name: lambda values, **_: values for name in ("gather", "reduce", "pad_across_processes")}
    lengths, masks = LENGTHS.tolist(), case.mask.bool()
    sampled = (
        [case.input_ids[n, :PROMPT].tolist() for n in range(4)],
        [case.input_ids[n, PROMPT : PROMPT + lengths[n]].tolist() for n in range(4)],
        None,
        [""] * 4,
        [case.sampling[n][masks[n]].tolist() for n in range(4)] if args.use_vllm else None,
        {},
        None,
        None,
    )

    def score(model: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return (*case.score(), None)
        return (case.old if model is case.model else case.reference, None, None)

    trainer.__dict__.update(
        args=args,
        model=case.model,
        ref_model=object(),
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=args.entropy_coef != 0 or args.use_adaptive_entropy,
        _last_world_entropy=float("inf"),
        _entropy_window_stats=None,
        environment_factories=None,
        environments=None,
        tools=None,
        _is_vlm=False,
        _tokenizer=SimpleNamespace(pad_token_id=31),
        eos_token_ids=case.ends,  # type: ignore[attr-defined]
        reward_funcs=[None, None],
        reward_func_names=["one", "two"],
        reward_weights=torch.tensor(args.reward_weights or [1.0, 1.0], dtype=torch.float64),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=1,
            process_index=0,
            sync_gradients=True,
            autocast=nullcontext,
            **same,
        ),
        _metrics={"train": defaultdict(list)},
        _logs={name: defaultdict(list) if name in ("rewards", "extra") else [] for name in LOGS},
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda prompts: sampled,
        _calculate_rewards=lambda *_: SCORES.clone(),
        _get_per_token_logps_and_entropies=score,
    )
    return trainer


LOGS = ("prompt", "completion", "rewards", "advantages", "extra", "images")


def theirs(case: Case, folder: Path, steps: int = 1, **options: Any) -> Result:
    trainer = their_trainer(case, folder, **options)
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * 4)
    for _ in range(steps):
        loss = trainer._compute_loss(case.model, inputs)
    return inputs["advantages"], loss.item(), case.gradients(loss)


def ours(case: Case, algorithm: Algorithm, steps: int = 1, samples_elsewhere: bool = False, **options: Any) -> Result:
    algorithm.setup(MAX_LENGTH)
    keep, groups = case.mask.bool(), torch.tensor([0, 0, 1, 1])
    scores_PGF = SCORES.nan_to_num(NOT_APPLICABLE).reshape(2, 2, 2)
    weights_F = torch.tensor(options.get("reward_weights") or [1.0, 1.0])
    advantages_N = algorithm.advantages(scores_PGF, weights_F, LENGTHS.reshape(2, 2)).flatten()
    trains_N = ~TRUNCATED if algorithm.mask_truncated else torch.ones(4, dtype=torch.bool)
    weights_T = per_token(algorithm.token_weights(LENGTHS, groups, trains_N), LENGTHS)
    for _ in range(steps):
        logprobs, entropies = case.score()
        fields = {"ref_logprobs_T": case.reference[keep], "entropies_T": entropies[keep]}
        if samples_elsewhere:
            fields["sampling_logprobs_T"] = case.sampling[keep]
        tokens = TokenBatch(logprobs[keep], case.old[keep], advantages_N, LENGTHS, **fields)
        if algorithm.selects_tokens:
            fields["select_T"] = algorithm.select(tokens, seed=0)
            tokens = TokenBatch(logprobs[keep], case.old[keep], advantages_N, LENGTHS, **fields)
        loss = (weights_T * algorithm.per_token_loss(tokens)[0]).sum()
        algorithm.adapt({"policy/entropy": float(entropies[keep].mean())})
    return advantages_N, loss.item(), case.gradients(loss)


def grpo(**options: Any) -> Algorithm:
    return GRPO(**{"beta": 0.0, **options})


def by_token(kind: Any, **bounds: Any) -> Algorithm:
    return grpo(mismatch=Mismatch(kind, **bounds))


SEQUENCE = {"importance_sampling_level": "sequence"}
BOUNDS = {"epsilon_low": 0.2, "epsilon_high": 0.2}
ADAPTIVE = {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_coef_delta": 0.02}
GAMMA = {"k_positive": 1.0, "lambda_positive": 2.0, "k_negative": 1.5, "lambda_negative": 0.5}
THEIR_GAMMA = {"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 1.5, "vespo_lambda_neg": 0.5}


def dapo(**options: Any) -> Algorithm:
    return DAPO(**{"epsilon_high": 0.2, **options})


def adaptive(target: float, **options: Any) -> Algorithm:
    return dapo(entropy_coefficient=0.05, adaptive_entropy=AdaptiveEntropy(target, 0.02, **options))


def vllm(mode: str, **options: Any) -> dict[str, Any]:
    return {
        "loss_type": "grpo",
        "use_vllm": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": None,
        **{f"vllm_importance_sampling_{name}": value for name, value in options.items()},
    }


AGREE: list[tuple[dict[str, Any], Callable[[], Algorithm]]] = [
    ({"loss_type": "grpo"}, grpo),
    ({"loss_type": "bnpo"}, lambda: grpo(aggregation="token_mean")),
    ({"loss_type": "dr_grpo", "scale_rewards": "none"}, DrGRPO),
    ({"loss_type": "dapo"}, dapo),
    ({"loss_type": "cispo", "epsilon_high": 1.2}, lambda: CISPO(epsilon_high=0.2)),
    ({"loss_type": "sapo"}, SAPO),
    (
        {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
        lambda: SAPO(tau_positive=0.7, tau_negative=2.0),
    ),
    ({"loss_type": "luspo", **SEQUENCE}, lambda: LUSPO(**BOUNDS)),
    ({"loss_type": "vespo"}, VESPO),
    ({"loss_type": "vespo", **THEIR_GAMMA}, lambda: VESPO(**GAMMA)),
    ({"loss_type": "grpo", **SEQUENCE}, lambda: GSPO(**BOUNDS)),
    ({"loss_type": "grpo", "epsilon": 0.1}, lambda: grpo(epsilon_low=0.1)),
    ({"loss_type": "grpo", "epsilon_high": 0.4}, lambda: grpo(epsilon_high=0.4)),
    ({"loss_type": "grpo", "delta": 1.3}, lambda: grpo(delta=1.3)),
    ({"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False}, lambda: grpo(beta=0.1)),
    ({"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True}, lambda: grpo(beta=0.1, kl=UNBIASED)),
    ({"loss_type": "grpo", "scale_rewards": "batch"}, lambda: grpo(scale="batch")),
    ({"loss_type": "grpo", "scale_rewards": "none"}, lambda: grpo(scale="none")),
    ({"loss_type": "grpo", "scale_rewards": "none", "reward_weights": [1.0, 0.25]}, lambda: grpo(scale="none")),
    (
        {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.25]},
        GDPO,
    ),
    ({"loss_type": "dapo", "mask_truncated_completions": True}, lambda: dapo(mask_truncated=True)),
    (
        {"loss_type": "dapo", "top_entropy_quantile": 0.4},
        lambda: TopEntropy(epsilon_high=0.2, top_entropy=0.4),
    ),
    ({"loss_type": "dapo", "entropy_coef": 0.05}, lambda: dapo(entropy_coefficient=0.05)),
    ({**ADAPTIVE, "entropy_target": 9.0}, lambda: adaptive(9.0, maximum=1.0)),
    ({**ADAPTIVE, "entropy_target": 9.0, "entropy_coef_max": 0.06}, lambda: adaptive(9.0, maximum=0.06)),
    ({**ADAPTIVE, "entropy_target": 0.1}, lambda: adaptive(0.1)),
    ({"loss_type": "grpo", "use_vllm": True, "vllm_importance_sampling_correction": False}, grpo),
    (vllm("token_truncate", clip_max=1.1), lambda: by_token("token_tis", high=1.1)),
    (vllm("token_truncate", clip_max=1.1, clip_min=0.9), lambda: by_token("token_tis", low=0.9, high=1.1)),
    (vllm("sequence_truncate", clip_max=1.05), lambda: by_token("sequence_tis", high=1.05)),
    (vllm("token_mask", clip_max=1.1, clip_min=0.9), lambda: by_token("icepop", low=0.9, high=1.1)),
    (vllm("sequence_mask", clip_max=1.05), lambda: by_token("product_mask", high=1.05)),
    (vllm("sequence_mask", clip_min=1.0, clip_max=3.0), lambda: by_token("product_mask", low=1.0)),
    (vllm("token_truncate", cap=1.2), lambda: by_token("token_tis", high=1.2)),
    (
        {**vllm("token_truncate", clip_max=1e6), "off_policy_mask_threshold": 0.05},
        lambda: grpo(mismatch=Mismatch("token_tis", high=1e6), off_policy_threshold=0.05),
    ),
    ({**vllm("token_truncate", clip_max=1e6), "loss_type": "vespo"}, VESPO),
]

DIFFER: dict[str, tuple[dict[str, Any], Callable[[], Algorithm]]] = {
    "bnpo is no BNPO": ({"loss_type": "bnpo", "reward_weights": [1.0, 0.0]}, BNPO),
    "epsilon_high of cispo is the bound itself": (
        {"loss_type": "cispo", "epsilon_high": 0.2},
        lambda: CISPO(epsilon_high=0.2),
    ),
    "a mean over completions counts those that are masked": (
        {"loss_type": "grpo", "mask_truncated_completions": True},
        lambda: grpo(mask_truncated=True),
    ),
    "the entropy bonus is a token mean whatever the loss": (
        {"loss_type": "grpo", "entropy_coef": 0.05},
        lambda: grpo(entropy_coefficient=0.05),
    ),
    "beside top_entropy the bonus is one of the tokens selected": (
        {"loss_type": "dapo", "top_entropy_quantile": 0.4, "entropy_coef": 0.5},
        lambda: TopEntropy(epsilon_high=0.2, top_entropy=0.4, entropy_coefficient=0.5),
    ),
    "the adaptive coefficient has a lower bound other than 0": (
        {**ADAPTIVE, "entropy_target": 9.0, "entropy_coef_delta": 0.01, "entropy_coef_min": 0.2},
        lambda: adaptive(9.0),
    ),
    "a KL at sequence level is weighed by the completion's ratio": (
        {"loss_type": "grpo", **SEQUENCE, "beta": 0.1},
        lambda: GSPO(**BOUNDS, beta=0.1, kl=UNBIASED),
    ),
    "sequence_mask is a product, and the weight too": (
        vllm("sequence_mask", clip_min=0.5, clip_max=3.0),
        lambda: by_token("sequence_mask", low=0.5, high=3.0),
    ),
    "a sampler's ratios are truncated before VESPO's product": (
        {**vllm("token_truncate", clip_max=1.01), "loss_type": "vespo"},
        VESPO,
    ),
}
"""What TRL does where its maths is another; each is a row of "Same name, other maths" in docs/algorithms.md."""


def compared(case: Case, folder: Path, options: dict[str, Any], make: Callable[[], Algorithm]) -> tuple[float, float]:
    """The largest difference of an advantage, and of loss and gradient."""
    steps = 3 if "use_adaptive_entropy" in options else 1
    algorithm = make()
    other = theirs(case, folder, steps, **options)
    mine = ours(case, algorithm, steps, options.get("use_vllm", False), reward_weights=options.get("reward_weights"))
    return float((mine[0] - other[0]).abs().max()), distance(mine[1:], other[1:])


def name_of(options: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) if isinstance(options, dict) else ""


@pytest.mark.filterwarnings("ignore:The `vllm_importance_sampling_cap`:FutureWarning")
@pytest.mark.parametrize(("options", "make"), AGREE, ids=name_of)
def test_the_option_gives_the_advantages_and_the_loss_of_ours(
    case: Case, tmp_path: Path, options: dict[str, Any], make: Callable[[], Algorithm]
) -> None:
    of_advantages, of_loss = compared(case, tmp_path, options, make)
    assert of_advantages < 1e-6
    assert of_loss < 1e-6


@pytest.mark.parametrize("name", DIFFER)
def test_the_option_is_other_maths(case: Case, tmp_path: Path, name: str) -> None:
    assert compared(case, tmp_path, *DIFFER[name])[1] > 1e-4


def test_every_option_is_tried_and_named_in_the_docs() -> None:
    assert set(trl.GRPOConfig.__annotations__) >= OPTIONS
    assert {name for name in trl.GRPOConfig.__annotations__ if not ELSEWHERE.fullmatch(name)} == OPTIONS
    tried = {name for options, _ in [*AGREE, *DIFFER.values()] for name in options}
    assert tried >= OPTIONS
    table = (Path(__file__).parents[2] / "docs" / "from-trl.md").read_text()
    assert not [name for name in OPTIONS if f"`{name}`" not in table]
