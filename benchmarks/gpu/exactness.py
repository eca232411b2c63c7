"""The arithmetic of what runs on a GPU, on a CPU: against what the package computes there.

python exactness.py         prints the largest differences; part of the rehearsal, needs no GPU
"""

from __future__ import annotations

from functools import partial

import torch
from conftest import small_model
from harness import check, exit_status
from scoring_kernels import kernels
from torch import Tensor
from windowed_models import windowed_model

from stateset_lightning.policy import Group, Policy, PolicyConfig, load_tokenizer
from stateset_lightning.rollout import InProcessEngine, RolloutConfig
from stateset_lightning.rollout.engine import DecodingKind
from stateset_lightning.seeding import sample_seeds

DECODINGS: tuple[DecodingKind, ...] = ("eager", "graph")
GROUPS = [Group([3, 4, 5, 6, 7], [[7, 8, 9], [9, 5, 4, 3]]), Group([8, 3], [[4], [5, 6, 7, 3], [6, 6] * 4])]


def largest_difference(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def kernels_in_policy(name: str) -> str:
    """Attention without padding and the head in half precision's order, both here in float32."""
    policy = Policy(windowed_model(name) if name == "mistral" else small_model(name), PolicyConfig(name))
    assert policy.uses_packed_scoring

    def score() -> tuple[Tensor, ...]:
        logprobs, entropies = policy.score(GROUPS)
        return logprobs, *torch.autograd.grad(logprobs.sum() + 0.3 * entropies.sum(), list(policy.parameters()))

    ids = torch.tensor([[3, 4, 5, 6, 7]])
    as_on_a_cpu, plain = score(), policy.model(ids).logits
    with kernels():
        difference = largest_difference(as_on_a_cpu, score())
        assert largest_difference((plain,), (policy.model(ids).logits,)) < 1e-5, "a forward without a layout"
    assert 0 < difference < 1e-3, f"{difference:.1e}; 0 says that they were not used"
    return f"log-probs and gradients {difference:.1e}"


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


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in ("qwen2", "llama", "qwen3", "mistral"):
        check(f"kernels in a policy, {name}", partial(kernels_in_policy, name))
    for name in ("qwen2", "llama", "qwen3"):
        check(f"decoding as for a graph, {name}", partial(graph_samples_the_same, name))
    return exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
