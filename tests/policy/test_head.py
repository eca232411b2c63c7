"""The chunked head against a plain log-softmax, against finite differences, and in what it holds in memory."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from plain_kernels import plain_kernels
from torch import Tensor

from stateset_lightning.algorithm import GKD
from stateset_lightning.policy import head
from stateset_lightning.policy.head import HeadOptions, token_logprobs

T, H, V = 7, 5, 11


def inputs(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    bias_V = torch.randn(V, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, bias_V, torch.tensor([3, 0, 10, 3, 7, 1, 3])


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logp = (logits / options.temperature).log_softmax(-1)
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1)


def mixed(outputs: tuple[Tensor, Tensor], use: str) -> Tensor:
    weights = torch.linspace(-1.0, 2.0, T)
    return {
        "logprobs": outputs[0] * weights,
        "entropies": outputs[1] * weights,
        "both": outputs[0] * weights - outputs[1] * weights.flip(0),
    }[use].sum()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """`gpu(columns)`: as on a GPU, with this part of the vocabulary at a time."""
    with ExitStack() as stack:

        def start(columns: int) -> None:
            monkeypatch.setattr(HeadOptions, "chunk", lambda options, *_: (options.chunk_tokens or T, columns))
            stack.enter_context(plain_kernels())

        yield start


@pytest.mark.parametrize("chunk", [1, 3, 7, None])
@pytest.mark.parametrize("columns", [None, 1, 4, V])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_a_plain_log_softmax(
    chunk: int | None,
    columns: int | None,
    softcap: float | None,
    temperature: float,
    bias: bool,
    gpu: Callable[[int], None],
) -> None:
    """On a CPU (columns None), and in parts of the vocabulary as on a GPU."""
    if columns is not None:
        gpu(columns)
    options = HeadOptions(temperature, softcap, chunk)
    arguments = inputs(bias=bias)
    leaves = [x for x in arguments[:3] if x is not None]
    got, expected = token_logprobs(*arguments, options), plain(*arguments, options)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)
    for use in ("logprobs", "entropies", "both"):
        ours_, theirs_ = (
            torch.autograd.grad(mixed(outputs, use), leaves, retain_graph=True) for outputs in (got, expected)
        )
        for a, b in zip(ours_, theirs_, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    options = HeadOptions(0.8, 2.0, 3)
    hidden, weight, bias, targets = inputs()
    assert bias is not None
    loss = mixed(token_logprobs(hidden, weight, bias, targets, options), "both")
    gradients = torch.autograd.grad(loss, [hidden, weight, bias])
    direction = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in (hidden, weight, bias)]
    step = 1e-2

    def at(t: float) -> float:
        with torch.no_grad():
            moved = [x + t * d for x, d in zip((hidden, weight, bias), direction, strict=True)]
            return mixed(token_logprobs(*moved, targets, options), "both").item()

    # Fourth order, so that the step can be large enough for float32.
    numerical = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    analytical = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
    assert numerical == pytest.approx(analytical, rel=1e-3)
    assert abs(analytical) > 0.1


def test_a_hand_computed_token() -> None:
    # Logits (0, ln 3): probabilities 1/4 and 3/4. d log p_1 / d logits = onehot - p = (-1/4, 1/4).
    weight = torch.tensor([[0.0], [1.0]], requires_grad=True)
    hidden = torch.tensor([[3.0]]).log().requires_grad_()
    logprobs, entropies = token_logprobs(hidden, weight, None, torch.tensor([1]), HeadOptions())
    assert logprobs.item() == pytest.approx(torch.tensor(0.75).log().item(), abs=1e-6)
    assert entropies.item() == pytest.approx(0.25 * 1.3862944 + 0.75 * 0.2876821, abs=1e-6)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.item() == pytest.approx(0.25, abs=1e-6)
    assert weight.grad[:, 0].tolist() == pytest.approx([-0.25 * 1.0986123, 0.25 * 1.0986123], abs=1e-6)


def test_a_tied_weight_gets_both_gradients() -> None:
    _, weight, _, targets = inputs()
    ids = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    ours = mixed(
        token_logprobs(torch.nn.functional.embedding(ids, weight), weight, None, targets, HeadOptions(chunk_tokens=2)),
        "both",
    )
    theirs = mixed(plain(torch.nn.functional.embedding(ids, weight), weight, None, targets, HeadOptions()), "both")
    torch.testing.assert_close(
        torch.autograd.grad(ours, weight), torch.autograd.grad(theirs, weight), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_bfloat16_weights_are_within_bfloat16_error(chunk: int | None) -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    assert bias is not None
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    options = HeadOptions(0.9, None, chunk)
    got = token_logprobs(hidden, weight, bias, targets, options)
    expected = plain(*exact, targets, options)
    assert got[0].dtype == got[1].dtype == torch.float32
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.04, rtol=0)
    ours_ = torch.autograd.grad(mixed(got, "both"), [hidden, weight, bias])
    for a, b in zip(ours_, torch.autograd.grad(mixed(expected, "both"), exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 0.02 * b.norm()


def test_gradients_of_many_bfloat16_chunks_are_summed_in_float32() -> None:
    hidden = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, weight, None, torch.zeros(2000, dtype=torch.long), HeadOptions(chunk_tokens=1))
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [1000.0, -1000.0]  # a bfloat16 sum of halves sticks at 128


def test_an_outer_autocast_does_not_lower_the_precision() -> None:
    arguments = inputs()
    expected = token_logprobs(*arguments, HeadOptions())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(*arguments, HeadOptions())
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["half", "float32"])
def test_on_a_gpu_operands_are_in_half_precision_and_nothing_else_is(
    dtype: torch.dtype, weights: str, gpu: Callable[[int], None]
) -> None:
    """Under autocast, or with weights of that precision: the same as in float32 from rounded operands."""
    gpu(4)
    kept = torch.float32 if weights == "float32" else dtype
    hidden, weight, bias, targets = inputs(kept)
    assert bias is not None
    rounded = [x.detach().to(dtype).float().requires_grad_() for x in (hidden, weight)]
    options = HeadOptions(0.9, None, 3)
    with torch.autocast("cpu", dtype=dtype, enabled=weights == "float32"):
        got = token_logprobs(hidden, weight, bias, targets, options)
    expected = plain(rounded[0], rounded[1], bias.detach().float(), targets, options)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    ours_ = torch.autograd.grad(mixed(got, "both"), [hidden, weight])
    for a, b in zip(ours_, torch.autograd.grad(mixed(expected, "both"), rounded), strict=True):
        assert a.dtype == kept
        assert (a.float() - b).norm() < 2 * torch.finfo(dtype).eps * b.norm()  # d logits is rounded once


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_float32_head_does_not_round_what_half_weights_give(on_gpu: bool, gpu: Callable[[int], None]) -> None:
    if on_gpu:
        gpu(4)
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    assert bias is not None
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    options = HeadOptions(0.9, None, 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(hidden, weight, bias, targets, options)
    expected = plain(*exact, targets, options)
    torch.testing.assert_close(got[0], expected[0], atol=2e-6, rtol=0)
    grads = [
        torch.autograd.grad(mixed(scores, "both"), leaves)
        for scores, leaves in ((got, [hidden, weight, bias]), (expected, exact))
    ]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b.bfloat16(), atol=1e-6, rtol=0.01)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_no_more_logits_exist_than_a_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    rows: list[int] = []
    original = head._logits

    def counting(hidden: Tensor, *rest: Any) -> Tensor:
        rows.append(len(hidden))
        return original(hidden, *rest)

    monkeypatch.setattr(head, "_logits", counting)
    mixed(token_logprobs(*inputs(), HeadOptions(chunk_tokens=chunk)), "both").backward()
    assert max(rows) <= chunk
    assert sum(rows) == 2 * T  # once forward, once in backward


def test_nothing_of_the_vocabularys_size_is_kept_for_backward() -> None:
    hidden, weight, bias, targets = inputs()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):  # type: ignore[func-returns-value]
        token_logprobs(hidden, weight, bias, targets, HeadOptions())
    assert saved
    assert (T, V) not in saved


def test_a_chunk_of_logits_has_at_most_64_mebibytes() -> None:
    assert HeadOptions().chunk(150_000)[0] * 150_000 * 4 <= 64 * 2**20
    assert HeadOptions().chunk(150_000) == (111, 150_000)
    assert HeadOptions().chunk(10**9)[0] == 16
    assert HeadOptions(chunk_tokens=5).chunk(150_000)[0] == 5


@pytest.mark.parametrize(("chunk_tokens", "tokens"), [(None, 4096), (512, 512), (10**9, 10**9)])
def test_a_gpu_has_thousands_of_tokens_and_a_part_of_the_vocabulary_at_a_time(
    chunk_tokens: int | None, tokens: int
) -> None:
    shape = HeadOptions(chunk_tokens=chunk_tokens).chunk(150_000, is_on_gpu=True)
    assert shape[0] == tokens
    assert shape[1] == max(128 * 2**20 // (4 * tokens), 1)


def test_only_the_needed_gradients_are_computed() -> None:
    hidden, weight, bias, targets = inputs()
    frozen = weight.detach()
    token_logprobs(hidden, frozen, None, targets, HeadOptions())[0].sum().backward()
    assert hidden.grad is not None
    expected = torch.autograd.grad(plain(hidden, weight, None, targets, HeadOptions())[0].sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, atol=1e-6, rtol=1e-5)
    assert bias is not None
    logprobs, _ = token_logprobs(hidden.detach(), weight, bias, targets, HeadOptions())
    logprobs.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("columns", [V, V - 2])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_divergence_and_its_gradient_are_those_of_plain_autograd_in_float64(
    beta: float, chunk: int | None, columns: int, softcap: float | None
) -> None:
    """Of the tokens that policy and teacher both know, and beside those of log-probs and entropies."""
    divergence = GKD(jsd_beta=beta).divergence
    teacher = torch.randn(T, columns, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    asked: list[int] = []

    def compare(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        asked.append(len(logits))
        return divergence(logits[:, :columns].log_softmax(-1), teacher[part].log_softmax(-1))

    hidden, weight, bias, targets = inputs(torch.float64)
    assert bias is not None
    options = HeadOptions(0.7, softcap, chunk, comparison=compare)
    logprobs, entropies, divergences = token_logprobs(hidden, weight, bias, targets, options)
    assert max(asked) == (chunk or T)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / 0.7
    expected = divergence(logits[:, :columns].log_softmax(-1), teacher.log_softmax(-1))[0]
    torch.testing.assert_close(divergences, expected, atol=1e-12, rtol=0)
    weights, leaves = torch.linspace(-1.0, 2.0, T, dtype=torch.float64), [hidden, weight, bias]
    ours, theirs = (
        torch.autograd.grad((weights * values).sum(), leaves, retain_graph=True) for values in (divergences, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)
    plain_logprobs, plain_entropies = plain(hidden, weight, bias, targets, HeadOptions(0.7, softcap))
    together, plainly = (
        torch.autograd.grad((d + w * (lp - e)).sum(), leaves)
        for d, w, lp, e in (
            (divergences, weights, logprobs, entropies),
            (expected, weights, plain_logprobs, plain_entropies),
        )
    )
    for a, b in zip(together, plainly, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
