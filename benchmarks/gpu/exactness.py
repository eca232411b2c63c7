"""The candidates' arithmetic on a CPU: each against what the package computes, or against plain attention in float64.

python exactness.py         prints the largest differences; part of the rehearsal, needs no GPU
"""

from __future__ import annotations

from functools import partial

import mixed_head
import torch
import varlen_attention
from conftest import small_model
from harness import check, exit_status
from torch import Tensor
from torch._subclasses import FakeTensorMode
from varlen_attention import Layout, SharedPromptAttention, Spans

from stateset_lightning.policy import Group, Policy, PolicyConfig, load_tokenizer
from stateset_lightning.policy.head import HeadOptions, token_logprobs
from stateset_lightning.rollout import InProcessEngine, RolloutConfig
from stateset_lightning.rollout.engine import DecodingKind
from stateset_lightning.seeding import sample_seeds

CPU = torch.device("cpu")
DECODINGS: tuple[DecodingKind, ...] = ("eager", "graph")
PROMPTS, COMPLETIONS = [5, 3, 4], [[3, 2], [1, 4, 2], []]
GROUPS = [Group([3, 4, 5, 6, 7], [[7, 8, 9], [9, 5, 4, 3]]), Group([8, 3], [[4], [5, 6, 7, 3], [6, 6]])]


def largest_difference(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def plain_mask() -> Tensor:
    """What each token of the packed sequence sees, bool [S, S]."""
    total = sum(PROMPTS) + sum(map(sum, COMPLETIONS))
    mask, start = torch.zeros(total, total, dtype=torch.bool), 0
    for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True):
        end = start + prompt
        mask[start:end, start:end] = torch.ones(prompt, prompt).tril().bool()
        first = end
        for length in completions:
            mask[first : first + length, start:end] = True
            mask[first : first + length, first : first + length] = torch.ones(length, length).tril().bool()
            first += length
        start = first
    return mask


def varlen_against_plain() -> str:
    """Outputs and gradients in float64, with fewer key heads than heads."""
    mask = plain_mask()
    q, k, v = (torch.randn(len(mask), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    out = SharedPromptAttention.apply(q, k, v, Layout.of(PROMPTS, COMPLETIONS, CPU), 0.3)
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    plain = attend(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
    grad = torch.randn_like(out)
    grads = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, plain))
    outputs, gradients = largest_difference((out,), (plain,)), largest_difference(*grads)
    assert max(outputs, gradients) < 1e-13, f"outputs {outputs:.1e}, gradients {gradients:.1e}"
    return f"outputs {outputs:.1e}, gradients {gradients:.1e}"


def varlen_in_policy(name: str) -> str:
    policy = Policy(small_model(name), PolicyConfig(name))
    assert policy.uses_packed_scoring

    def score() -> tuple[Tensor, ...]:
        logprobs, entropies = policy.score(GROUPS)
        return logprobs, *torch.autograd.grad(logprobs.sum() + 0.3 * entropies.sum(), list(policy.parameters()))

    ids = torch.tensor([[3, 4, 5, 6, 7]])
    as_it_is, plain = score(), policy.model(ids).logits
    with varlen_attention.installed():
        difference = largest_difference(as_it_is, score())
        assert torch.equal(plain, policy.model(ids).logits), "a forward without a layout is not left alone"
    assert 0 < difference < 1e-3, f"{difference:.1e}; 0 says that the candidate was not used"
    return f"log-probs and gradients {difference:.1e}"


def head_agrees() -> str:
    worst = 0.0
    for options in (HeadOptions(), HeadOptions(0.7), HeadOptions(0.7, 5.0)):
        for bias in (None, torch.randn(50, requires_grad=True)):
            hidden, weight = torch.randn(23, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
            inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
            targets = torch.randint(50, (23,))
            results = (
                token_logprobs(hidden, weight, bias, targets, options),
                mixed_head.MixedHead.apply(hidden, weight, bias, targets, options, torch.float32, 5),
            )
            grad = torch.randn(23)
            for share in (0.0, 0.4, None):  # of the entropies; None for entropies alone
                losses = [(e if share is None else p if share == 0 else p + share * e) @ grad for p, e in results]
                grads = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses]
                worst = max(worst, largest_difference(*results), largest_difference(*grads))
    assert worst < 1e-4, f"{worst:.1e}"
    return f"largest difference {worst:.1e}"


def graph_samples_the_same(name: str) -> str:
    """The step that would be captured, run without a graph."""
    engine = InProcessEngine(load_tokenizer(PolicyConfig("tiny")))
    model = small_model(name)
    model.generation_config.eos_token_id = [1, *range(345, 360)]  # so many that some rows end early
    engine.sync(Policy(model, PolicyConfig(name)))
    prompts, seeds = [[3, 4, 5, 6, 7], [8, 3], [9, 9, 9]], sample_seeds(1, "train", 0, range(3), 4)
    eager, graph = (
        engine.generate(prompts, 4, RolloutConfig(max_new_tokens=40, max_batch_rows=8, decoding=decoding), seeds)
        for decoding in DECODINGS
    )
    assert graph.completions() == eager.completions()
    assert min(eager.lengths_N) < 16 < max(eager.lengths_N)
    difference = largest_difference((graph.logprobs_T,), (eager.logprobs_T,))
    assert difference < 1e-5, f"{difference:.1e}"
    return f"the same {len(eager.logprobs_T)} tokens, log-probs {difference:.1e}"


def kernels_take_these_arguments() -> str:
    """PyTorch's own shape functions accept the calls that a GPU would get; nothing is computed."""
    layout = Layout.of(PROMPTS, COMPLETIONS, CPU)
    total = sum(layout.sequences.lengths)
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        ends = torch.empty(len(layout.sequences.lengths) + 1, dtype=torch.int32, device=device)
        spans = Spans(ends, layout.sequences.longest, layout.sequences.lengths)
        q = torch.empty(total, 4, 64, dtype=torch.bfloat16, device=device)
        k = torch.empty(total, 2, 64, dtype=torch.bfloat16, device=device)
        out, normalisers = varlen_attention.forward_kernel(q, k, k, spans, spans, True, 0.1)
        assert (out.shape, normalisers.shape, normalisers.dtype) == (q.shape, (4, total), torch.float32)
        grads = varlen_attention.backward_kernel(out, q, k, k, out, normalisers, spans, spans, True, 0.1)
        assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
        square = torch.empty(16, 16, dtype=torch.bfloat16, device=device)
        assert mixed_head._product(square, square).dtype == torch.float32
    return "flash attention forward and backward, products that come out in float32"


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    check("variable-length attention against plain attention", varlen_against_plain)
    for name in ("qwen2", "llama", "qwen3"):
        check(f"variable-length attention in a policy, {name}", partial(varlen_in_policy, name))
        check(f"decoding as for a graph, {name}", partial(graph_samples_the_same, name))
    check("head in larger chunks", head_agrees)
    check("kernels' arguments", kernels_take_these_arguments)
    return exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
