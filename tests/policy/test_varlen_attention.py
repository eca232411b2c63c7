"""Variable-length attention: which layers take it, what it launches and copies, and how exact it is in half precision.

That it computes what attention under a whole mask does is in test_packed_attention.py and test_policy.py.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from plain_kernels import plain_kernels
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from windowed_models import random_tokens, windowed_model

from stateset_lightning.errors import tell_once
from stateset_lightning.policy import Group, Policy, PolicyConfig, head, varlen_attention
from stateset_lightning.policy.packed_attention import Layout

CPU = torch.device("cpu")
FORWARD, BACKWARD = "_flash_attention_forward", "_flash_attention_backward"
TOKENS = random_tokens(9, 6, 2, 4)


@pytest.fixture(autouse=True)
def _announce_again() -> Iterator[None]:
    yield
    tell_once.cache_clear()


class Launches(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def make_policy(model: Any, **options: Any) -> Policy:
    policy = Policy(model, PolicyConfig("random", scoring="packed", **options))
    policy.zero_grad(set_to_none=True)
    return policy


def launches(policy: Policy, groups: list[Group]) -> Counter[str]:
    """Of a forward and a backward pass."""
    policy.zero_grad(set_to_none=True)
    with Launches() as seen:
        policy.score(groups)[0].sum().backward()
    return seen.counts


@pytest.mark.parametrize(("family", "calls"), [("llama", 4), ("mistral", 2), ("gemma3_text", 3)])
def test_two_layers_launch_as_much_for_many_groups_as_for_one(
    make_model: Callable[..., Any], family: str, calls: int
) -> None:
    """Two calls of the kernel in a layer that sees all, one in a layer with a window (all of them, or half)."""
    one = [Group(TOKENS[0], TOKENS[1:])]
    with plain_kernels():
        policy = make_policy(make_model("llama") if family == "llama" else windowed_model(family))
        few, many = launches(policy, one), launches(policy, one * 20)
        assert few[FORWARD] == few[BACKWARD] == calls
        assert few == many
    assert launches(policy, one * 20).total() > many.total()  # in buckets there are more


@pytest.mark.parametrize(
    ("family", "takes"),
    [("mistral", True), ("gemma2", False), ("gpt_oss", False), ("dropout", False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_caps_sinks_dropout_and_float32_stay_with_the_buckets(
    family: str, takes: bool, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = windowed_model("mistral", attention_dropout=0.1) if family == "dropout" else windowed_model(family)
    with plain_kernels(dtypes=()), caplog.at_level(logging.WARNING):
        policy = make_policy(model.to(dtype)).train()
        counts = launches(policy, [Group(TOKENS[0], TOKENS[1:])])
    assert bool(counts[FORWARD]) == bool(counts[BACKWARD]) == (takes and dtype == torch.bfloat16)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"HAS_KERNELS": False}, f"PyTorch {torch.__version__} has no variable-length attention (2.10 has)"),
        ({"is_supported": lambda q, k, v: False}, "flash attention does not support heads of size 8 and 8 on a card"),
    ],
)
def test_what_is_missing_is_said_once_and_the_buckets_are_taken(
    make_model: Callable[..., Any],
    changes: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    with plain_kernels(dtypes=()), patch.multiple(varlen_attention, **changes), caplog.at_level(logging.WARNING):
        policy = make_policy(make_model("llama").bfloat16())
        counts = [launches(policy, [Group(TOKENS[0], TOKENS[1:])]) for _ in range(2)]
    assert not any(count[FORWARD] for count in counts)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Attention in training is slower than it could be on this GPU: " + reason)


@pytest.mark.parametrize(
    ("size", "value_size", "card_can", "supported"),
    [(64, 64, True, True), (64, 64, False, False), (36, 36, True, False), (64, 32, True, False)],
)
def test_a_head_needs_a_kernel_of_its_size(
    size: int, value_size: int, card_can: bool, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda parameters: card_can)
    q, k, v = (torch.zeros(5, heads, d, dtype=torch.bfloat16) for heads, d in ((4, size), (2, size), (2, value_size)))
    assert varlen_attention.is_supported(q, k, v) == supported


@pytest.mark.parametrize("autocast", [False, True])
def test_operands_have_the_precision_of_the_products_around_attention(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "is_supported", lambda q, k, v: True)
    query = torch.randn(1, 4, 5, 8)
    key, value = torch.randn(2, 1, 2, 5, 8).unbind(0)
    assert varlen_attention.operands(query, key, value) is None
    with torch.autocast("cpu", torch.float16) if autocast else nullcontext():
        given = varlen_attention.operands(query, key, value if autocast else value.bfloat16())
    assert given is not None
    assert {x.dtype for x in given} == {torch.float16 if autocast else torch.bfloat16}
    assert [tuple(x.shape) for x in given] == [(5, 4, 8), (5, 2, 8), (5, 2, 8)]
    assert all(x.is_contiguous() for x in given)


def test_only_what_a_window_shows_of_a_prompt_is_copied() -> None:
    prompts, completions = [10, 2], [[3, 1], [20]]
    layout = Layout(prompts, completions, CPU)
    own, of_prompts = layout.calls(None)
    assert own.query_places is own.key_places is None
    assert of_prompts.key_places is not None
    assert of_prompts.key_places.tolist() == [*range(10), 14, 15]  # each prompt once
    (windowed,) = layout.calls(4)
    assert windowed.key_places is not None
    assert windowed.key_places.tolist() == [
        *range(10),
        7,
        8,
        9,
        10,
        11,
        12,
        7,
        8,
        9,
        13,
        14,
        15,
        14,
        15,
        *range(16, 36),
    ]
    assert layout.calls(22) == layout.calls(None)  # which hides nothing
    assert layout.calls(4) == [windowed]  # made once for all layers


def test_half_precision_is_as_near_to_float64_as_in_buckets(make_model: Callable[..., Any]) -> None:
    groups = [Group(TOKENS[0], TOKENS[1:]), Group(TOKENS[1], [TOKENS[2] * 9])]

    def scores(dtype: torch.dtype, path: Any = nullcontext) -> list[torch.Tensor]:
        with path():
            policy = make_policy(make_model("qwen3").to(dtype))
            logprobs, _ = policy.score(groups)
            return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), list(policy.parameters()))]

    exact = scores(torch.float64)
    errors = [
        [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(some, exact, strict=True)]
        for some in (scores(torch.bfloat16), scores(torch.bfloat16, lambda: plain_kernels(dtypes=())))
    ]
    assert max(errors[0]) > 1e-3  # it is half precision that is measured
    assert sum(errors[1]) < 1.2 * sum(errors[0])


def test_pytorchs_own_shape_functions_take_the_calls() -> None:
    """On a device that is not there: nothing is computed, but arguments and results are those of the kernels."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda", 0)
        layout = Layout([5, 3], [[3, 2], [1]], device)
        q = torch.empty(14, 4, 64, dtype=torch.bfloat16, device=device)
        k = torch.empty(14, 2, 64, dtype=torch.bfloat16, device=device)
        for call in (*layout.calls(None), *layout.calls(4)):
            queries = 14 if call.query_places is None else len(call.query_places)
            out, normalisers = varlen_attention._forward(call, q, k, k, 0.1)
            assert (out.shape, out.dtype) == ((queries, 4, 64), torch.bfloat16)
            assert (normalisers.shape, normalisers.dtype) == ((4, queries), torch.float32)
            merged = torch.empty(4, 14, device=device)
            dq, dk, dv = varlen_attention._backward(call, q, q, k, k, q, merged, 0.1)
            keys = 14 if call.key_places is None else len(call.key_places)
            assert (dq.shape, dk.shape, dv.shape) == ((queries, 4, 64), (keys, 2, 64), (keys, 2, 64))
        square = torch.empty(16, 16, dtype=torch.bfloat16, device=device)
        assert head._product(square, square).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5])
def test_a_cards_kernel_computes_what_its_twin_does(dtype: torch.dtype, window: int | None) -> None:
    """Outputs, log-sum-exps and gradients, from the same operands; the twin computes in float32."""
    prompts, completions = [200, 1, 70], [[130, 1], [1, 1, 1], []]
    total = sum(prompts) + sum(map(sum, completions))
    q, k, v, grad = (torch.randn(total, heads, 64).to(dtype) for heads in (4, 2, 2, 4))
    found = []
    for device in (CPU, torch.device("cuda", 0)):
        calls = Layout(prompts, completions, device).calls(window)
        inputs = [x.to(device).requires_grad_() for x in (q, k, v)]
        with plain_kernels() if device == CPU else nullcontext():
            output = varlen_attention.Attention.apply(inputs[0], inputs[1], inputs[2], calls, 0.125)
            gradients = torch.autograd.grad(output, inputs, grad.to(device))
            normalisers = [varlen_attention._forward(call, *inputs, 0.125)[1].detach() for call in calls]
        found.append([x.cpu().float() for x in (output.detach(), *gradients, *normalisers)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 4 * torch.finfo(dtype).eps * theirs.norm()
