"""The loss that balances experts: that of transformers, however the tokens are divided, and refused where there is
none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from module_runs import GradientRecorder, fit, make_data, make_module, weights
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import Group, LoRAConfig, Policy, PolicyConfig
from stateset_lightning.policy.routing import balance

COEFFICIENT = 0.5
GROUPS = [Group(list(range(20, 40)), [[4, 5, 6], [7]])]


def policy_of(model: Any, **options: Any) -> Policy:
    return Policy(model, PolicyConfig("random", router_aux_loss=COEFFICIENT, **options))


def routed(policy: Policy, groups: list[Group]) -> Tensor:
    policy.routed = 0
    policy.score(groups)
    sums: Tensor = policy.routed
    return sums


@pytest.mark.parametrize("scoring", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_and_its_gradient_are_those_of_transformers(
    scoring: str, checkpointing: bool, make_model: Callable[..., Any]
) -> None:
    own, model = make_model("mixtral"), make_model("mixtral")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = policy_of(model, scoring=scoring).train()
    prompt, completion = list(range(20, 33)), [5, 9, 7, 60, 31]
    output = own(torch.tensor([prompt + completion]), output_router_logits=True)
    predicts = torch.tensor([[0] * (len(prompt) - 1) + [1] * len(completion) + [0]])  # positions that predict a token
    expected = load_balancing_loss_func(output.router_logits, 4, 2, predicts)
    expected.backward()
    probabilities_E, chosen_E = routed(policy, [Group(prompt, [completion])]) / len(completion)
    loss = balance(probabilities_E, chosen_E)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in own.named_parameters():
        if "gate.weight" in name:
            assert parameter.grad.abs().max() > 1e-4
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("scoring", ["packed", "padded"])
def test_each_sampled_token_counts_once_and_padding_never(scoring: str, make_model: Callable[..., Any]) -> None:
    policy = policy_of(make_model("mixtral"), scoring=scoring)
    first, second = Group(list(range(20, 40)), [[4, 5, 6], [7]]), Group([8, 9], [[11] * 6], [[True, False] * 3])
    alone = routed(policy, [Group(first.prompt, [c]) for c in first.completions]) + routed(policy, [second])
    assert float(alone[1].sum()) == pytest.approx(2 * 7)  # two experts of each token
    torch.testing.assert_close(routed(policy, [first, second]), alone)


def test_a_model_without_such_a_loss_is_refused(make_model: Callable[..., Any]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    by_bias = DeepseekV3Config(
        vocab_size=384, num_key_value_heads=4, moe_intermediate_size=16, first_k_dense_replace=0, **sizes, **ranks,
        **experts,
    )  # fmt: skip
    for model in (make_model("llama"), DeepseekV3ForCausalLM(by_bias).eval()):
        with pytest.raises(ConfigError, match=r"^model\.policy\.router_aux_loss=0\.5: .* has no such loss .* to 0$"):
            policy_of(model)


@pytest.mark.parametrize(("kind", "config"), [(MixtralForCausalLM, MixtralConfig), (PhimoeForCausalLM, PhimoeConfig)])
def test_routers_choose_in_training_as_in_sampling(kind: Any, config: Any) -> None:
    """Mixtral's may multiply what they see by noise in training, and PhiMoE's draw experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    options = {"num_hidden_layers": 2, "num_local_experts": 4, "router_jitter_noise": 0.3, "initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(vocab_size=384, pad_token_id=0, **sizes, **options)).eval()
    policy = Policy(model, PolicyConfig("random", scoring="padded")).train()
    trained = policy.score(GROUPS)[0]
    assert torch.equal(policy.score_without_gradient(GROUPS)[0], trained)
    assert torch.equal(policy.score(GROUPS)[0], trained)  # the mode is as it was
    assert model.model.layers[0].training


# Through fit
# ----------------------------------------------------------------------------------------------------------------------


def varied(turns: Any, context: Any) -> float:
    return float(sum(map(ord, turns[-1].content)) % 7)


@pytest.fixture
def mixtral(model_folder: Callable[..., Path]) -> str:
    return str(model_folder("mixtral"))


def test_the_gradient_does_not_depend_on_how_a_step_is_divided(mixtral: str, tmp_path: Path) -> None:
    found = {}
    for coefficient, micro_steps in ((COEFFICIENT, 1), (COEFFICIENT, 4), (0.0, 4)):
        recorder, policy = GradientRecorder(), PolicyConfig(mixtral, router_aux_loss=coefficient)
        data = make_data(steps_per_episode=micro_steps)
        options = {"accumulate_grad_batches": micro_steps, "max_steps": 1, "callbacks": [recorder]}
        trainer = fit(tmp_path, make_module(policy, reward=varied), data, **options)
        found[coefficient, micro_steps] = recorder.steps[0]
        metrics = trainer.lightning_module.metrics.last
        assert ("train/router_aux_loss" in metrics) == bool(coefficient)
        if coefficient:
            assert 1.9 < metrics["train/router_aux_loss"] < 4  # 2 where all are used alike, two being chosen
    whole, divided, without = found.values()
    assert any("gate.weight" in name for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(divided[name], gradient, rtol=1e-4, atol=1e-7)
        if "gate.weight" in name:
            assert (gradient - without[name]).norm() > 0.1 * gradient.norm()


def test_a_run_with_an_adapter_leaves_routers_alone_and_resumes(
    mixtral: str, tmp_path: Path, make_model: Callable[..., Any]
) -> None:
    policy = PolicyConfig(mixtral, lora=LoRAConfig(rank=2), router_aux_loss=COEFFICIENT)
    data = {"num_iterations": 2, "steps_per_episode": 2}
    whole = fit(tmp_path, make_module(policy, reward=varied), make_data(**data), max_steps=3)
    half = fit(tmp_path, make_module(policy, reward=varied), make_data(**data), max_steps=1)  # inside an episode
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(
        tmp_path, make_module(policy, reward=varied), make_data(**data), max_steps=3, ckpt_path=tmp_path / "half.ckpt"
    )
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(whole).items())
    last, metric = whole.lightning_module.metrics.last, "train/router_aux_loss"
    assert resumed.lightning_module.metrics.last[metric] == last[metric]
    assert resumed.lightning_module.policy_config.router_aux_loss == COEFFICIENT
    trained, start = whole.lightning_module.policy.model, make_model("mixtral")
    routers = [name for name, _ in start.named_parameters() if "gate.weight" in name]
    assert routers
    assert all(torch.equal(trained.get_parameter(name), start.get_parameter(name)) for name in routers)
