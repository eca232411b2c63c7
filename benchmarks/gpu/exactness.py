"""The arithmetic of what runs on a GPU, on a CPU: against what the package computes there.

python exactness.py         prints the largest differences; part of the rehearsal, needs no GPU
"""

from __future__ import annotations

from functools import partial

import torch
from conftest import small_model
from graph_decoder import GraphDecoder
from harness import check, exit_status
from kernels import kernels
from torch import Tensor
from windowed_models import windowed_model

from stateset_lightning.policy import Group, Policy, PolicyConfig, end_of_sequence_ids, load_tokenizer
from stateset_lightning.rollout import InProcessEngine, RolloutConfig
from stateset_lightning.seeding import sample_seeds

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
    tokenizer = load_tokenizer(PolicyConfig("tiny"))
    model = small_model(name, vocab_size=64)  # few tokens, so that some rows end early
    engine = InProcessEngine(tokenizer)
    engine.sync(Policy(model, PolicyConfig(name)))
    prompts = [[3, 4, 5, 6, 7], [8, 3], [9, 9, 9]]
    config, seeds = RolloutConfig(num_generations=4, max_new_tokens=20), sample_seeds(1, "train", 0, range(3), 4)
    expected = engine.generate(prompts, 4, config, seeds).completions()
    with torch.inference_mode():
        decoder = GraphDecoder(model, prompts, 4, config, seeds, end_of_sequence_ids(model, tokenizer))
    completions, _ = decoder.run(graph=False)
    assert completions == expected
    assert min(map(len, completions)) < 20
    return f"the same {sum(map(len, completions))} tokens"


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
