"""Loss and gradient of every parameter against TRL 1.16's `GRPOTrainer._compute_loss`, on one small model. Where
the two differ: test_trl_options.py.

TRL's method runs unchanged on a trainer that holds nothing else: one process, one optimizer step per batch.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from stateset_lightning.algorithm import (
    CISPO,
    DAPO,
    GKD,
    GRPO,
    GSPO,
    KL,
    LUSPO,
    SAPO,
    Algorithm,
    Clipped,
    DrGRPO,
    GSPOToken,
    Mismatch,
    TokenBatch,
    TopEntropy,
)
from stateset_lightning.algorithm.aggregation import per_token

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0 --constraint constraints.txt")

LENGTHS = torch.tensor([5, 1, 3, 4])
LONGEST = 5
MAX_LENGTH = 8
ADVANTAGES = torch.tensor([1.2, -0.7, -1.1, 0.6], dtype=torch.float64)
PROMPT = 3

K3 = KL()
UNBIASED = KL("k3_unbiased")


class Case:
    """Prompts and completions for one model, and fixed log-probs that differ from its own by noise."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        config = Qwen2Config(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = Qwen2ForCausalLM(config).double().train()
        self.input_ids = torch.randint(0, 31, (4, PROMPT + LONGEST), generator=generator)
        self.mask = (torch.arange(LONGEST) < LENGTHS[:, None]).double()

        def noisy(scale: float) -> Tensor:
            noise = torch.randn(4, LONGEST, generator=generator, dtype=torch.float64)
            return self.score()[0].detach() + scale * noise

        self.sharpness = 1.0
        self.old, self.reference, self.sampling = noisy(0.3), noisy(0.5), noisy(0.2)

    def score(self) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the completions, padded; the sharper the logits, the lower the entropies."""
        logits = self.sharpness * self.model(self.input_ids).logits[:, PROMPT - 1 : -1]
        logprobs = logits.log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, self.input_ids[:, PROMPT:, None]).squeeze(-1), entropies

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        self.model.zero_grad()
        loss.backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def theirs(case: Case, micro_batches: int = 1, **options: Any) -> tuple[float, dict[str, Tensor]]:
    """Value and gradient of TRL's loss; `options` are attributes and arguments by TRL's names."""
    trainer = object.__new__(trl.GRPOTrainer)
    defaults: dict[str, Any] = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "aux_loss_enabled": False,
        "entropy_coef": 0.0,
    }
    arguments: dict[str, Any] = {
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "steps_per_generation": micro_batches,
    }
    attributes = {name: options.pop(name, value) for name, value in defaults.items()}
    trainer.__dict__.update(attributes)
    trainer.args = SimpleNamespace(**{name: options.pop(name, value) for name, value in arguments.items()})
    trainer._entropy_bonus_enabled = trainer.entropy_coef > 0
    trainer.use_adaptive_entropy = False
    trainer.max_completion_length = MAX_LENGTH
    trainer.current_gradient_accumulation_steps = micro_batches
    trainer.model = case.model
    trainer._metrics = {"train": defaultdict(list)}
    same = {name: lambda values, **_: values for name in ("gather", "reduce", "pad_across_processes")}
    trainer.accelerator = SimpleNamespace(num_processes=1, sync_gradients=True, autocast=nullcontext, **same)
    inputs = {
        "prompt_ids": case.input_ids[:, :PROMPT],
        "prompt_mask": torch.ones(4, PROMPT),
        "completion_ids": case.input_ids[:, PROMPT:],
        "completion_mask": case.mask,
        "advantages": ADVANTAGES,
        "old_per_token_logps": case.old,
        "ref_per_token_logps": case.reference,
        **options,
    }
    loss = torch.zeros(())
    for rows in torch.arange(4).chunk(micro_batches):
        scored = tuple(values[rows] for values in case.score())
        trainer._get_per_token_logps_and_entropies = lambda *_, scored=scored, **__: (*scored, None)
        of_rows = {name: values[rows] for name, values in inputs.items()}
        loss = loss + trainer._compute_loss(case.model, {**of_rows, "num_items_in_batch": LENGTHS.sum()})
    return loss.item(), case.gradients(loss)


def ours(
    case: Case, algorithm: Algorithm, sampling: bool = False, select_T: Tensor | None = None
) -> tuple[float, dict[str, Tensor]]:
    algorithm.setup(MAX_LENGTH)
    keep = case.mask.bool()
    logprobs, entropies = case.score()
    fields = {"ref_logprobs_T": case.reference[keep], "entropies_T": entropies[keep]}
    if sampling:
        fields["sampling_logprobs_T"] = case.sampling[keep]
    if algorithm.selects_tokens:
        seen = TokenBatch(case.old[keep], case.old[keep], ADVANTAGES, LENGTHS, entropies_T=entropies[keep].detach())
        fields["select_T"] = algorithm.select(seen, seed=0) if select_T is None else select_T
    tokens = TokenBatch(logprobs[keep], case.old[keep], ADVANTAGES, LENGTHS, **fields)
    weights_T = per_token(algorithm.token_weights(LENGTHS, torch.tensor([0, 0, 1, 1])), LENGTHS)
    loss = (weights_T * algorithm.per_token_loss(tokens)[0]).sum()
    return loss.item(), case.gradients(loss)


def distance(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> float:
    """The largest difference of the values and of any parameter's gradient, relative to the gradient's norm."""
    (value, gradients), (other_value, other_gradients) = one, other
    assert gradients.keys() == other_gradients.keys()
    assert all(float(g.norm()) > 0 for g in gradients.values())
    relative = [float((g - other_gradients[name]).norm() / g.norm()) for name, g in gradients.items()]
    return max(abs(value - other_value), *relative)


def beta(algorithm: type[Algorithm], kl: KL | None, **options: Any) -> Algorithm:
    return algorithm(**options, **({"beta": 0.0} if kl is None else {"beta": 0.1, "kl": kl}))


def their_kl(kl: KL | None) -> dict[str, Any]:
    return {"beta": 0.0 if kl is None else 0.1, "use_bias_correction_kl": kl is UNBIASED}


TOKEN_LEVEL = {
    "grpo": (GRPO, {}, {}),
    "grpo, delta": (GRPO, {"delta": 1.3}, {"delta": 1.3}),
    "grpo, batch of one bound": (GRPO, {"epsilon_high": 0.28}, {"epsilon_high": 0.28}),
    "bnpo": (GRPO, {"aggregation": "token_mean"}, {"loss_type": "bnpo"}),
    "dr_grpo": (DrGRPO, {}, {"loss_type": "dr_grpo"}),
    "dapo": (DAPO, {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "cispo": (CISPO, {"epsilon_high": 0.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": (SAPO, {}, {"loss_type": "sapo"}),
    "luspo by token": (GRPO, {"aggregation": "sequence_sum"}, {"loss_type": "luspo"}),
    "top entropy": (
        TopEntropy,
        {"top_entropy": 0.4},
        {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.4},
    ),
    "off-policy mask": (GRPO, {"off_policy_threshold": 0.1}, {"off_policy_mask_threshold": 0.1}),
}


@pytest.mark.parametrize("kl", [None, K3, UNBIASED], ids=["no KL", "k3", "k3 unbiased"])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_token_level_losses_agree(case: Case, name: str, kl: KL | None) -> None:
    preset, options, their_options = TOKEN_LEVEL[name]
    assert distance(ours(case, beta(preset, kl, **options)), theirs(case, **their_options, **their_kl(kl))) < 1e-6


SEQUENCE_LEVEL = {
    "gspo": (GSPO, {}, {"epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    "gspo, wide": (
        GSPO,
        {"epsilon_low": 0.1, "epsilon_high": 0.1, "delta": 1.15},
        {"epsilon_low": 0.1, "epsilon_high": 0.1, "delta": 1.15},
    ),
    "gspo-token": (GSPOToken, {"epsilon_low": 0.1, "epsilon_high": 0.1}, {"epsilon_low": 0.1, "epsilon_high": 0.1}),
    "gspo, token mean": (
        GSPO,
        {"aggregation": "token_mean"},
        {"loss_type": "dapo", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo, constant length": (
        GSPO,
        {"aggregation": "constant_length"},
        {"loss_type": "dr_grpo", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "luspo": (LUSPO, {}, {"loss_type": "luspo", "epsilon_low": 2e-3, "epsilon_high": 2.5e-3}),
}


@pytest.mark.parametrize("kl", [None, K3], ids=["no KL", "k3"])
@pytest.mark.parametrize("name", SEQUENCE_LEVEL)
def test_sequence_level_losses_agree(case: Case, name: str, kl: KL | None) -> None:
    preset, options, their_options = SEQUENCE_LEVEL[name]
    their_loss = theirs(case, importance_sampling_level="sequence", **their_options, **their_kl(kl))
    assert distance(ours(case, beta(preset, kl, **options)), their_loss) < 1e-6


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_sampling_agrees(case: Case, level: str) -> None:
    """TRL is handed the truncated ratio that it computes when it samples."""
    difference = (case.old - case.sampling) * case.mask
    log_ratio = difference if level == "token" else difference.sum(-1, keepdim=True)
    ratio = log_ratio.exp().clamp(max=1.1)
    kind = "token_tis" if level == "token" else "sequence_tis"
    algorithm = GRPO(beta=0.0, mismatch=Mismatch(kind, high=1.1))  # type: ignore[arg-type]
    assert (
        distance(ours(case, algorithm, sampling=True), theirs(case, use_vllm=True, importance_sampling_ratio=ratio))
        < 1e-6
    )


def test_the_off_policy_mask_reads_the_samplers_log_probs_as_theirs_does(case: Case) -> None:
    algorithm = GRPO(beta=0.0, off_policy_threshold=0.05)
    their_loss = theirs(case, off_policy_mask_threshold=0.05, sampling_per_token_logps=case.sampling)
    assert distance(ours(case, algorithm, sampling=True), their_loss) < 1e-6


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_tokens_of_high_entropy_are_selected_in_each_micro_batch_there(case: Case, micro_batches: int) -> None:
    entropies = [row[:length] for row, length in zip(case.score()[1].detach(), LENGTHS, strict=True)]
    size, kept = 4 // micro_batches, {1: [6], 2: [3, 3]}[micro_batches]  # 0.45 of 13; of 6 and of 7
    seen = [torch.cat(entropies[i : i + size]) for i in range(0, 4, size)]
    select_T = torch.cat([of >= of.topk(count).values[-1] for of, count in zip(seen, kept, strict=True)])
    options = {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.45}
    other, algorithm = theirs(case, micro_batches, **options), TopEntropy(top_entropy=0.45)
    assert distance(ours(case, algorithm, select_T=select_T), other) < 1e-6
    assert (distance(ours(case, algorithm), other) < 1e-6) == (micro_batches == 1)


def test_clipped_is_the_common_part(case: Case) -> None:
    assert distance(ours(case, Clipped()), theirs(case)) < 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_divergence_and_its_gradient_are_those_of_trls_distillation(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(1, 6, 31, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=0.7, reduction="sum")
    logps, teacher_logps = ((logits[0] / 0.7).log_softmax(-1) for logits in (student, teacher))
    values, gradient = GKD(jsd_beta=beta).divergence(logps, teacher_logps)
    assert values.sum().item() == pytest.approx(theirs.item(), abs=1e-9)
    (expected,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(gradient / 0.7, expected[0], atol=1e-9, rtol=0)
