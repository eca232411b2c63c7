"""Every option of TRL 1.16's GRPOConfig and RLOOConfig for advantages and losses: the values that TRL's own methods
give with it, and ours with the option that takes its place; or the formula by which the two differ.

TRL's scoring and loss run unchanged, with a config that holds the option, on completions that were sampled already.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
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
    RLOO,
    SAPO,
    VESPO,
    AdaptiveEntropy,
    Algorithm,
    DrGRPO,
    Mismatch,
    TokenBatch,
    TopEntropy,
)
from stateset_lightning.algorithm.advantages import whitened_advantages
from stateset_lightning.algorithm.aggregation import per_token
from stateset_lightning.policy import Group, Policy, PolicyConfig
from stateset_lightning.policy.routing import balance
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
SCORING = {"temperature", "router_aux_loss_coef"}
RLOO_OPTIONS = {"normalize_advantages", "reward_clip_range"}
ELSEWHERE = re.compile(
    "learning_rate|model_init_kwargs|trust_remote_code|disable_dropout|cast_lm_head_to_fp32"
    "|remove_unused_columns|num_.*|max_.*|ds3_.*|shuffle_dataset|pad_to_multiple_of|generation_.*|steps_per_generation"
    "|top_p|top_k|min_p|chat_template_kwargs|repetition_penalty|cache_implementation|use_vllm|sync_ref_model"
    "|ref_model_.*|log_.*|use_transformers_.*|transformers_.*"
    "|vllm_(mode|model_impl|enable_sleep_mode|structured_outputs_regex|server_.*|group_port|gpu_.*|max_.*|tensor_.*)"
)
"""Options of the model, of data, batches, sampling, logging: none changes what an advantage or a loss is."""

COLLECTIVES = ("gather", "gather_for_metrics", "reduce", "pad_across_processes")
LOGS = ("prompt", "completion", "rewards", "advantages", "extra", "images")
Result = tuple[Tensor, float, dict[str, Tensor]]


@pytest.fixture(scope="module")
def case() -> Case:
    case = Case()
    ends = case.input_ids[torch.arange(4), PROMPT + LENGTHS - 1]
    case.ends = [int(token) for token in ends[~TRUNCATED]]  # type: ignore[attr-defined]
    assert int(ends[1]) not in case.ends  # type: ignore[attr-defined]
    return case


def their_trainer(case: Case, folder: Path, name: str = "GRPO", **options: Any) -> Any:
    args = getattr(trl, f"{name}Config")(
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
    trainer = object.__new__(getattr(trl, f"{name}Trainer"))
    trainer.__dict__.update(vars(args))
    same = {name: lambda values, **_: values for name in COLLECTIVES}
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
        _entropy_bonus_enabled=name == "GRPO" and (args.entropy_coef != 0 or args.use_adaptive_entropy),
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
            is_main_process=True,
            sync_gradients=True,
            autocast=nullcontext,
            **same,
        ),
        _metrics={"train": defaultdict(list)},
        _logs={name: defaultdict(list) if name in ("rewards", "extra") else [] for name in LOGS},
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda prompts: sampled if name == "GRPO" else (*sampled[:2], sampled[3]),
        _calculate_rewards=lambda *_: SCORES.clone(),
        _get_per_token_logps_and_entropies=score,
    )
    return trainer


def theirs(case: Case, folder: Path, **options: Any) -> Result:
    trainer = their_trainer(case, folder, **options)
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * 4)
    loss = torch.zeros(())
    for case.sharpness in steps_of(options):
        loss = loss + trainer._compute_loss(case.model, inputs)
    case.sharpness = 1.0
    return inputs["advantages"], loss.item(), case.gradients(loss)


def steps_of(options: dict[str, Any]) -> tuple[float, ...]:
    """The sharpness of each optimizer step: for what adapts to entropies they are 3.4, four times, and then 1.9."""
    return (1, 1, 1, 1, 30, 30) if "use_adaptive_entropy" in options else (1,)


@dataclass
class Scene:
    """What a loss is made of, padded; weights are the trainer's probabilities over the sampler's."""

    loss: Tensor
    """Ours."""
    A: Tensor
    mask: Tensor
    logprobs: Tensor
    entropies: Tensor
    log_ratios: Tensor
    log_weights: Tensor

    def token_mean(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum() / self.mask.sum()

    def of_completions(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum(1, keepdim=True) / self.mask.sum(1, keepdim=True)

    def sequence_mean(self, values: Tensor) -> Tensor:
        return self.of_completions(values).mean()


def ours(
    case: Case, algorithm: Algorithm, options: dict[str, Any], gap: Callable[[Scene], Tensor] | None = None
) -> Result:
    """Advantages, loss of all steps and gradient; `gap`, of the last one, is added to the loss."""
    algorithm.setup(MAX_LENGTH)
    loss = torch.zeros(())
    keep, groups = case.mask.bool(), torch.tensor([0, 0, 1, 1])
    scores_PGF = SCORES.nan_to_num(NOT_APPLICABLE).reshape(2, 2, 2)
    weights_F = torch.tensor(options.get("reward_weights") or [1.0, 1.0])
    advantages_N = algorithm.advantages(scores_PGF, weights_F, LENGTHS.reshape(2, 2)).flatten()
    trains_N = ~TRUNCATED if algorithm.mask_truncated else torch.ones(4, dtype=torch.bool)
    weights_T = per_token(algorithm.token_weights(LENGTHS, groups, trains_N), LENGTHS)
    for case.sharpness in steps_of(options):
        logprobs, entropies = case.score()
        fields = {"ref_logprobs_T": case.reference[keep], "entropies_T": entropies[keep]}
        if options.get("use_vllm"):
            fields["sampling_logprobs_T"] = case.sampling[keep]
        tokens = TokenBatch(logprobs[keep], case.old[keep], advantages_N, LENGTHS, **fields)
        if algorithm.selects_tokens:
            fields["select_T"] = algorithm.select(tokens, seed=0)
            tokens = TokenBatch(logprobs[keep], case.old[keep], advantages_N, LENGTHS, **fields)
        loss = loss + (weights_T * algorithm.per_token_loss(tokens)[0]).sum()
        algorithm.adapt({"policy/entropy": float(entropies[keep].detach().mean())})
    case.sharpness = 1.0
    if gap is not None:
        moved = logprobs - case.old, case.old - case.sampling
        loss = loss + gap(Scene(loss, advantages_N[:, None], case.mask, logprobs, entropies, *moved))
    return advantages_N, loss.item(), case.gradients(loss)


def grpo(**options: Any) -> Algorithm:
    return GRPO(**{"beta": 0.0, **options})


def by_token(kind: Any, **bounds: Any) -> Algorithm:
    return grpo(mismatch=Mismatch(kind, **bounds))


SEQUENCE = {"importance_sampling_level": "sequence"}
BOUNDS = {"epsilon_low": 0.2, "epsilon_high": 0.2}
ADAPTIVE = {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_coef_delta": 0.02}
FROM_ZERO = {name: value for name, value in ADAPTIVE.items() if name != "entropy_coef"}
GAMMA = {"k_positive": 1.0, "lambda_positive": 2.0, "k_negative": 1.5, "lambda_negative": 0.5}
THEIR_GAMMA = {"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 1.5, "vespo_lambda_neg": 0.5}


def dapo(**options: Any) -> Algorithm:
    return DAPO(**{"epsilon_high": 0.2, **options})


def adaptive(target: float, start: float = 0.05, maximum: float = 1.0) -> Algorithm:
    return dapo(entropy_coefficient=start, adaptive_entropy=AdaptiveEntropy(target, 0.02, maximum))


def vllm(mode: str, **options: Any) -> dict[str, Any]:
    return {
        "loss_type": "grpo",
        "use_vllm": True,
        "vllm_importance_sampling_mode": mode,
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
    ({"loss_type": "grpo", "beta": 0.1}, lambda: grpo(beta=0.1, kl=UNBIASED)),
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
    ({**ADAPTIVE, "entropy_target": 9.0}, lambda: adaptive(9.0)),
    ({**FROM_ZERO, "entropy_target": 9.0, "entropy_coef_max": 0.06}, lambda: adaptive(9.0, 0.0, 0.06)),
    ({**ADAPTIVE, "entropy_target": 3.0, "entropy_coef": 0.5}, lambda: adaptive(3.0, 0.5)),  # falls, and rises again
    ({**FROM_ZERO, "entropy_target": 3.0}, lambda: adaptive(3.0, 0.0)),  # falls to no less than 0
    ({"loss_type": "grpo", "use_vllm": True, "vllm_importance_sampling_correction": False}, grpo),
    (vllm("token_truncate", clip_max=1.1), lambda: by_token("token_tis", high=1.1)),
    (vllm("token_truncate", clip_max=1.1, clip_min=0.9), lambda: by_token("token_tis", low=0.9, high=1.1)),
    (vllm("sequence_truncate", clip_max=1.05), lambda: by_token("sequence_tis", high=1.05)),
    (vllm("token_mask", clip_max=1.1, clip_min=0.9), lambda: by_token("icepop", low=0.9, high=1.1)),
    (vllm("sequence_mask", clip_max=1.05), lambda: by_token("product_mask", high=1.05)),
    (vllm("sequence_mask", clip_min=1.0), lambda: by_token("product_mask", low=1.0)),
    (vllm("token_truncate", cap=1.2), lambda: by_token("token_tis", high=1.2)),
    (
        {**vllm("token_truncate"), "off_policy_mask_threshold": 0.05},
        lambda: grpo(mismatch=Mismatch("token_tis", high=3.0), off_policy_threshold=0.05),
    ),
    ({"loss_type": "vespo", "use_vllm": True}, VESPO),
]


def clipped(ratio: Tensor, A: Tensor) -> Tensor:
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)


def other_ratio_of_sapo(scene: Scene) -> Tensor:
    tau = torch.where(scene.A > 0, 1.0, 1.05)
    logs = scene.of_completions(scene.log_ratios), scene.log_ratios
    whole, tokens = (4 / tau * torch.sigmoid(tau * (log.exp() - 1)) for log in logs)
    return scene.sequence_mean((tokens - whole) * scene.A)


def other_weight_of_cispo(scene: Scene, theirs: Tensor, bound: float, own_bound: float) -> Tensor:
    weights = theirs.clamp(max=bound) - scene.log_ratios.exp().clamp(max=own_bound)
    return scene.token_mean(-weights.detach() * scene.A * scene.logprobs)


def entropy_of_selected(scene: Scene) -> Tensor:
    selected = scene.entropies[scene.mask.bool()].topk(5).values  # 0.4 of 13
    return 0.5 * (scene.token_mean(scene.entropies) - selected.mean())


def kl_of_completions(scene: Scene, reference: Tensor) -> Tensor:
    k3 = (reference - scene.logprobs).exp() - (reference - scene.logprobs) - 1
    return 0.1 * scene.sequence_mean((scene.of_completions(scene.log_ratios).exp() - scene.log_ratios.exp()) * k3)


def other_mask(scene: Scene) -> Tensor:
    product = (scene.log_weights * scene.mask).sum(1, keepdim=True).exp()
    geometric_mean = scene.of_completions(scene.log_weights).exp()
    weights = torch.where(product > 0.78, product, 0.0)
    own = torch.where(geometric_mean > 0.78, scene.log_weights.exp(), 0.0)
    return scene.sequence_mean((weights - own) * clipped(scene.log_ratios.exp(), scene.A))


def other_product(scene: Scene) -> Tensor:
    k, decay = (torch.where(scene.A >= 0, *pair) for pair in ((2.0, 3.0), (3.0, 2.0)))

    def weight(log_weights: Tensor) -> Tensor:
        log = ((scene.log_ratios.detach() + log_weights) * scene.mask).sum(1, keepdim=True)
        return (k * log + decay * (1 - log.exp())).exp()

    weights = weight(scene.log_weights.clamp(max=math.log(1.01))) - weight(scene.log_weights)
    return scene.token_mean(-weights * scene.A * scene.logprobs)


Differing = tuple[dict[str, Any], Callable[[], Algorithm], Callable[[Scene, Case], Tensor]]
DIFFER: dict[str, Differing] = {
    "epsilon_high of cispo is the bound itself": (
        {"loss_type": "cispo", "epsilon_high": 0.9},
        lambda: CISPO(epsilon_high=0.9),
        lambda scene, _: other_weight_of_cispo(scene, scene.log_ratios.exp(), 0.9, 1.9),
    ),
    "sapo at sequence level is a gate of the completion's ratio": (
        {"loss_type": "sapo", **SEQUENCE},
        SAPO,
        lambda scene, _: other_ratio_of_sapo(scene),
    ),
    "cispo at sequence level weighs by the completion's ratio": (
        {"loss_type": "cispo", "epsilon_high": 1.05, **SEQUENCE},
        lambda: CISPO(epsilon_high=0.05),
        lambda scene, _: other_weight_of_cispo(scene, scene.of_completions(scene.log_ratios).exp(), 1.05, 1.05),
    ),
    "a mean over completions counts those that are masked": (
        {"loss_type": "grpo", "mask_truncated_completions": True},
        lambda: grpo(mask_truncated=True),
        lambda scene, _: (3 / 4 - 1) * scene.loss,
    ),
    "a mean of constant length counts them too": (
        {"loss_type": "dr_grpo", "scale_rewards": "none", "mask_truncated_completions": True},
        lambda: DrGRPO(mask_truncated=True),
        lambda scene, _: (3 / 4 - 1) * scene.loss,
    ),
    "the entropy bonus is a token mean whatever the loss": (
        {"loss_type": "grpo", "entropy_coef": 0.5},
        lambda: grpo(entropy_coefficient=0.5),
        lambda scene, _: 0.5 * (scene.sequence_mean(scene.entropies) - scene.token_mean(scene.entropies)),
    ),
    "beside top_entropy the bonus is one of the tokens selected": (
        {"loss_type": "dapo", "top_entropy_quantile": 0.4, "entropy_coef": 0.5},
        lambda: TopEntropy(epsilon_high=0.2, top_entropy=0.4, entropy_coefficient=0.5),
        lambda scene, _: entropy_of_selected(scene),
    ),
    "the adaptive coefficient has a lower bound other than 0": (
        {**FROM_ZERO, "entropy_target": 3.0, "entropy_coef_min": 0.04},
        lambda: adaptive(3.0, 0.0),
        lambda scene, _: -(0.06 - 0.02) * scene.token_mean(scene.entropies),  # both have risen once
    ),
    "a KL at sequence level is weighed by the completion's ratio": (
        {"loss_type": "grpo", **SEQUENCE, "beta": 0.1},
        lambda: GSPO(**BOUNDS, beta=0.1, kl=UNBIASED),
        lambda scene, case: kl_of_completions(scene, case.reference),
    ),
    "sequence_mask is a product, and the weight too": (
        vllm("sequence_mask", clip_min=0.78),
        lambda: by_token("sequence_mask", low=0.78, high=3.0),
        lambda scene, _: other_mask(scene),
    ),
    "a sampler's ratios are truncated before VESPO's product": (
        {**vllm("token_truncate", clip_max=1.01), "loss_type": "vespo"},
        VESPO,
        lambda scene, _: other_product(scene),
    ),
}
"""What TRL does where its maths is another, and its loss minus ours by hand; each is a row of "Same name, other maths"
in docs/algorithms.md."""


def apart(one: Result, other: Result) -> tuple[float, float]:
    """The largest difference of an advantage, and of loss and gradient."""
    return float((one[0] - other[0]).abs().max()), distance(one[1:], other[1:])


def name_of(options: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) if isinstance(options, dict) else ""


NO_LONGER = pytest.mark.filterwarnings("ignore:The `vllm_importance_sampling_cap`:FutureWarning")


@NO_LONGER
@pytest.mark.parametrize(("options", "make"), AGREE, ids=name_of)
def test_the_option_gives_the_advantages_and_the_loss_of_ours(
    case: Case, tmp_path: Path, options: dict[str, Any], make: Callable[[], Algorithm]
) -> None:
    assert max(apart(ours(case, make(), options), theirs(case, tmp_path, **options))) < 1e-6


@pytest.mark.parametrize("name", DIFFER)
def test_the_option_is_other_maths(case: Case, tmp_path: Path, name: str) -> None:
    options, make, gap = DIFFER[name]
    other = theirs(case, tmp_path, **options)
    assert apart(ours(case, make(), options), other)[1] > 1e-3
    assert max(apart(ours(case, make(), options, lambda scene: gap(scene, case)), other)) < 1e-6


@NO_LONGER
@pytest.mark.parametrize("options", [options for options, *_ in [*AGREE, *DIFFER.values()]], ids=name_of)
def test_each_option_of_a_case_has_an_effect_there(case: Case, tmp_path: Path, options: dict[str, Any]) -> None:
    given = theirs(case, tmp_path, **options)
    defaults = {name: trl.GRPOConfig.__dataclass_fields__[name].default for name in options}
    for name in (OPTIONS - {"loss_type"}) & {name for name in options if options[name] != defaults[name]}:
        without = {key: value for key, value in options.items() if key != name}
        assert max(apart(given, theirs(case, tmp_path, **without))) > 1e-4, name


def test_bnpo_has_no_density_there(case: Case, tmp_path: Path) -> None:
    """The groups' means are 1/2 and 1/4, and their variance 1/32."""
    options = {"loss_type": "bnpo", "scale_rewards": "none", "reward_weights": [1.0, 0.0]}
    mean, a_plus_b = 3 / 8, 3 / 8 * 5 / 8 * 32 - 1
    alpha, beta = 1 + mean * a_plus_b / 3, 1 + (1 - mean) * a_plus_b / 3
    constant = math.gamma(alpha + beta) / math.gamma(alpha) / math.gamma(beta)
    densities = [constant * p ** (alpha - 1) * (1 - p) ** (beta - 1) for p in (1 / 2, 1 / 2, 1 / 4, 1 / 4)]
    expected = theirs(case, tmp_path, **options)[0] / torch.tensor(densities)
    torch.testing.assert_close(ours(case, BNPO(), options)[0], expected, atol=1e-6, rtol=0)


# RLOOTrainer ----------------------------------------------------------------------------------------------------------


def rloo(case: Case, folder: Path, algorithm: Algorithm, **options: Any) -> tuple[Result, Result]:
    """Theirs and ours of the policy that sampled."""
    trainer, keep = their_trainer(case, folder, "RLOO", reward_weights=[1.0, 0.25], **options), case.mask.bool()
    case.old, noisy = case.score()[0].detach(), case.old
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * 4)
    loss = trainer._compute_loss(case.model, inputs)
    other = inputs["advantages"], loss.item(), case.gradients(loss)
    scores, weights = SCORES.nan_to_num(NOT_APPLICABLE), [1.0, 0.25]
    if algorithm.kl_in_reward:
        kl_N = algorithm.kl_scores(case.old[keep], case.reference[keep], LENGTHS)
        scores, weights = torch.cat([scores, kl_N[:, None]], 1), [*weights, -algorithm.kl_coefficient]
    advantages_N = algorithm.advantages(scores.reshape(2, 2, -1), torch.tensor(weights, dtype=torch.double)).flatten()
    fixed = {"ref_logprobs_T": case.reference[keep]}
    tokens = TokenBatch(case.score()[0][keep], case.old[keep], advantages_N, LENGTHS, **fixed)
    weights_T = per_token(algorithm.token_weights(LENGTHS, torch.tensor([0, 0, 1, 1])), LENGTHS)
    loss = (weights_T * algorithm.per_token_loss(tokens)[0]).sum()
    case.old = noisy
    return other, (advantages_N, loss.item(), case.gradients(loss))


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo_has_the_advantages_and_the_gradient_of_theirs_on_policy(case: Case, tmp_path: Path, beta: float) -> None:
    """The values differ: theirs is -A, ours -A log-prob."""
    other, mine = rloo(case, tmp_path, RLOO(beta=beta), beta=beta)
    assert other[1] == pytest.approx(-float(other[0].mean()))
    assert max(apart(mine, (other[0], mine[1], other[2]))) < 1e-6


def test_normalised_advantages_of_rloo_are_whitened_ones(case: Case, tmp_path: Path) -> None:
    """In groups of two they are twice the differences from the mean: of the 1e-4 in their deviation half is left."""

    class Normalised(RLOO, advantage=whitened_advantages):
        pass

    other, mine = rloo(case, tmp_path, Normalised(), beta=0.0, normalize_advantages=True)
    differences = rloo(case, tmp_path, RLOO(), beta=0.0)[1][0] / 2
    expected = mine[0] * (differences.std() + 1e-4) / (differences.std() + 1e-4 / 2)
    torch.testing.assert_close(other[0], expected, atol=1e-6, rtol=0)


def test_a_reward_clip_range_of_rloo_clips_the_weighted_sum(case: Case, tmp_path: Path) -> None:
    other, _ = rloo(case, tmp_path, RLOO(), beta=0.0, reward_clip_range=(0.1, 0.8))
    totals = torch.tensor([1.05, 0.225, 0.5, 0.025], dtype=torch.float64).clamp(0.1, 0.8)
    expected = RLOO().advantages(totals.reshape(2, 2, 1), torch.ones(1)).flatten()
    torch.testing.assert_close(other[0], expected, atol=1e-6, rtol=0)


# Scoring --------------------------------------------------------------------------------------------------------------


def scoring_trainer(case: Case, folder: Path, model: Any, **options: Any) -> Any:
    """One that scores with a model by TRL's own head."""
    trainer = their_trainer(case, folder, loss_type="grpo", **options)
    del trainer._get_per_token_logps_and_entropies
    trl.trainer.utils.add_fused_lm_head(model, trainer.temperature, outputs=("log_probs", "entropy"))
    trainer.model = model.train()
    return trainer


def rows(case: Case, length_of_prompt: int = PROMPT) -> list[Group]:
    """The completions, each with its prompt."""
    ends = (PROMPT + LENGTHS).tolist()
    tokens = [row[:end] for row, end in zip(case.input_ids.tolist(), ends, strict=True)]
    return [Group(row[:length_of_prompt], [row[length_of_prompt:]]) for row in tokens]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logits_are_divided_by_the_temperature(
    case: Case, tmp_path: Path, make_model: Callable[..., Any], temperature: float
) -> None:
    model = make_model("llama")
    mine = Policy(model, PolicyConfig("random")).score(rows(case), temperature)
    trainer = scoring_trainer(case, tmp_path, model, temperature=temperature)
    attended = torch.cat([torch.ones(4, PROMPT), case.mask], 1)
    other = trainer._get_per_token_logps_and_entropies(model, case.input_ids, attended, 5, compute_entropy=True)[:2]
    for values_T, theirs_NL in zip(mine, other, strict=True):
        torch.testing.assert_close(values_T, theirs_NL[case.mask.bool()], atol=1e-5, rtol=0)


def test_the_loss_of_routers_is_theirs_where_prompts_count_too(
    case: Case, tmp_path: Path, make_model: Callable[..., Any]
) -> None:
    """Advantages of zero leave theirs nothing else. One more token has ours count the last one of each row."""
    model, coefficient = make_model("mixtral"), 0.5
    policy = Policy(model, PolicyConfig("random", router_aux_loss=coefficient))
    policy.routed = 0
    groups = [Group(group.prompt, [[*group.completions[0], 0]]) for group in rows(case, 1)]
    policy.score(groups)
    loss = coefficient * balance(*policy.routed / sum(group.num_completion_tokens for group in groups))
    names, gates = zip(*((n, p) for n, p in model.named_parameters() if "gate.weight" in n), strict=True)
    expected = torch.autograd.grad(loss, gates)
    trainer = scoring_trainer(case, tmp_path, model, router_aux_loss_coef=coefficient)
    trainer.aux_loss_enabled = True
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * 4)
    other = trainer._compute_loss(model, {**inputs, "advantages": torch.zeros(4)})
    torch.testing.assert_close(other, loss, atol=1e-6, rtol=0)
    for gradient, theirs_, name in zip(expected, torch.autograd.grad(other, gates), names, strict=True):
        assert gradient.norm() > 1e-4
        torch.testing.assert_close(gradient, theirs_, atol=1e-6, rtol=1e-4, msg=name)


def test_every_option_is_tried_and_named_in_the_docs() -> None:
    names = trl.GRPOConfig.__annotations__.keys()
    assert {name for name in names if not ELSEWHERE.fullmatch(name)} == OPTIONS | SCORING
    assert trl.RLOOConfig.__annotations__.keys() - names == RLOO_OPTIONS
    tried = {name for options, *_ in [*AGREE, *DIFFER.values()] for name in options}
    assert tried >= OPTIONS
    table = (Path(__file__).parents[2] / "docs" / "from-trl.md").read_text()
    assert not [name for name in OPTIONS | SCORING | RLOO_OPTIONS if f"`{name}`" not in table]
