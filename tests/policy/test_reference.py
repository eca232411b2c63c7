"""The reference of a policy with an adapter: the policy as it started, without a second model."""

from collections.abc import Callable
from pathlib import Path

import torch
from policy.test_lora import move
from policy.test_policy import GROUPS

from stateset_lightning.policy import AdapterReference, LoRAConfig, Policy, PolicyConfig, load_model, make_reference


def test_an_adapter_s_reference_is_the_model_under_it(model_folder: Callable[..., Path]) -> None:
    name = str(model_folder("llama"))
    config = PolicyConfig(name, lora=LoRAConfig(rank=4, dropout=0.5))
    policy, plain = Policy(load_model(config), config), Policy(load_model(PolicyConfig(name)), PolicyConfig(name))
    reference = make_reference(policy, torch.float32)
    assert isinstance(reference, AdapterReference)
    expected = plain.score_without_gradient(GROUPS, 0.7)
    # B is zero
    assert all(torch.equal(x, y) for x, y in zip(policy.score_without_gradient(GROUPS, 0.7), expected, strict=True))
    policy.train()
    move(policy.model)
    moved = policy.score_without_gradient(GROUPS, 0.7)[0]
    assert all(torch.equal(x, y) for x, y in zip(reference.score_without_gradient(GROUPS, 0.7), expected, strict=True))
    assert torch.equal(policy.score_without_gradient(GROUPS, 0.7)[0], moved)
    assert not torch.allclose(moved, expected[0], atol=0.1)


def test_without_an_adapter_it_is_a_second_model_from_the_source(model_folder: Callable[..., Path]) -> None:
    config = PolicyConfig(str(model_folder("llama")))
    policy = Policy(load_model(config), config)
    expected = policy.score_without_gradient(GROUPS)[0]
    move(policy.model)
    reference = make_reference(policy, torch.float32)
    assert isinstance(reference, Policy)
    assert torch.equal(reference.score_without_gradient(GROUPS)[0], expected)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
